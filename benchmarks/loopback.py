"""A board on this machine: an ssh server on 127.0.0.1 that runs what it is told, and can lose its lines.

It stands for a real sshd where there is none, in tests and benchmarks. Keys are made in a folder that serves
as the client's home: `.ssh` there holds the client's key and the host keys of all boards that it was told.

    python benchmarks/loopback.py FOLDER

serves until its stdin is closed; the first line on stdout is the port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import asyncssh

HOST = "127.0.0.1"
ENDING_SECONDS = 3.0
"""What commands may take to end when the board is closed."""
T = TypeVar("T")


class _Server(asyncssh.SSHServer):
    def __init__(self, board: Board) -> None:
        self._board = board

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._board.lines.add(conn)
        self._conn = conn

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncssh calls it so
        self._board.lines.discard(self._conn)


class Board:
    """An ssh server in a thread of its own, on a free port.

    Args:
        home: the client's home; keys are made there, and the board's is added to its known_hosts.
        temporary: the board's own folder for temporary files.
        environment: what its commands find in theirs, over this process's.
        known: whether the client is told the board's key.
        port: 0 is a free one.
    """

    def __init__(
        self,
        home: Path,
        temporary: Path,
        *,
        environment: Mapping[str, str] | None = None,
        known: bool = True,
        host: str = HOST,
        port: int = 0,
    ) -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        self.home, self.temporary = home, temporary
        self.environment = {**os.environ, "TMPDIR": str(temporary), **(environment or {})}
        self.lines: set[asyncssh.SSHServerConnection] = set()
        self.children: set[int] = set()
        self.commands: list[str] = []
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        client_key(home)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.host, self.port = host, port
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self.open()
        if known:
            public = self._host_key.export_public_key().decode().strip()
            with (home / ".ssh" / "known_hosts").open("a") as file:
                file.write(f"[{host}]:{self.port} {public}\n")

    @property
    def address(self) -> str:
        """The board's part of a device's address; this Python's, which has the runtime."""
        return f"ssh://{self.host}:{self.port}"

    def device(self, runtime: str = "ort:cpu", **options: str) -> str:
        """The address of its device, which uses this process's Python."""
        options = {"python": sys.executable, **options}
        return f"{self.address}/{runtime}?{'&'.join(f'{name}={value}' for name, value in options.items())}"

    def open(self) -> None:
        """Listens, on the port that it had if it had one."""
        self._acceptor = self._run(self._listen())
        self.port = self._acceptor.get_port()

    def shut(self) -> None:
        """Stops listening and cuts all lines, as a board does whose plug was pulled; children live on."""

        async def close() -> None:
            if self._acceptor is not None:
                self._acceptor.close()

        self._run(close())  # in the server's own thread, which may just be taking leave of a line
        self.cut()

    def cut(self) -> int:
        """Cuts every line without a word: how many there were."""

        async def abort() -> int:
            lines = list(self.lines)
            for line in lines:
                line.abort()
            return len(lines)

        return self._run(abort())

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Hears and says nothing meanwhile; then its lines are cut, and what was under way there is lost."""
        held, going_on = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            going_on.wait()
            for line in list(self.lines):
                line.abort()

        self._loop.call_soon_threadsafe(hold)
        held.wait()
        try:
            yield
        finally:
            going_on.set()

    def close(self) -> None:
        """Stops listening, ends its commands and the thread."""
        self.shut()
        until = time.monotonic() + ENDING_SECONDS
        while self.children and time.monotonic() < until:  # their stdin is closed
            time.sleep(0.01)
        for child in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        while self.children:
            time.sleep(0.01)

        async def settle() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self._run(settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lodgings(self) -> list[Path]:
        """The workers' private folders that are there."""
        return sorted(self.temporary.glob("nestling-worker.*"))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            lambda: _Server(self),
            self.host,
            self.port,
            server_host_keys=[self._host_key],
            authorized_client_keys=str(self.home / ".ssh" / "authorized_keys"),
            process_factory=self._serve,
            sftp_factory=True,
            encoding=None,
        )

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        self.commands.append(process.command or "")
        child = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", process.command or "", env=self.environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.children.add(child.pid)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        feeding = asyncio.ensure_future(_feed(process, child.stdin))
        telling = [
            asyncio.ensure_future(_tell(child.stdout, process.stdout)),
            asyncio.ensure_future(_tell(child.stderr, process.stderr)),
        ]
        try:
            await asyncio.gather(*telling)
            status = await child.wait()
        finally:
            self.children.discard(child.pid)
            feeding.cancel()
        with contextlib.suppress(OSError, asyncssh.Error):
            process.exit(status if status >= 0 else 128 - status)


async def _feed(process: asyncssh.SSHServerProcess[bytes], stdin: asyncio.StreamWriter) -> None:
    try:
        while content := await process.stdin.read(1 << 18):
            stdin.write(content)
            await stdin.drain()
    except (OSError, asyncssh.Error):
        pass
    finally:
        stdin.close()


async def _tell(source: asyncio.StreamReader, target: asyncssh.SSHWriter[bytes]) -> None:
    while content := await source.read(1 << 18):
        with contextlib.suppress(OSError, asyncssh.Error):
            target.write(content)
            await target.drain()


def client_key(home: Path) -> None:
    """Makes the client's key in `home`, where there is none, and lets boards accept it."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder / "id_ed25519").exists():
        return
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "id_ed25519")
    (folder / "id_ed25519").chmod(0o600)
    key.write_public_key(folder / "authorized_keys")


@contextlib.contextmanager
def boards(home: Path, count: int) -> Iterator[list[Board]]:
    """`count` boards whose client lives in `home`."""
    opened = [Board(home, home / f"board{number}") for number in range(count)]
    try:
        yield opened
    finally:
        for board in opened:
            board.close()


def main() -> None:
    """Serves until stdin is closed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("home", type=Path, metavar="FOLDER")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--temporary", type=Path, metavar="FOLDER", help="[default: FOLDER/board]")
    options = parser.parse_args()
    board = Board(options.home, options.temporary or options.home / "board", host=options.host)
    print(board.port, flush=True)
    sys.stdin.read()
    board.close()


if __name__ == "__main__":
    main()
