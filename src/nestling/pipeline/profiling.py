"""The page of a file's profile: the report's, written where the command line asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nestling.profile import FileProfile
from nestling.report import profile_html
from nestling.run import write_atomically


def write_profile_page(profiles: Sequence[FileProfile], path: Path) -> None:
    """Writes the profiles as one HTML page to `path`, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, profile_html(profiles).encode())
