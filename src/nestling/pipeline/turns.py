"""Turns: of all processes of one machine, one at a time trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nestling.run import RunError
from nestling.train.distributed import Ranks

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
