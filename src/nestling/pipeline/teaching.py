"""Teachers whose weights are in files: a training that goes on learns from those that it began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from nestling.file_keys import file_key
from nestling.run import RunError, write_atomically

TEACHERS = "teachers.json"
"""The file of the SHA-256 of the files that teachers' weights came from, beside what learns from them."""


def teacher_files(names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each file that is named by teachers such as `resnet18=PATH`, by its path.

    Raises:
        FileNotFoundError: there is no such file.
    """
    paths = [path for _, _, path in (name.partition("=") for name in names) if path]
    return {path: file_key(Path(path)) for path in paths}


def check_teachers(files: Mapping[str, str], begun: Mapping[str, str], *, folder: Path) -> None:
    """Refuses teachers whose `files` have changed since what is in `folder` began with `begun`.

    Raises:
        RunError: a file is no longer the one that was begun with.
    """
    for path, key in files.items():
        if begun.get(path, key) != key:
            raise RunError(
                f"the teacher's weights in {path} are no longer those that {folder} began with (SHA-256 "
                f"{begun[path][:12]} then, {key[:12]} now); bring that file back, or remove {folder} to "
                "begin anew"
            )


def begin_with_teachers(files: Mapping[str, str], record: Path) -> None:
    """Writes to `record`, if it is not there, which teachers' `files` the training beside it begins with.

    Raises:
        RunError: they are others than it began with.
    """
    if record.exists():
        check_teachers(files, json.loads(record.read_text(encoding="utf-8")), folder=record.parent)
    elif files:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(dict(files), indent=2).encode())
