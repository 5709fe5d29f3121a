"""Turns: of all processes of one machine, one at a time measures on a device, and one trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestling.run import RunError
from nestling.train.distributed import Ranks


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


@contextmanager
def training_in(folder: Path, *, ranks: Ranks) -> Iterator[None]:
    """Keeps processes that are no ranks of this one from training in `folder` meanwhile.

    Two that wrote the same checkpoints would only take twice as long. The lock ends with the process, however
    that ends; a file system without locks keeps nobody away.

    Args:
        folder: of the checkpoints; made where it is not there.
        ranks: which train together: the first holds the lock for all.

    Raises:
        RunError: another process trains there; its number is named.
    """
    descriptors: list[int] = []

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptors.append(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptors[0], 32, 0).decode() or "unknown"
            raise RunError(
                f"process {holder} is training in {folder}; wait until it is done, or stop it: this command "
                "then goes on from its newest checkpoint"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        os.ftruncate(descriptors[0], 0)
        os.pwrite(descriptors[0], str(os.getpid()).encode(), 0)

    try:
        ranks.from_first(lock)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
