"""No Android device is needed: a program in adb's place runs on this machine what it is told."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nestling.profile import DeviceError, WorkerLostError
from nestling.profile.address import AdbPlace
from nestling.profile.transport import LineLostError
from nestling.profile.transport_adb import AdbProcess
from nestling.profile.transport_remote import Lodging, parse_greeting

NOTHING: dict[str, Any] = {"verb": "drop", "limit_seconds": 30}

FAKE = """#!/bin/sh
[ "$1" = -s ] || exit 2
[ "$2" = here ] || { echo "adb: device '$2' not found" >&2; exit 1; }
[ -e "$0.unplugged" ] && { echo "adb: device offline" >&2; exit 1; }
case "$3" in
  shell) [ "$4" = -T ] || exit 2; [ $# = 5 ] || exit 2
    echo "Welcome to this phone"
    sh -c "$5"; code=$?; [ -e "$0.unplugged" ] && exit 255; exit $code;;
  push) [ $# = 5 ] || exit 2; cp -- "$4" "$5";;
  *) exit 2;;
esac
"""


@pytest.fixture
def adb(tmp_path: Path) -> Path:
    program = tmp_path / "adb"
    program.write_text(FAKE)
    program.chmod(0o755)
    return program


@pytest.fixture
def transport(adb: Path, tmp_path: Path) -> Iterator[AdbProcess]:
    (tmp_path / "phone").mkdir()
    made = AdbProcess(AdbPlace("here", sys.executable), adb=str(adb), temporary=str(tmp_path / "phone"))
    yield made
    made.stop()


def worker_pid(transport: AdbProcess) -> int:
    assert transport.folder is not None
    owner = (Path(transport.folder) / "owner").read_text().strip()
    children = Path(f"/proc/{owner}/task/{owner}/children")
    wait_for(lambda: bool(children.read_text().strip()))
    return int(children.read_text())


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_worker_behind_adb_answers_and_leaves_nothing(transport: AdbProcess, tmp_path: Path) -> None:
    transport.start()
    assert transport.running
    assert transport.folder is not None
    assert transport.folder.startswith(str(tmp_path / "phone"))
    images = os.urandom(300_000)
    held = {"verb": "hold", "limit_seconds": 30, "array": "a", "dtype": "uint8", "shape": [300_000]}
    assert transport.exchange(held, images, timeout_seconds=30).message == {}
    transport.stop()
    assert not list((tmp_path / "phone").iterdir())


def test_how_a_worker_behind_adb_was_lost_is_said(transport: AdbProcess, tmp_path: Path) -> None:
    transport.start()
    os.kill(worker_pid(transport), signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"was ended by SIGKILL .*during 'drop'") as caught:
        transport.exchange(NOTHING, b"", timeout_seconds=30)
    assert not isinstance(caught.value, LineLostError)
    assert not list((tmp_path / "phone").iterdir())


def test_a_worker_behind_adb_that_does_not_answer_is_killed_there(transport: AdbProcess) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerLostError, match=r"no answer to 'drop' within 0\.1 s"):
        transport.exchange(NOTHING, b"", timeout_seconds=0.1)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_device_that_is_unplugged_is_a_lost_line(transport: AdbProcess, adb: Path) -> None:
    transport.start()
    adb.with_name("adb.unplugged").touch()
    os.kill(worker_pid(transport), signal.SIGKILL)
    with pytest.raises(LineLostError, match="the line to adb://here was lost"):
        transport.exchange(NOTHING, b"", timeout_seconds=30)
    with pytest.raises(LineLostError, match=r"adb://here cannot be reached.*adb: device offline"):
        transport.start()


def test_a_worker_that_could_not_be_killed_is_with_the_next_start(transport: AdbProcess, adb: Path) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    adb.with_name("adb.unplugged").touch()
    with pytest.raises(LineLostError, match="the line to adb://here was lost: no answer to 'drop'"):
        transport.exchange(NOTHING, b"", timeout_seconds=0.05)
    os.kill(pid, 0)  # it is there
    with pytest.raises(LineLostError, match="cannot be reached"):
        transport.start()
    adb.with_name("adb.unplugged").unlink()
    transport.start()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_device_that_is_not_there_is_named(adb: Path) -> None:
    with pytest.raises(LineLostError, match=r"adb://nowhere cannot be reached.*device 'nowhere' not found"):
        AdbProcess(AdbPlace("nowhere"), adb=str(adb)).start()


def test_a_python_that_is_not_there_is_named(adb: Path, tmp_path: Path) -> None:
    for python, said in (
        ("no-such-python", "has no no-such-python"),
        ("false", "false there is no Python 3"),
    ):
        transport = AdbProcess(AdbPlace("here", python), adb=str(adb), temporary=str(tmp_path))
        with pytest.raises(DeviceError, match=said):
            transport.start()
        assert not transport.running


def test_a_missing_adb_is_named_with_what_installs_it() -> None:
    with pytest.raises(DeviceError, match=r"there is no no-such-adb; install .*apt install adb"):
        AdbProcess(AdbPlace("here"), adb="no-such-adb").start()


def test_an_adb_that_cannot_be_run_is_not_called_missing(adb: Path) -> None:
    adb.chmod(0o644)
    with pytest.raises(
        DeviceError, match=r"adb://here: the worker cannot be started with .*Permission denied"
    ):
        AdbProcess(AdbPlace("here"), adb=str(adb)).start()


def test_what_is_run_is_one_quoted_word(adb: Path, tmp_path: Path) -> None:
    python = f"x'; touch {shlex.quote(str(tmp_path / 'canary'))};'"
    transport = AdbProcess(AdbPlace("here", python), adb=str(adb), temporary=str(tmp_path))
    with pytest.raises(DeviceError):
        transport.start()
    assert not (tmp_path / "canary").exists()


LOOKED = '{"python": [3, 9, 2], "missing": ["onnx"]}'


@pytest.mark.parametrize("folder", ["/tmp", "/data/c++/17_a.b-c"])
def test_a_greeting_tells_folder_and_python(folder: str) -> None:
    line = f"nestling-worker {folder}/nestling-worker.aB3 {LOOKED}\n".encode()
    lodging = parse_greeting(line, where="adb://here")
    assert lodging == Lodging(f"{folder}/nestling-worker.aB3", (3, 9, 2), ("onnx",))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            f"/a phone/nestling-worker.aB3 {LOOKED}",
            "its folder '/a phone/nestling-worker.aB3' must be a path",
        ),
        (f"tmp/nestling-worker.aB3 {LOOKED}", "set TMPDIR to such a one there"),
        (f"/tmp;reboot/nestling-worker.aB3 {LOOKED}", "must be a path"),
        ("is not known here", "which names no folder"),
        ("/tmp/nestling-worker.aB3 {3.9}", "does not tell its Python"),
        ('/tmp/nestling-worker.aB3 {"python": [3, "x"], "missing": []}', "does not tell its Python"),
        ('/tmp/nestling-worker.aB3 {"python": [3, 9]}', "does not tell its Python"),
    ],
)
def test_a_greeting_that_cannot_be_read_is_shown(said: str, why: str) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_greeting(f"nestling-worker {said}\n".encode(), where="adb://here")
    assert str(caught.value).startswith(f"adb://here greeted with {f'nestling-worker {said}'!r}")
    assert why in str(caught.value)


def test_a_folder_with_a_space_is_refused_and_left_empty(adb: Path, tmp_path: Path) -> None:
    phone = tmp_path / "a phone"
    phone.mkdir()
    made = AdbProcess(AdbPlace("here", sys.executable), adb=str(adb), temporary=str(phone))
    with pytest.raises(DeviceError, match="a phone/nestling-worker"):
        made.start()
    assert not made.running
    wait_for(lambda: not list(phone.iterdir()))
