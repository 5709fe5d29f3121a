"""The private folders of processes of this machine, which a killed one leaves behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from nestling.owners import has_ended, this_process

PREFIX = "nestling-worker-"


def private_folder() -> Path:
    """A new folder for temporary files, private to this user; those of processes now gone are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        match left.name.removeprefix(PREFIX).split("-"):
            case [pid, start, place, _] if pid.isdecimal() and has_ended(int(pid), start, place):
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{'-'.join(this_process())}-"))
