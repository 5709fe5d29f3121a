from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nestling.owners import place, this_process
from nestling.profile import DeviceError, WorkerLostError
from nestling.profile.transport_local import LocalProcess

ECHO = """
import os, sys
from nestling.profile import worker
stream = os.fdopen(0, "rb", buffering=0)
while (received := worker._receive(stream)) is not None:
    message, blob = received
    os.write(2, message.get("says", "").encode())
    content = worker.pack({"got": message["verb"]}, len(blob)) + blob
    while content:
        content = content[os.write(1, content):]
"""
"""A worker that sends back what it gets."""


def python(source: str) -> LocalProcess:
    return LocalProcess((sys.executable, "-c", source))


def ask(transport: LocalProcess, *, timeout_seconds: float = 20.0, blob: bytes = b"") -> bytes:
    answer = transport.exchange({"verb": "ask"}, blob, timeout_seconds=timeout_seconds)
    return bytes(answer.blob)


def gone(pid: int) -> bool:
    """Whether no process has the id, not even a dead one that nobody has waited for."""
    return not Path(f"/proc/{pid}").exists()


def test_a_blob_larger_than_any_pipe_comes_back_whole() -> None:
    transport, blob = python(ECHO), os.urandom(3_000_000)
    transport.start()
    assert ask(transport, blob=blob) == blob
    assert ask(transport, blob=b"") == b""
    transport.stop()
    assert not transport.running


def test_a_worker_s_current_folder_is_its_private_one() -> None:
    source = "import os, tempfile; os.write(2, f'{os.getcwd()} {tempfile.gettempdir()}'.encode())"
    transport = python(source)
    transport.start()
    with pytest.raises(WorkerLostError) as caught:
        ask(transport)
    here, private = str(caught.value).split()[-2:]
    assert here == private
    assert not Path(here).exists()


def test_a_search_path_holds_in_the_private_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["mine", "/of/all"]))
    transport = python("import os; os.write(2, os.environ['PYTHONPATH'].encode())")
    transport.start()
    with pytest.raises(WorkerLostError, match=re.escape(f"{Path('mine').resolve()}:/of/all")):
        ask(transport)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise SystemExit(3)", "exited with status 3 during 'ask'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV during 'ask'"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "SIGKILL (killed from outside, or out of",
        ),
        ("import os, time; os.close(1); time.sleep(60)", "closed its pipes during 'ask'"),
        ("print('Welcome to this board!' * 9, flush=True); input()", "no answer but a frame of"),
        ("import os; os.write(1, b'\\0' * 7 + b'\\2' + b'\\0' * 8 + b'[]'); input()", "no answer but []"),
        ("import os; os.write(1, b'\\0' * 16); input()", "no answer but a frame of 0 + 0 bytes"),
        ("import sys; sys.stderr.write('x' * 99999 + 'the cause'); sys.exit(1)", "xxthe cause"),
    ],
)
def test_how_a_worker_was_lost_is_said(source: str, said: str) -> None:
    transport = python(source)
    transport.start()
    pid = transport.pid
    assert pid is not None
    with pytest.raises(WorkerLostError) as caught:
        ask(transport)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not transport.running
    assert gone(pid)


@pytest.mark.parametrize("blob", [b"", bytes(3_000_000)])
def test_a_worker_that_does_not_answer_is_killed_in_time(blob: bytes) -> None:
    # With SIGTERM ignored and, in one case, a pipe that it never empties.
    transport = python("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    transport.start()
    pid, begun = transport.pid, time.monotonic()
    assert pid is not None
    with pytest.raises(WorkerLostError, match=r"no answer to 'ask' within 0\.2 s; the worker was killed"):
        ask(transport, timeout_seconds=0.2, blob=blob)
    assert time.monotonic() - begun < 2.2
    assert gone(pid)


def test_a_killed_worker_s_temporary_files_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, tempfile; print(tempfile.mkstemp()[1], flush=True); input(); os.kill(os.getpid(), 9)"
    mine, elsewhere = "-".join(this_process()), f"{2**30}-1-elsewhere"
    kept = [tmp_path / f"nestling-worker-{of}" for of in (f"{mine}-x", f"{elsewhere}-x", "gone")]
    with subprocess.Popen(["true"]) as ended:
        pass
    stale = tmp_path / f"nestling-worker-{ended.pid}-1-{place()}-x"
    for folder in (*kept, stale):
        folder.mkdir()
    transport = python(code)
    transport.start()
    left = Path(transport.line(until=time.monotonic() + 20).decode().strip())
    assert left.exists()
    assert left.parent.parent == tmp_path
    assert left.parent.stat().st_mode & 0o777 == 0o700
    transport.send(b"die\n")
    with pytest.raises(WorkerLostError):
        ask(transport)
    assert {*tmp_path.iterdir()} == {*kept}


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker() -> None:
    transport = python("input()")
    transport.start()
    assert transport.pid is not None
    assert os.getsid(transport.pid) != os.getsid(0)
    transport.stop()


def test_a_lost_worker_can_be_replaced() -> None:
    transport = python(ECHO)
    transport.start()
    assert transport.pid is not None
    os.kill(transport.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        ask(transport)
    with pytest.raises(WorkerLostError, match="no worker runs"):
        ask(transport)
    transport.start()
    assert ask(transport, blob=b"again") == b"again"
    transport.stop()


def test_a_worker_that_died_unasked_is_noticed() -> None:
    transport = python("pass")
    transport.start()
    deadline = time.monotonic() + 10
    while transport.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not transport.running


def test_ctrl_c_in_the_middle_of_an_answer_ends_the_worker() -> None:
    # Otherwise the late answer would be taken for that to the next question.
    transport = python("import time; time.sleep(60)")
    transport.start()
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask(transport)
    timer.join()
    assert not transport.running


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(DeviceError, match="no-such-python"):
        LocalProcess(("no-such-python",)).start()


def test_what_native_code_prints_does_not_land_between_frames() -> None:
    noisy = (
        "import os; from nestling.profile import worker\n"
        "worker.Worker.bye = lambda *_: ({'printed': os.write(1, b'noise')}, b'')\n"
        "worker.main()"
    )
    transport = python(noisy)
    transport.start()
    answer = transport.exchange({"verb": "bye", "limit_seconds": 20}, b"", timeout_seconds=20)
    assert answer.message == {"printed": 5}
    transport.stop()


def test_a_search_that_is_killed_leaves_no_worker() -> None:
    code = (
        "import os, signal\nfrom nestling.profile.transport_local import LocalProcess\n"
        "transport = LocalProcess(); transport.start(); print(transport.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    status, deadline = Path(f"/proc/{int(printed.stdout)}/stat"), time.monotonic() + 10

    def runs() -> bool:
        # Dead is enough: the system's first process, not this one, has to reap it.
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

    while runs() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs()
