"""Workers: processes of this machine that search a study together, and what watches over them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ENDING_SECONDS = 20.0
"""The time that a worker has to give back what it does not finish."""
RESTARTS = 5
"""How often in a row workers may be lost without any candidate being finished."""


class WorkersLost(RuntimeError):  # noqa: N818 - it names what happened
    """Workers that ended before their work was done; the message tells why."""


class Workers:
    """`count` processes that run `command` until they are done. A context manager: leaving it ends them.

    A process that is killed is started again: what it evaluated is in the study's queue. One that ends with
    an error ends the search, as the others would meet the same.

    Args:
        command: the words of the command; it ends when its standard input does.
        count: how many processes.
        logs: the folder for what they print, `worker-1.log` and so on.
        environment: of the processes, beside this one's.
    """

    def __init__(
        self, command: Sequence[str], count: int, *, logs: Path, environment: Mapping[str, str]
    ) -> None:
        self._command, self._count, self._logs = list(command), count, logs
        self._environment = {**os.environ, **environment}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lost = self._finished_before = 0

    def check(self, finished: int) -> bool:
        """Starts anew what was killed, `finished` candidates being finished by now: whether any is at work.

        Raises:
            WorkersLost: a worker ended with an error, or all are killed again and again.
        """
        if finished > self._finished_before:
            self._lost, self._finished_before = 0, finished
        for number, process in list(self._processes.items()):
            code = process.poll()
            if code is None or code == 0:
                continue
            if code > 0:
                raise WorkersLost(f"worker {number} ended with an error: {self._last_words(number)}")
            self._lost += 1
            if self._lost > RESTARTS:
                raise WorkersLost(
                    f"{self._lost} workers in a row were killed (the last by {signal.Signals(-code).name}) "
                    f"before any candidate was finished; is there memory for {self._count}? Their output is "
                    f"in {self._logs}"
                )
            self._start(number)
        return any(process.poll() != 0 for process in self._processes.values())

    def __enter__(self) -> Self:
        self._logs.mkdir(exist_ok=True)
        for number in range(1, self._count + 1):
            self._start(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        until = time.monotonic() + ENDING_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, number: int) -> None:
        if number in self._processes and (pipe := self._processes[number].stdin) is not None:
            pipe.close()
        with self._log(number).open("ab") as log:
            self._processes[number] = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment
            )

    def _log(self, number: int) -> Path:
        return self._logs / f"worker-{number}.log"

    def _last_words(self, number: int) -> str:
        lines = self._log(number).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].removeprefix('error: ') if lines else 'it said nothing'} ({self._log(number)})"


def end_with_input() -> None:
    """Interrupts this process as Ctrl-C does when its standard input ends: when its starter has ended.

    What it has begun is then given back to the queue; a process that does not come to an end is ended.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(ENDING_SECONDS / 2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="tied").start()
