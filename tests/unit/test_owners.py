from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nestling import owners
from nestling.owners import is_gone, this_owner, told


def test_no_two_names_are_the_same() -> None:
    assert this_owner() != this_owner()


def test_this_process_is_there() -> None:
    assert not is_gone(this_owner())


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells when a process began")  # noqa: PTH110
def test_a_killed_process_is_gone_also_before_it_is_reaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host, _, _, place, number = this_owner().rsplit(":", 4)
    name = f"{host}:{child.pid}:{owners._start(child.pid)}:{place}:{number}"
    assert not is_gone(name)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(name)
    child.communicate()
    assert is_gone(name)


def test_a_later_process_with_the_same_number_is_another() -> None:
    host, pid, _, place, number = this_owner().rsplit(":", 4)
    assert is_gone(f"{host}:{pid}:1:{place}:{number}")


def test_of_a_name_that_leases_once_had_nothing_is_known() -> None:
    assert not is_gone("board:999999999:17")
    assert told("board:17:2") == "process 17 on board"


def test_nothing_is_known_of_processes_elsewhere() -> None:
    assert not is_gone("a:host:with:colons:1:2:another-place:3")
    assert told("board:17:2:place:3") == "process 17 on board"
