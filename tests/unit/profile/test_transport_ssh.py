from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nestling.profile import DeviceError, WorkerDevice, WorkerLostError, connect, transport_ssh
from nestling.profile.address import SshPlace
from nestling.profile.transport import LineLostError
from nestling.profile.transport_remote import lodge_command, worker_file
from nestling.profile.transport_ssh import SshProcess

pytest.importorskip("asyncssh", reason="devices behind ssh need asyncssh: pip install 'nestling[ssh]'")

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NOTHING: dict[str, Any] = {"verb": "drop", "limit_seconds": 30}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the one who calls boards, with a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return tmp_path


@pytest.fixture
def board(home: Path) -> Iterator[Any]:
    """An ssh server on 127.0.0.1."""
    opened = importlib.import_module("loopback").Board(home, home / "board")
    yield opened
    opened.close()


@pytest.fixture
def transport(board: Any) -> Iterator[SshProcess]:
    """A worker on the board, not started yet."""
    made = SshProcess(place(board))
    yield made
    made.stop()


def place(board: Any, python: str = sys.executable) -> SshPlace:
    return SshPlace(board.host, None, board.port, python)


def ask(transport: SshProcess, *, timeout_seconds: float = 30.0, **fields: object) -> None:
    transport.exchange({**NOTHING, **fields}, b"", timeout_seconds=timeout_seconds)


def owner_pid(transport: SshProcess) -> int:
    assert transport.folder is not None
    return int((Path(transport.folder) / "owner").read_text())


def worker_pid(transport: SshProcess) -> int:
    owner = owner_pid(transport)
    children = Path(f"/proc/{owner}/task/{owner}/children")
    wait_for(lambda: bool(children.read_text().strip()))
    return int(children.read_text())


def wait_for(done: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_worker_behind_ssh_answers_and_leaves_nothing(board: Any, transport: SshProcess) -> None:
    transport.start()
    [folder] = board.lodgings()
    assert str(folder) == transport.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.name for file in folder.iterdir()} == {"owner", worker_file()[0]}
    ask(transport)
    transport.stop()
    assert not transport.running
    assert board.lodgings() == []
    wait_for(lambda: not board.children)


def test_a_board_is_told_fixed_and_quoted_words_only(board: Any, home: Path) -> None:
    python = home / "a b'; touch canary;'"
    transport = SshProcess(place(board, str(python)))
    with pytest.raises(DeviceError, match=r"has no .*touch canary"):
        transport.start()
    assert not list(home.rglob("canary"))
    [command] = board.commands
    assert shlex.split(command)[4] == str(python)
    ours = lodge_command("python3", modules=("numpy",), name="0" * 64)
    for word in shlex.split(ours):
        assert not set(word) & set("\n'\\")
        assert not re.search(r"!(?! )", word)


def test_a_board_whose_key_is_not_known_is_refused_before_anything_runs(home: Path) -> None:
    board = importlib.import_module("loopback").Board(home, home / "stranger", known=False)
    with pytest.raises(DeviceError, match=r"host key is not the one in ~/\.ssh/known_hosts.*`ssh -p \d+ 127"):
        SshProcess(place(board)).start()
    board.close()
    assert board.commands == []


def test_a_board_whose_key_has_changed_is_refused(board: Any, home: Path) -> None:
    known = home / ".ssh" / "known_hosts"
    importlib.import_module("loopback").Board(home, home / "other").close()
    ours, others = known.read_text().splitlines()
    known.write_text(f"{ours.split()[0]} {others.split(' ', 1)[1]}\n")
    with pytest.raises(DeviceError, match="host key is not the one"):
        SshProcess(place(board)).start()


def test_a_key_that_the_board_does_not_accept_is_named(board: Any, home: Path) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    with pytest.raises(DeviceError, match=r"no key of ours is accepted.*ssh-copy-id -p \d+ 127\.0\.0\.1"):
        SshProcess(place(board)).start()


def test_a_board_that_is_off_is_a_lost_line(board: Any) -> None:
    board.shut()
    with pytest.raises(LineLostError, match=r"ssh://127\.0\.0\.1:\d+ cannot be reached"):
        SshProcess(place(board)).start()


def test_what_the_board_s_python_lacks_is_named_with_what_installs_it(board: Any) -> None:
    transport = SshProcess(place(board), modules=("numpy", "no_such_module"))
    with pytest.raises(DeviceError) as caught:
        transport.start()
    assert f"lacks no_such_module; there, run: {sys.executable} -m pip install no_such_module" in str(
        caught.value
    )
    wait_for(lambda: board.lodgings() == [])
    with pytest.raises(DeviceError, match=r"has no no-such-python; install Python there, or say where it is"):
        SshProcess(place(board, "no-such-python")).start()
    assert not transport.running


def test_how_a_worker_on_a_board_was_lost_is_said(board: Any, transport: SshProcess) -> None:
    transport.start()
    os.kill(worker_pid(transport), signal.SIGSEGV)
    with pytest.raises(WorkerLostError, match="the worker was ended by SIGSEGV during 'drop'") as caught:
        ask(transport)
    assert not isinstance(caught.value, LineLostError)
    assert not transport.running
    assert board.lodgings() == []
    transport.start()
    ask(transport)


def test_a_worker_on_a_board_that_does_not_answer_is_killed_there(board: Any, transport: SshProcess) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerLostError, match=r"no answer to 'drop' within 0\.1 s; the worker was killed"):
        ask(transport, timeout_seconds=0.1)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert board.lodgings() == []


def test_a_cut_line_is_told_from_a_dead_worker_and_the_board_tidies_up(
    board: Any, transport: SshProcess
) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.05, board.cut).start()
    with pytest.raises(LineLostError, match=r"the line to ssh://127\.0\.0\.1:\d+ was lost during 'drop'"):
        ask(transport)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() and board.lodgings() == [])
    transport.start()
    ask(transport)


def test_a_worker_that_was_cut_off_in_its_work_does_not_disturb_the_next_one(
    board: Any, transport: SshProcess
) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)  # busy, and deaf to the end of its line
    threading.Timer(0.05, board.cut).start()
    with pytest.raises(LineLostError):
        ask(transport)
    transport.start()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert [str(folder) for folder in board.lodgings()] == [transport.folder]


def test_a_worker_behind_a_line_that_stalls_does_not_disturb_the_next_one(
    board: Any, transport: SshProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(transport_ssh, "KILL_SECONDS", 0.02)
        patched.setattr(transport_ssh, "STOP_SECONDS", 0.02)
        with board.stalled(), pytest.raises(LineLostError, match=r"no answer to 'drop' within 0\.05 s, nor"):
            ask(transport, timeout_seconds=0.05)
    os.kill(pid, 0)  # it is there
    transport.start()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert [str(folder) for folder in board.lodgings()] == [transport.folder]


def test_no_worker_is_started_beside_one_that_could_not_be_ended(
    board: Any, transport: SshProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.start()
    pid, folder = worker_pid(transport), transport.folder
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.02, board.cut).start()
    with pytest.raises(LineLostError):
        ask(transport)
    with monkeypatch.context() as patched:
        patched.setattr(transport_ssh, "KILL_SECONDS", 0.02)
        patched.setattr(transport_ssh, "kill_command", lambda folder: f"sleep 1 # {folder}")
        with pytest.raises(LineLostError, match=r"ssh://127.*: the worker in .* could not be ended"):
            transport.start()
    assert [str(kept) for kept in board.lodgings()] == [folder]
    transport.start()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_folder_whose_owner_was_killed_goes_with_the_next_worker(board: Any, transport: SshProcess) -> None:
    transport.start()
    os.kill(owner_pid(transport), signal.SIGKILL)
    transport.stop()
    [left] = board.lodgings()
    theirs, strangers = left.with_name("nestling-worker.alive"), left.with_name("nestling-worker.empty")
    shutil.copytree(left, theirs)
    (theirs / "owner").write_text(f"{os.getpid()}\n")
    strangers.mkdir()
    transport.start()
    kept = {str(theirs), str(strangers), transport.folder}
    assert {str(folder) for folder in board.lodgings()} == kept


def test_a_worker_that_arrived_damaged_does_not_run(board: Any) -> None:
    name, source = worker_file()
    command = lodge_command(sys.executable, modules=("json",), name=name, base=str(board.temporary))
    with subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shell:
        assert shell.stdout is not None
        folder = shell.stdout.readline().split()[1].decode()
        Path(folder, name).write_bytes(source[:-1])
        _, words = shell.communicate(b"go\n")
    assert shell.returncode == 1
    assert words.strip() == b"the worker that arrived is not the one that was sent"
    assert not Path(folder).exists()


def test_ctrl_c_in_the_middle_of_an_answer_ends_the_worker_on_the_board(transport: SshProcess) -> None:
    transport.start()
    pid = worker_pid(transport)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask(transport)
    timer.join()
    assert not transport.running
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_file_is_measured_and_run_behind_ssh(board: Any, tiny: Path) -> None:
    address = board.device()
    with connect(address, seconds=0.02, timeout_seconds=60) as device:
        assert isinstance(device, WorkerDevice)
        taken = device.measure(tiny)
    assert taken.ratio > 0
    assert taken.device == f"{board.address}/ort:cpu?threads=1"
    assert board.lodgings() == []
