from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nestling.file_keys import content_key, file_key


@pytest.mark.parametrize("content", [b"", b"content", bytes(range(256)) * 4097])
def test_the_key_of_a_file_is_the_sha256_of_its_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    assert file_key(path) == content_key(content) == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_not_there_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_key(tmp_path / "a")
