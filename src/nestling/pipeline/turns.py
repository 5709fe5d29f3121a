"""Turns: of all processes of one machine, one at a time measures on a device, and one trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


_trained_here: set[tuple[int, Path]] = set()
"""The number of this process and a folder, of each training: record locks keep only other processes away."""


@contextmanager
def training_in(folder: Path, *, ranks: Ranks) -> Iterator[None]:
    """Keeps everybody but ranks of this process from training in `folder` meanwhile.

    Two that wrote the same checkpoints would only take twice as long. The lock ends with the process, however
    that ends, and those that it forked do not inherit it: where it is killed, loaders of images outlive it by
    seconds. A file system without locks keeps no other process away.

    Args:
        folder: of the checkpoints; made where it is not there.
        ranks: which train together: the first holds the lock for all.

    Raises:
        RunError: another process trains there, or this one already does; its number is named.
    """
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(_locked(folder)))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    training = os.getpid(), folder.resolve()
    if training in _trained_here:  # the file is not touched: closing it would unlock it
        raise _in_use(folder, by=str(os.getpid()))
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _trained_here.add(training)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(folder, by=os.pread(descriptor, 32, 0).decode() or "unknown") from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
        _trained_here.discard(training)


def _in_use(folder: Path, *, by: str) -> RunError:
    return RunError(
        f"process {by} is training in {folder}; wait until it is done, or stop it: this command then goes on "
        "from its newest checkpoint"
    )
