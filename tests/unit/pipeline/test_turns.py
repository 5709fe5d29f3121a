"""One process of a machine trains in a folder at a time, and one that is killed keeps nobody away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nestling.pipeline.turns import training_in
from nestling.run import RunError
from nestling.train.distributed import ALONE

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def test_a_second_training_in_a_folder_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    with (
        training_in(folder, ranks=ALONE),
        pytest.raises(RunError, match=rf"process {os.getpid()} is training in .*training; wait"),
        training_in(folder, ranks=ALONE),
    ):
        pass
    with training_in(folder, ranks=ALONE):
        pass


def in_a_fork(work: Callable[[], object]) -> int:
    """The number of a process that does `work`, and ends with 0 if that raises nothing."""
    if process := os.fork():
        return process
    try:  # must not come back to pytest
        work()
        os._exit(0)
    finally:
        os._exit(1)


@FORKS
def test_a_training_keeps_others_away_though_its_own_process_tried_a_second(tmp_path: Path) -> None:
    def other() -> None:
        with pytest.raises(RunError, match=f"process {os.getppid()} is"), training_in(tmp_path, ranks=ALONE):
            pass

    with training_in(tmp_path, ranks=ALONE):
        with pytest.raises(RunError), training_in(tmp_path / "." / "", ranks=ALONE):
            pass
        assert os.waitpid(in_a_fork(other), 0)[1] == 0


@FORKS
def test_a_training_that_was_killed_keeps_nobody_away_though_its_loaders_live(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def trains() -> None:
        with training_in(tmp_path, ranks=ALONE):
            os.write(writing, str(in_a_fork(lambda: time.sleep(60))).encode())
            time.sleep(60)

    trainer = in_a_fork(trains)
    os.close(writing)
    loader = int(os.read(reading, 32))
    os.close(reading)
    try:
        with pytest.raises(RunError, match=f"process {trainer} is"), training_in(tmp_path, ranks=ALONE):
            pass
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        with training_in(tmp_path, ranks=ALONE):
            pass
    finally:
        os.kill(loader, signal.SIGKILL)  # it lives, or this raises
