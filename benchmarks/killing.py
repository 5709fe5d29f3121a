"""Commands of Nestling's that are killed, and continued until they are done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nestling.search.workers import ENDING_SECONDS

LIMIT_SECONDS = 600.0
"""A command that takes longer is taken to hang."""
WORKER_SECONDS = 10.0 + ENDING_SECONDS / 2
"""The time that a killed command's workers have to end: to be imported, where they were just started, and to
give back what they began."""
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Command:
    """A command of Nestling's; it has begun its work when the folder `sign` changes."""

    words: tuple[str, ...]
    sign: Path

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The command at work, in a process group of its own; all of the group has ended afterwards.

        Raises:
            SystemExit: the command does not begin to work, or ends with an error.
        """
        before = changed_at(self.sign)
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "nestling.cli", *self.words],
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
            try:
                until = time.monotonic() + LIMIT_SECONDS
                while process.poll() is None and changed_at(self.sign) == before:
                    if time.monotonic() > until:
                        raise SystemExit(f"{self}: not begun within {LIMIT_SECONDS:.0f} s")
                    time.sleep(POLL_SECONDS)
                yield process
            finally:
                if group_lives(process.pid):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode not in (0, -signal.SIGKILL):
                said.seek(0)
                told = said.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{self} ended with {process.returncode}:\n{told}")

    def finish(self) -> float:
        """Runs the command to its end: the seconds that it worked.

        Raises:
            SystemExit: it ends with an error, or not at all.
        """
        with self.started() as process:
            began = time.monotonic()
            try:
                code = process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                raise SystemExit(f"{self}: not done within {LIMIT_SECONDS:.0f} s") from None
            seconds = time.monotonic() - began
        if code != 0:
            raise SystemExit(f"{self} ended with {code}")
        return seconds

    def kill(self, *, after: float) -> bool | None:
        """Kills the command after so many seconds of work: whether its workers ended with it.

        None where the command was done before.

        Raises:
            SystemExit: it ended with an error.
        """
        with self.started() as process:
            try:
                process.wait(after)
                return None
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return ends(process.pid, within=WORKER_SECONDS)

    def __str__(self) -> str:
        return f"nestling {' '.join(self.words[:2])}"


@dataclass(frozen=True, slots=True)
class Killed:
    """A finished run, and what was seen after each time it was killed."""

    run: Path
    kills: list[dict[str, Any]]


def run_killed(
    begin: Callable[[int], tuple[Path, Command]],
    moments: Sequence[float],
    *,
    look: Callable[[Path], dict[str, Any]],
) -> list[Killed]:
    """Runs that were killed at the sorted `moments` (seconds of work) and continued until they were done.

    An attempt works for the time between two moments. Where it is done before (the machine has become
    faster), another run is begun for the kills that are left.

    Args:
        begin: makes the folder of the run with this number, and the command that starts or continues it.
        moments: all kills together.
        look: what a kill has left in the folder.
    """
    finished: list[Killed] = []
    run, command = begin(1)
    kills: list[dict[str, Any]] = []
    for before, moment in pairwise([0.0, *moments]):
        while (worker_ended := command.kill(after=moment - before)) is None:
            finished.append(Killed(run, kills))
            print("  done before it was killed: another run", flush=True)
            run, command = begin(len(finished) + 1)
            kills = []
        kills.append({"after_seconds": round(moment - before, 3), "worker_ended": worker_ended, **look(run)})
        told = {key.replace("_", " "): value for key, value in kills[-1].items() if key != "stored"}
        print("  killed: " + ", ".join(f"{key} {value}" for key, value in told.items()), flush=True)
    command.finish()
    return [*finished, Killed(run, kills)]


def changed_at(folder: Path) -> int | None:
    """When an entry of `folder` last came, went or was replaced; None where it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def group_lives(group: int) -> bool:
    """Whether any process of `group` is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def ends(group: int, *, within: float) -> bool:
    """Whether every process of `group` has ended after at most `within` seconds."""
    until = time.monotonic() + within
    while group_lives(group):
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True
