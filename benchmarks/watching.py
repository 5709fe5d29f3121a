"""Whether anybody opens, reads, changes, makes or removes a file of some folders, told by inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

EVENTS = {
    0x001: "read", 0x002: "written", 0x004: "changed", 0x020: "opened", 0x040: "moved away",
    0x080: "moved here", 0x100: "made", 0x200: "removed",
}  # fmt: skip
"""Events of inotify(7) that are told of."""
_HEAD = struct.Struct("iIII")
_NONBLOCK = 0o4000


class Watch:
    """Watches the files that lie directly in `folders`. A context manager.

    Raises:
        OSError: the system does not let it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        mask = sum(EVENTS)
        self._folders: dict[int, Path] = {}
        for folder in folders:
            number = libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask)
            if number < 0:
                raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")
            self._folders[number] = folder

    def seen(self) -> list[str]:
        """What happened since this was asked last: `opened FOLDER/NAME`."""
        told: list[str] = []
        while True:
            try:
                content = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return told
            position = 0
            while position < len(content):
                number, mask, _, length = _HEAD.unpack_from(content, position)
                position += _HEAD.size
                name = os.fsdecode(content[position : position + length].rstrip(b"\0"))
                position += length
                words = [word for bit, word in EVENTS.items() if mask & bit] or [f"event {mask:x}"]
                told.append(f"{' and '.join(words)} {self._folders.get(number, Path('?')) / name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
