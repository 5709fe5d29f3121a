"""One process of a machine measures at a time, and what it leaves behind when it is killed is nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.profile import Measurement, compare_files, profile_file
from nestling.profile.pool import in_turn
from nestling.profile.turns import turn

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


def test_all_runtimes_of_this_machine_share_a_turn(tmp_path: Path) -> None:
    for device in ("ort:cpu?threads=1", "ort:cpu?threads=2", "openvino:cpu", "torch:cuda?dtype=bf16"):
        with turn(device, folder=tmp_path):
            assert not is_free(tmp_path)


@pytest.mark.parametrize("device", ["ssh://board/ort:cpu", "adb://1/ort:cpu", "pool:ort:cpu,ssh://b/ort:cpu"])
def test_boards_and_pools_wait_for_nobody(device: str, tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path), turn(device, folder=tmp_path):
        assert not is_free(tmp_path)


def test_who_waits_long_is_told_for_whom(tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path):
        pass
    [file] = tmp_path.iterdir()
    words = [sys.executable, "-c", HOLDS, str(file)]
    said: list[str] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        def tell(sentence: str) -> None:
            said.append(sentence)
            holder.kill()

        with turn("openvino:cpu", folder=tmp_path, tell=tell, patience_seconds=0.01):
            pass
    assert [one.partition(" is ")[0] for one in said] == [f"openvino:cpu waits: process {os.getpid()}"]


def test_who_need_not_wait_is_told_nothing(tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path, tell=pytest.fail, patience_seconds=0.0):
        pass


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


def watched(measurement: Measurement, folder: Path, alone: list[bool]) -> Any:
    """A device of this machine that looks whether others could measure whenever it is asked for something."""

    def answers(answer: object) -> Callable[..., object]:
        def asked(*_: object, **__: object) -> object:
            alone.append(not is_free(folder))
            return answer

        return asked

    return SimpleNamespace(
        name="ort:cpu?threads=1",
        measure=answers(measurement),
        compare=answers(measurement),
        energy=answers({}),
        inputs=answers(()),
        kernels=answers(()),
    )


@pytest.mark.parametrize("what", ["profile", "comparison"])
def test_a_person_s_measurements_take_turns_too(
    what: str, tmp_path: Path, measured: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone: list[bool] = []
    device = watched(measured(*[1.0] * 20), tmp_path, alone)
    if what == "profile":
        profile_file(device, Path("a.onnx"), nodes=True)
    else:
        compare_files(device, Path("a.onnx"), Path("b.onnx"), rounds=4)
    assert alone == [True] * 4
    assert is_free(tmp_path)


def test_a_board_of_a_pool_that_is_this_machine_takes_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here: Any = SimpleNamespace(name="ort:cpu?threads=1")
    away: Any = SimpleNamespace(name="ssh://board/ort:cpu?threads=1")
    assert in_turn(here, lambda: not is_free(tmp_path))
    assert in_turn(away, lambda: is_free(tmp_path))
