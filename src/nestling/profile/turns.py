"""Turns: of all processes of one machine, one at a time measures there, with whatever runtime."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nestling.profile.address import POOL

PATIENCE_SECONDS = 10.0
"""Who waits for longer is told so."""


def shared_folders() -> list[Path]:
    """The folders in which all processes of this user on this machine look for a turn, in one order.

    None follows TMPDIR, which schedulers set for each job. A session may lack the one of `/run/user`, a
    service may have a `/tmp` of its own: a turn is taken in both, so that those with one in common meet.
    """
    found = [Path(f"/run/user/{os.getuid()}"), Path("/tmp")]
    return [one for one in found if one.is_dir() and os.access(one, os.W_OK)] or [Path(tempfile.gettempdir())]


@contextmanager
def turn(
    device: str,
    *,
    folder: Path | None = None,
    tell: Callable[[str], None] | None = warnings.warn,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[None]:
    """Waits until no other process measures on this machine, and then keeps the others waiting.

    Two measurements at once would each be of a busy machine, also where their runtimes differ. Devices of
    other machines are waited for by nobody: who shares those has leases on them. The turn ends with the
    process, however that ends. It is not to be taken inside another one.

    Args:
        device: its name; that of a pool, or of a board that a line leads to, takes no turn.
        folder: where the turns' file is, the same for all processes; by default the `shared_folders`.
        tell: is given a sentence, by another thread, when the wait becomes long; None: nobody is told.
        patience_seconds: how long that is.
    """
    if device.startswith(POOL) or "://" in device:
        yield
        return
    with ExitStack() as held:
        for shared in shared_folders() if folder is None else [folder]:
            held.enter_context(_held(shared, device, tell=tell, patience_seconds=patience_seconds))
        yield


@contextmanager
def _held(
    folder: Path, device: str, *, tell: Callable[[str], None] | None, patience_seconds: float
) -> Iterator[None]:
    """Waits for the turn in one folder, and has it."""
    # the folder may be anybody's: no link of theirs is followed
    path = folder / f"nestling-{os.getuid()}-measures"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, device, tell=tell, patience_seconds=patience_seconds)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(
    descriptor: int, device: str, *, tell: Callable[[str], None] | None, patience_seconds: float
) -> None:
    def say() -> None:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "another"
        if tell is not None:
            tell(
                f"{device} waits: process {holder} is measuring on this machine, and one does at a time; "
                "this goes on between its measurements"
            )

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # not by asking again and again: the system lets those who wait in one after the other
        timer = threading.Timer(patience_seconds, say)
        timer.daemon = True
        timer.start()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            timer.cancel()
            timer.join()
