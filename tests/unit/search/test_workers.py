"""Workers are started again when they are killed, ended with their starter, and heard when they fail."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from nestling.search.workers import RESTARTS, Workers, WorkersLost

UNTIL_INPUT_ENDS = "import os; open(f'{os.getpid()}.pid', 'w').close(); os.read(0, 1)"
TIED = """
import sys, time
sys.path.append(sys.argv[1])  # the module alone: its package takes seconds to import
from workers import end_with_input
end_with_input()
try:
    print("tied", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("gave back", flush=True)
"""


def workers(folder: Path, code: str, number: int = 1) -> Workers:
    return Workers(
        [sys.executable, "-S", "-c", f"import os; os.chdir({str(folder)!r}); {code}"],
        number,
        logs=folder / "logs",
        environment={},
    )


def started(folder: Path, number: int) -> list[int]:
    """The processes that have said so, once there are `number`."""
    while len(found := list(folder.glob("*.pid"))) < number:
        time.sleep(0.002)
    return [int(file.stem) for file in found]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_with_their_starter(tmp_path: Path) -> None:
    with workers(tmp_path, UNTIL_INPUT_ENDS, 2) as running:
        processes = started(tmp_path, 2)
        assert running.check(0)
        assert all(map(lives, processes))
    assert not any(map(lives, processes))


def test_workers_are_at_work_until_the_last_has_come_to_its_end(tmp_path: Path) -> None:
    with workers(tmp_path, "", 2) as running:
        while running.check(0):
            time.sleep(0.002)
    with workers(tmp_path, UNTIL_INPUT_ENDS) as running:
        [process] = started(tmp_path, 1)
        assert running.check(0)
        os.kill(process, signal.SIGKILL)
        assert running.check(0)  # it is started again


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with workers(tmp_path, UNTIL_INPUT_ENDS) as running:
        [first] = started(tmp_path, 1)
        os.kill(first, signal.SIGKILL)
        while len(list(tmp_path.glob("*.pid"))) == 1:
            running.check(0)
            time.sleep(0.002)
        second = next(pid for pid in started(tmp_path, 2) if pid != first)
        assert lives(second)


def test_workers_that_are_killed_again_and_again_are_given_up_where_no_work_is_done(tmp_path: Path) -> None:
    code = "import signal; open(f'{os.getpid()}.pid', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"

    def check_until(running: Workers, enough: int, finished: Callable[[], int]) -> None:
        while len(list(tmp_path.glob("*.pid"))) < enough:
            running.check(finished())
            time.sleep(0.001)

    with workers(tmp_path, code) as running:
        check_until(running, 2 * RESTARTS, finished=count(1).__next__)
    with (
        pytest.raises(WorkersLost, match=r"6 workers in a row were killed \(the last by SIGKILL\)"),
        workers(tmp_path, code) as running,
    ):
        check_until(running, 10**6, finished=lambda: 0)


def test_an_error_of_a_worker_is_told_in_its_own_words(tmp_path: Path) -> None:
    code = "import sys; sys.exit('error: no such device')"

    def check_on(running: Workers) -> None:
        while True:
            running.check(0)
            time.sleep(0.002)

    with (
        pytest.raises(WorkersLost, match=r"worker 1 ended with an error: no such device \(.*worker-1.log\)"),
        workers(tmp_path, code) as running,
    ):
        check_on(running)


def test_a_worker_whose_starter_is_gone_gives_back_what_it_began() -> None:
    words = [sys.executable, "-c", TIED, str(Path(inspect.getfile(Workers)).parent)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "tied\n"
        process.stdin.close()
        assert process.stdout.readline() == "gave back\n"
