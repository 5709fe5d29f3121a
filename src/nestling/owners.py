"""Owners: names for processes by which another one can tell whether they have ended."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import uuid
from functools import cache
from pathlib import Path

_numbers = itertools.count(1)


def this_owner() -> str:
    """A name of this process that no other has and no earlier call gave: `host:pid:start:place:number`."""
    return ":".join([socket.gethostname(), *this_process(), str(next(_numbers))])


def this_process() -> tuple[str, str, str]:
    """The number, the start and the place of this process, by which `has_ended` knows it."""
    pid = os.getpid()
    return str(pid), _start(pid), place()


def told(owner: str) -> str:
    """`owner` for a person: the host and the number of the process."""
    host, pid, *_ = owner.rsplit(":", 4 if _is_whole(owner) else 2)
    return f"process {pid} on {host}"


def is_gone(owner: str) -> bool:
    """Whether the process that `this_owner` named has ended, as far as can be told from here.

    Of a process of another machine, container or boot nothing can be told: it counts as there. So does one of
    which an earlier version wrote the name.
    """
    if not _is_whole(owner):
        return False
    _, pid, start, where, _ = owner.rsplit(":", 4)
    return has_ended(int(pid), start, where)


def has_ended(pid: int, start: str, where: str) -> bool:
    """Whether the process that `this_process` told so has ended, as far as can be told from here."""
    return where == place() and _start(pid) != start


@cache
def place() -> str:
    """What processes that see each other's numbers share: one boot of one machine or container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.is_symlink():
        facts = f"{boot.read_text().strip()} {namespace.readlink()}"
    else:
        facts = f"{uuid.getnode()} {socket.gethostname()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _start(pid: int) -> str:
    """When the process `pid` began, in the machine's own unit; empty where it has ended, reaped or not.

    A number is given again to a later process, which began at another time.
    """
    if not Path("/proc/self/stat").exists():
        return "there" if _exists(pid) else ""
    try:
        # the name, in brackets, may hold anything
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else facts[18]


def _is_whole(owner: str) -> bool:
    """Whether `owner` is a name as `this_owner` makes it; names that leases once had end with the start."""
    parts = owner.rsplit(":", 4)
    return len(parts) == 5 and parts[1].isdecimal()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
