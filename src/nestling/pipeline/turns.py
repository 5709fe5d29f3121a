"""Turns: of all processes of one machine, one at a time measures on a device."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(device: str, *, folder: Path | None = None) -> Iterator[None]:
    """Waits until no other process measures on `device`, and then keeps the others waiting.

    Two measurements at once would each be of a busy machine. Devices whose names differ in their options only
    (`ort:cpu?threads=1`, `ort:cpu?threads=2`) are one. The turn ends with the process, however that ends.

    Args:
        device: its name.
        folder: where the turns' files are, the same for all processes; by default the machine's folder of
            temporary files.
    """
    name = hashlib.sha256(device.partition("?")[0].encode()).hexdigest()[:12]
    path = (folder or Path(tempfile.gettempdir())) / f"nestling-{os.getuid()}-measures-{name}"
    # the folder may be anybody's: no link of theirs is followed
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
