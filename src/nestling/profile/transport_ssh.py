"""SshProcess: a worker on a board that ssh reaches, which needs sshd, SFTP and Python, and no open port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from nestling.profile import worker
from nestling.profile.address import SshPlace
from nestling.profile.transport import (
    CHUNK,
    STDERR_KEPT,
    STOP_SECONDS,
    Answer,
    DeviceError,
    LineLostError,
    WorkerLostError,
    ending,
    parse_answer,
    parse_lengths,
    with_last_words,
)
from nestling.profile.transport_remote import (
    GO,
    GREETING,
    LONGEST_GREETING,
    Lodging,
    check_python,
    kill_command,
    lodge_command,
    no_lodging,
    parse_greeting,
    shell_status,
    worker_file,
)

if TYPE_CHECKING:
    import asyncssh

CONNECT_SECONDS = 30.0
"""What a connection, with its keys and the board's shell, may take."""
KILL_SECONDS = 3.0
"""What killing a worker on a board may take; a worker that outlives it ends itself, see worker.py."""
ALIVE_SECONDS = 5.0
"""A silent line is asked so often whether it is alive; three times without an answer, and it is lost."""

T = TypeVar("T")


class SshProcess:
    """A worker on the board at `place`.

    The board's key must be in ~/.ssh/known_hosts, and the user's own in ~/.ssh or in an agent; ~/.ssh/config
    is read. The worker's file lies in a private folder while it runs.

    Args:
        place: where.
        modules: what the worker must be able to import there.
    """

    def __init__(self, place: SshPlace, *, modules: Sequence[str] = ("numpy", "onnxruntime")) -> None:
        self.place = place
        self.modules = tuple(modules)
        self._loop: _LoopThread | None = None
        self._lodger: _Lodger | None = None
        self._orphan: str | None = None
        """The folder of a worker that is not known to have ended: it may still be at work on the board."""

    @property
    def running(self) -> bool:
        """Whether the worker is alive, as far as the line tells."""
        if self._lodger is not None and self._lodger.ended:
            self._close()
        return self._lodger is not None

    @property
    def folder(self) -> str | None:
        """The worker's private folder on the board, while there is one."""
        return self._lodger.lodging.folder if self._lodger is not None else None

    def start(self) -> None:
        """Connects and starts a worker.

        Raises:
            LineLostError: the board cannot be reached, or does not end a worker that was cut off before.
            DeviceError: asyncssh is not installed; the board's key is unknown or has changed, or ours is
                refused; its Python is too old or lacks what the worker needs; it has no SFTP.
        """
        self.stop()
        _require_asyncssh()
        self._loop = _LoopThread(f"nestling {self.place}")
        try:
            self._lodger = self._loop.run(_move_in(self.place, self.modules, orphan=self._orphan))
            self._orphan = None
        except BaseException:
            self._close()
            raise

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        """The worker's answer to `request` and `blob`.

        Raises:
            LineLostError: the connection was lost, or the board does not answer at all.
            WorkerLostError: it died, did not answer within `timeout_seconds`, or sent what is no answer; it
                is killed then.
        """
        if self._loop is None or self._lodger is None:
            raise WorkerLostError("no worker runs")
        answer: Answer | None = None
        try:
            answer = self._loop.run(self._lodger.exchange(request, blob, timeout_seconds))
        finally:
            # Also where Ctrl-C came in the middle: the rest of an answer must not be taken for the next one.
            if answer is None:
                self._close()
        return answer

    def stop(self) -> None:
        """Ends the worker, which then leaves nothing on the board, and the connection."""
        if self._loop is not None and self._lodger is not None:
            self._loop.run(self._lodger.move_out())
        self._close()

    def _close(self) -> None:
        loop, lodger = self._loop, self._lodger
        self._loop = self._lodger = None
        if loop is None:
            return
        try:
            if lodger is not None:
                self._orphan = lodger.lodging.folder
                if loop.run(lodger.evict()):
                    self._orphan = None
        finally:
            loop.close()


class _LoopThread:
    """An event loop in a thread of its own, for whoever has none."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled where the wait for it is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends the loop, what still runs in it, and the thread."""

        async def settle() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(settle(), self._loop).result(STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Lodger:
    """A worker that lives on a board, in the event loop's terms."""

    def __init__(
        self,
        place: SshPlace,
        connection: asyncssh.SSHClientConnection,
        process: asyncssh.SSHClientProcess[bytes],
        lodging: Lodging,
    ) -> None:
        self.place, self.lodging = place, lodging
        self._connection, self._process = connection, process
        self._stderr = bytearray()
        self._listening = asyncio.ensure_future(self._listen())

    @property
    def ended(self) -> bool:
        return self._process.exit_status is not None or self._process.channel.is_closing()

    async def exchange(self, request: Mapping[str, Any], blob: bytes | memoryview, seconds: float) -> Answer:
        import asyncssh

        sending = asyncio.ensure_future(self._send(request, blob))
        try:
            async with asyncio.timeout(seconds):
                return await self._receive()
        except TimeoutError:
            cause = f"no answer to {request['verb']!r} within {seconds:.3g} s"
            if not await self.evict():
                raise LineLostError(
                    f"the line to {self.place} was lost: {cause}, nor did the board say within "
                    f"{KILL_SECONDS:.3g} s that it killed the worker"
                ) from None
            raise WorkerLostError(with_last_words(f"{cause}; the worker was killed", self._stderr)) from None
        except (EOFError, OSError, asyncssh.Error):
            raise await self._lost(str(request["verb"])) from None
        except ValueError as error:
            raise WorkerLostError(
                with_last_words(f"the worker sent no answer but {error}", self._stderr)
            ) from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def move_out(self) -> None:
        """Lets the worker go, as a closed stdin tells it to."""
        with contextlib.suppress(Exception):
            self._process.stdin.write_eof()
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait_closed()

    async def evict(self) -> bool:
        """Kills the worker where it still runs, gives its keeper time to tidy up, and hangs up.

        Returns:
            Whether the worker is known to have ended.
        """
        killed = False
        if not self.ended:
            killed = await _killed(self._connection, self.lodging.folder)
            if killed:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(KILL_SECONDS):
                        await self._process.wait_closed()
        await _hang_up(self._connection)
        self._listening.cancel()
        return killed or self._process.exit_status is not None or self._process.exit_signal is not None

    async def _lost(self, verb: str) -> WorkerLostError:
        """The error to raise for a worker that is heard no more."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait_closed()
        with contextlib.suppress(Exception):  # its last words come apart from the news of its end
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.shield(self._listening)
        if self._process.exit_status is None and self._process.exit_signal is None:
            if self._connection.is_closed() or self._process.channel.is_closing():
                return LineLostError(f"the line to {self.place} was lost during {verb!r}")
            return WorkerLostError(
                with_last_words(f"the worker {ending(None)} during {verb!r}", self._stderr)
            )
        status = shell_status(self._process.returncode)
        return WorkerLostError(with_last_words(f"the worker {ending(status)} during {verb!r}", self._stderr))

    async def _send(self, request: Mapping[str, Any], blob: bytes | memoryview) -> None:
        stdin = self._process.stdin
        stdin.write(worker.pack(request, len(blob)))
        for start in range(0, len(blob), CHUNK):
            stdin.write(bytes(blob[start : start + CHUNK]))
            await stdin.drain()

    async def _receive(self) -> Answer:
        stdout = self._process.stdout
        json_bytes, blob_bytes = parse_lengths(await stdout.readexactly(worker.LENGTHS.size))
        text = await stdout.readexactly(json_bytes)
        return parse_answer(text, await stdout.readexactly(blob_bytes) if blob_bytes else b"")

    async def _listen(self) -> None:
        while said := await self._process.stderr.read(CHUNK):
            self._stderr[:] = (self._stderr + said)[-STDERR_KEPT:]


def _require_asyncssh() -> None:
    try:
        import asyncssh  # noqa: F401 - it is used further down, where it is known to be there
    except ImportError:
        raise DeviceError("devices behind ssh need asyncssh; pip install 'nestling[ssh]'") from None


async def _move_in(place: SshPlace, modules: Sequence[str], *, orphan: str | None) -> _Lodger:
    """A worker on the board, which was just started; one that was cut off before is ended first.

    Left to itself it would work on until it wants to answer, beside the new one, and disturb its timing.
    """
    connection = await _call(place)
    try:
        if orphan is not None and not await _killed(connection, orphan):
            raise LineLostError(
                f"{place}: the worker in {orphan}, which may still run there, could not be ended within "
                f"{KILL_SECONDS:.3g} s"
            )
        return await _lodge(place, connection, modules)
    except BaseException:
        await _hang_up(connection)
        raise


async def _killed(connection: asyncssh.SSHClientConnection, folder: str) -> bool:
    """Whether the board says that the keeper of `folder` was told to kill its worker, or is gone."""
    try:
        async with asyncio.timeout(KILL_SECONDS):
            done = await connection.run(kill_command(folder), check=False)
    except Exception:  # the line may end in many ways
        return False
    return done.exit_status == 0


async def _lodge(
    place: SshPlace, connection: asyncssh.SSHClientConnection, modules: Sequence[str]
) -> _Lodger:
    import asyncssh

    name, source = worker_file()
    command = lodge_command(place.python, modules=modules, name=name)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            process = await connection.create_process(command, encoding=None)
            lodging = await _greeted(place, process)
            check_python(lodging, place.python, where=str(place))
            async with (
                connection.start_sftp_client() as sftp,
                sftp.open(f"{lodging.folder}/{name}", "wb") as file,
            ):
                await file.write(source)
            process.stdin.write(GO)
        return _Lodger(place, connection, process, lodging)
    except TimeoutError:
        cause = f"{place}: no worker was there after {CONNECT_SECONDS:.0f} s"
        raise LineLostError(cause) from None
    except asyncssh.SFTPError as error:
        raise DeviceError(f"{place}: the worker's file cannot be laid down: {error}") from None
    except asyncssh.ChannelOpenError as error:
        raise DeviceError(
            f"{place}: it opens no session with SFTP ({error}); install sftp-server there"
        ) from None
    except (OSError, asyncssh.Error) as error:
        raise LineLostError(f"the line to {place} was lost: {error}") from None


async def _call(place: SshPlace) -> asyncssh.SSHClientConnection:
    """The connection; what went wrong is said so that a person can mend it."""
    import asyncssh

    given: dict[str, Any] = {"keepalive_interval": ALIVE_SECONDS, "keepalive_count_max": 3}
    given |= {} if place.port is None else {"port": place.port}
    given |= {} if place.user is None else {"username": place.user}
    port = "" if place.port is None else f"-p {place.port} "
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncssh.connect(place.host, **given)
    except asyncssh.HostKeyNotVerifiable as error:
        raise DeviceError(
            f"{place}: its host key is not the one in ~/.ssh/known_hosts, or none is there ({error}). "
            f"Compare the board's own (there: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub) with what "
            f"`ssh {port}{place.host}` shows and let ssh add it"
        ) from None
    except asyncssh.PermissionDenied as error:
        raise DeviceError(
            f"{place}: no key of ours is accepted ({error}); have one in ~/.ssh or an agent, and put it on "
            f"the board: ssh-copy-id {port}{place.host}"
        ) from None
    except TimeoutError:
        raise LineLostError(f"{place} does not answer within {CONNECT_SECONDS:.0f} s") from None
    except (OSError, asyncssh.Error) as error:
        raise LineLostError(f"{place} cannot be reached: {error}") from None


async def _greeted(place: SshPlace, process: asyncssh.SSHClientProcess[bytes]) -> Lodging:
    """What the board says of the folder that it made, past what its login prints."""
    heard = 0
    while heard < LONGEST_GREETING:
        line = await process.stdout.readline()
        heard += len(line)
        if line.startswith(GREETING):
            return parse_greeting(line, where=str(place))
        if not line:
            await process.wait_closed()
            words = await process.stderr.read(STDERR_KEPT)
            raise DeviceError(
                with_last_words(no_lodging(process.exit_status, place.python, where=str(place)), words)
            )
    raise DeviceError(f"{place}: its login prints more than {LONGEST_GREETING} bytes before the worker")


async def _hang_up(connection: asyncssh.SSHClientConnection) -> None:
    connection.close()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(STOP_SECONDS):
            await connection.wait_closed()
    connection.abort()
