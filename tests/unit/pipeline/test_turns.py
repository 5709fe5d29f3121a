"""One process of a machine measures at a time, and what it leaves behind when it is killed is nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nestling.pipeline.turns import training_in, turn
from nestling.run import RunError
from nestling.train.distributed import ALONE

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

HOLDS = """
import sys, fcntl, os
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def is_free(folder: Path) -> bool:
    """Whether another process could take the only turn in `folder` at once."""
    [file] = folder.iterdir()
    words = ["flock", "--nonblock", str(file), "true"]
    return subprocess.run(words, check=False).returncode == 0


def test_a_turn_keeps_other_processes_waiting_until_it_ends(tmp_path: Path) -> None:
    with turn("ort:cpu?threads=1", folder=tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_options_of_a_device_share_a_turn_and_other_devices_have_their_own(tmp_path: Path) -> None:
    with turn("ort:cpu?threads=1", folder=tmp_path):
        pass
    with turn("ort:cpu?threads=2", folder=tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    with turn("ssh://board/ort:cpu", folder=tmp_path), turn("ort:cpu", folder=tmp_path):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_turn_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path):
        pass
    [file] = tmp_path.iterdir()
    words = [sys.executable, "-c", HOLDS, str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not is_free(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with turn("ort:cpu", folder=tmp_path):
        assert not is_free(tmp_path)


def test_a_link_in_the_place_of_a_turn_is_not_followed(tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path):
        pass
    [file] = tmp_path.iterdir()
    aim = tmp_path / "aim"
    file.unlink()
    file.symlink_to(aim)
    with pytest.raises(OSError, match="symbolic link"), turn("ort:cpu", folder=tmp_path):
        os.abort()
    assert not aim.exists()


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
