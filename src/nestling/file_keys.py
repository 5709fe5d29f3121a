"""What a file is known by wherever it lies: the SHA-256 of its content, in hexadecimal."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_key(path: Path) -> str:
    """The SHA-256 of the file at `path`: what its measurements are kept under, and cards call `sha256`.

    It is read piece by piece.

    Raises:
        FileNotFoundError: no such file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(content: bytes) -> str:
    """The key of a file with this content."""
    return hashlib.sha256(content).hexdigest()
