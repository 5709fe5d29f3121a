"""What a worker's lodging on another machine is: the commands that a board's shell is given, and its replies.

A board runs one `sh` for each worker. It makes a private folder, says where it is, waits until the worker's
file lies there, starts it and, however it ends, removes the folder. A folder whose `sh` was itself killed is
removed by the next one. Every command is made of fixed words and quoted ones; none holds a newline, a single
quote, a backslash, or a `!` without a space behind it, so that login shells other than `sh` hand them on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.profile import worker
from nestling.profile.transport import DeviceError

GREETING = b"nestling-worker "
GO = b"go\n"
LONGEST_GREETING = 64 << 10
"""Bytes of what a board's login may print before the greeting."""
OLDEST_PYTHON = (3, 9)
NO_COMMAND = (126, 127)
"""With these a shell says that it could not run a command."""

_LODGE = (
    'umask 077; base=${6:-${TMPDIR:-/tmp}}; '
    'for old in "$base"/nestling-worker.*; do '
    'if [ -f "$old/owner" ] && [ -O "$old" ] && read -r owner < "$old/owner"; then '
    'kill -0 "$owner" 2>/dev/null || rm -rf -- "$old"; fi; done; '
    'found=$("$1" -c "$2" $5) || { code=$?; [ "$code" -gt 125 ] || code=72; exit "$code"; }; '
    'dir=$(mktemp -d "$base/nestling-worker.XXXXXXXXXX") || exit 73; echo $$ > "$dir/owner"; '
    'end() { rm -rf -- "$dir"; }; trap end EXIT; '
    'stop() { kill -9 "$worker" 2>/dev/null; exit 143; }; trap stop HUP INT TERM; '
    'echo "nestling-worker $dir $found"; '
    'read -r go || exit 74; [ "$go" = go ] || exit 74; '
    'exec 3<&0; TMPDIR="$dir" "$1" -c "$3" "$dir/$4" "$4" <&3 3<&- & worker=$! ; '
    'exec 3<&-; wait "$worker"; exit $?'
)  # fmt: skip
"""$1 is Python, $2 _LOOK, $3 _LAUNCH, $4 the worker's hash, $5 what it imports, $6 where folders are made."""
_KILL = 'read -r owner < "$1/owner" && kill "$owner"; exit 0'
_REMOVE = 'rm -rf -- "$1"'
_LOOK = (
    "import importlib.util, json, sys; "
    "sys.path[:] = [path for path in sys.path if path]; "
    'print(json.dumps({"python": list(sys.version_info[:3]), '
    '"missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]}))'
)
_LAUNCH = (
    "import hashlib, os, runpy, sys; "
    "sys.path[:] = [path for path in sys.path if path]; "
    'hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() == sys.argv[2] '
    'or sys.exit("the worker that arrived is not the one that was sent"); '
    "os.chdir(os.path.dirname(sys.argv[1])); "
    'runpy.run_path(sys.argv[1], run_name="__main__")'
)
_FOLDER = re.compile(r"/[A-Za-z0-9/._+-]*nestling-worker\.[A-Za-z0-9]+")


@dataclass(frozen=True, slots=True)
class Lodging:
    """A worker's private folder on a board, and what the board's Python is."""

    folder: str
    python: tuple[int, ...]
    missing: tuple[str, ...]


def worker_file() -> tuple[str, bytes]:
    """The worker's source, named by its SHA-256."""
    source = Path(worker.__file__).read_bytes()
    return hashlib.sha256(source).hexdigest(), source


def lodge_command(python: str, *, modules: Sequence[str], name: str, base: str = "") -> str:
    """What a board's shell runs for a worker: greets, waits for `GO`, becomes the worker's keeper.

    Args:
        python: its Python.
        modules: what the worker must be able to import.
        name: the worker's file, named by its hash.
        base: the folder for private folders; empty: the board's own.
    """
    return shlex.join(["sh", "-c", _LODGE, "sh", python, _LOOK, _LAUNCH, name, " ".join(modules), base])


def kill_command(folder: str) -> str:
    """What has the keeper of `folder` kill its worker and remove the folder.

    Its status is 0 also where there is no keeper any more: any other one is not the board's.
    """
    return shlex.join(["sh", "-c", _KILL, "sh", folder])


def remove_command(folder: str) -> str:
    """What removes `folder`."""
    return shlex.join(["sh", "-c", _REMOVE, "sh", folder])


def parse_greeting(line: bytes, *, where: str) -> Lodging:
    """What a board said before it waits for `GO`.

    Raises:
        DeviceError: this is no greeting, or its folder's name holds what a shell may take for something else.
    """
    greeting = f"{where} greeted with {line[:300].decode(errors='replace').strip()!r}"
    matched = re.fullmatch(
        r"(.*?nestling-worker\.[A-Za-z0-9]+) (\{.*\})", line[len(GREETING) :].decode(errors="replace").strip()
    )
    if matched is None:
        raise DeviceError(f"{greeting}, which names no folder and no Python")
    folder = matched[1]
    if not _FOLDER.fullmatch(folder):
        raise DeviceError(
            f"{greeting}; its folder {folder!r} must be a path from / of letters, digits and ._+- alone: "
            "set TMPDIR to such a one there"
        )
    try:
        said = json.loads(matched[2])
        return Lodging(folder, tuple(map(int, said["python"])), tuple(map(str, said["missing"])))
    except (ValueError, KeyError, TypeError):
        raise DeviceError(f"{greeting}, which does not tell its Python") from None


def check_python(lodging: Lodging, python: str, *, where: str) -> None:
    """Refuses a board whose Python cannot run the worker.

    Raises:
        DeviceError: it is too old, or lacks modules; the message says what to install.
    """
    version = ".".join(map(str, lodging.python))
    if lodging.python < OLDEST_PYTHON:
        raise DeviceError(
            f"{where}: {python} is Python {version}; the worker needs "
            f"{'.'.join(map(str, OLDEST_PYTHON))} or newer (name another with ?python=...)"
        )
    if lodging.missing:
        names = " ".join(lodging.missing)
        raise DeviceError(
            f"{where}: {python} (Python {version}) lacks {names}; there, run: "
            f"{python} -m pip install {names} (or name another Python with ?python=...)"
        )


def no_lodging(status: int | None, python: str, *, where: str) -> str:
    """Why a board that ended with `status` before its greeting has no place for a worker."""
    if status in NO_COMMAND:
        return (
            f"{where} has no {python}; install Python there, or say where it is with ?python=/path/to/python3"
        )
    if status == 72:
        return f"{where}: {python} there is no Python 3; name one with ?python=/path/to/python3"
    if status == 73:
        return f"{where}: no private folder could be made there (is its disk full?)"
    return f"{where}: the board's shell ended with status {status} before a worker could be started"


def shell_status(status: int | None) -> int | None:
    """A shell's exit status as a child's: minus the number of the signal that ended it."""
    return status if status is None or status <= 128 else 128 - status
