"""A private PostgreSQL server in a temporary folder, for benchmarks and tests of shared studies."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60.0
POLL_SECONDS = 0.05
INSTALLED = Path("/usr/lib/postgresql")
SYSTEM_USER = "postgres"


class NoServer(RuntimeError):  # noqa: N818 - it names what is wrong
    """There is no PostgreSQL to start; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, reached through a socket in `folder` and by no network."""

    folder: Path
    programs: Path

    def new_database(self, name: str) -> str:
        """The URL of the empty database `name`."""
        words = ["createdb", "-h", str(self.folder), "-U", "nestling", name]
        subprocess.run([self.programs / words[0], *words[1:]], check=True, capture_output=True)
        return f"postgresql://nestling@/{name}?host={self.folder}"


@contextmanager
def server() -> Iterator[Server]:
    """A server with its own data, stopped and removed at the end.

    PostgreSQL does not run as root: there it runs as the user that Debian's package makes.

    Raises:
        NoServer: it is not installed, or does not start.
    """
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    user = _user()
    if user is not None:
        os.chown(folder, user, -1)
    try:
        _run(
            [programs / "initdb", "-D", folder / "data", "-U", "nestling", "-A", "trust", "-E", "UTF8",
             "--locale=C"],
            user=user, folder=folder,
        )  # fmt: skip
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses="],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=user, cwd=folder,
            )  # fmt: skip
        try:
            _wait(process, programs, folder)
            yield Server(folder, programs)
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: the data are removed
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(INSTALLED.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not versions:
        raise NoServer("PostgreSQL is not installed (Debian's package is `postgresql`)")
    return versions[-1].parent


def _user() -> int | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(SYSTEM_USER).pw_uid
    except KeyError:
        raise NoServer(f"PostgreSQL does not run as root, and there is no user {SYSTEM_USER!r}") from None


def _run(words: list[str | Path], *, user: int | None, folder: Path) -> None:
    done = subprocess.run(words, user=user, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoServer(f"initdb failed: {done.stderr.strip()}")


def _wait(process: subprocess.Popen[bytes], programs: Path, folder: Path) -> None:
    until = time.monotonic() + START_SECONDS
    ready = [programs / "pg_isready", "-q", "-h", folder, "-U", "nestling", "-d", "postgres"]
    while subprocess.run(ready, check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > until:
            raise NoServer(f"PostgreSQL did not start: {(folder / 'log').read_text()[-500:]}")
        time.sleep(POLL_SECONDS)
