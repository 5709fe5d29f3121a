"""One process of a machine measures at a time, and what it leaves behind when it is killed is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.profile import Measurement, compare_files, profile_file, turns
from nestling.profile.pool import in_turn
from nestling.profile.turns import turn

HOLDS = """
import sys
from pathlib import Path
from nestling.profile.turns import turn
with turn("ort:cpu", folder=Path(sys.argv[1])):
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


def test_who_waits_long_is_told_for_whom_and_goes_on_when_that_process_is_killed(tmp_path: Path) -> None:
    words, said = [sys.executable, "-c", HOLDS, str(tmp_path)], list[str]()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not is_free(tmp_path)

        def tell(sentence: str) -> None:
            said.append(sentence)
            holder.kill()

        with turn("openvino:cpu", folder=tmp_path, tell=tell, patience_seconds=0.01):
            assert not is_free(tmp_path)
    assert [one.partition(" is ")[0] for one in said] == [f"openvino:cpu waits: process {holder.pid}"]


def test_who_need_not_wait_is_told_nothing(tmp_path: Path) -> None:
    with turn("ort:cpu", folder=tmp_path, tell=pytest.fail, patience_seconds=0.0):
        pass


def test_processes_share_turns_whatever_their_folders_of_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = turns.shared_folders()
    assert Path("/tmp") in found
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert turns.shared_folders() == found


def test_those_who_share_one_folder_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "session", tmp_path / "all"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(turns, "shared_folders", lambda: folders)
    with turn("ort:cpu"):
        assert [is_free(folder) for folder in folders] == [False, False]
    assert [is_free(folder) for folder in folders] == [True, True]


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
    monkeypatch.setattr(turns, "shared_folders", lambda: [tmp_path])
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
    monkeypatch.setattr(turns, "shared_folders", lambda: [tmp_path])
    here: Any = SimpleNamespace(name="ort:cpu?threads=1")
    away: Any = SimpleNamespace(name="ssh://board/ort:cpu?threads=1")
    assert in_turn(here, lambda: not is_free(tmp_path))
    assert in_turn(away, lambda: is_free(tmp_path))
