"""LocalProcess: a worker in a child process of this one."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nestling.profile import worker
from nestling.profile.processes import private_folder
from nestling.profile.transport import (
    CHUNK,
    STDERR_KEPT,
    STOP_SECONDS,
    Answer,
    DeviceError,
    WorkerLostError,
    ending,
    parse_answer,
    parse_lengths,
    with_last_words,
)


class LocalProcess:
    """A worker in a child process of this one.

    Args:
        command: what is run.
        read_status: what the child's status says of the worker, where a program stands between them.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-P", worker.__file__),
        *,
        read_status: Callable[[int], int | None] = int,
    ) -> None:
        self.command = tuple(command)
        self.status: int | None = None
        """How the last child that was lost had ended, as `read_status` has it; None: it had not."""
        self._read_status = read_status
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = bytearray()
        self._folder: Path | None = None

    @property
    def running(self) -> bool:
        """Whether the child process is alive."""
        if self._process is not None and self._process.poll() is not None:
            self._close()
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the child process.

        Raises:
            DeviceError: the command cannot be run.
        """
        self.stop()
        self._stderr.clear()
        self._folder = private_folder()  # a worker that is killed cannot remove its temporary files itself
        try:
            # A session of its own: Ctrl-C is for the search, which then ends its workers in order.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                # What a runtime looks for beside the current folder, or lays there, is not the user's.
                cwd=self._folder,
                env={**os.environ, **_search_path(), "TMPDIR": str(self._folder)},
            )
        except OSError as error:
            self._close()
            raise DeviceError(
                f"the worker cannot be started with {' '.join(self.command)}: {error}"
            ) from error
        for pipe in self._pipes(self._process):
            os.set_blocking(pipe.fileno(), False)

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        """The worker's answer to `request` and `blob`.

        Raises:
            WorkerLostError: it died, did not answer within `timeout_seconds`, or sent what is no answer; it
                is killed then.
        """
        process = self._process
        if process is None:
            raise WorkerLostError("no worker runs")
        answer: Answer | None = None
        try:
            answer = self._exchange(process, request, blob, time.monotonic() + timeout_seconds)
        except TimeoutError:
            cause = f"no answer to {request['verb']!r} within {timeout_seconds:.3g} s; the worker was killed"
            raise self._lost(cause) from None
        except (EOFError, BrokenPipeError):
            # It may have closed its pipes and live on: what the system says of it is not waited for long.
            try:
                self.status = self._read_status(process.wait(STOP_SECONDS))
            except subprocess.TimeoutExpired:
                self.status = None
            raise self._lost(f"the worker {ending(self.status)} during {request['verb']!r}") from None
        except ValueError as error:
            raise self._lost(f"the worker sent no answer but {error}") from None
        finally:
            # Ctrl-C in the middle of an answer: the rest of it must not be taken for the next one.
            if answer is None:
                self._kill()
        return answer

    def line(self, *, until: float) -> bytes:
        """The next line that the child prints, up to the time `until` of the monotonic clock.

        It is read byte by byte, so that nothing of a frame that follows is taken. At the child's end it is
        empty or has no newline.

        Raises:
            WorkerLostError: there is no child.
            TimeoutError: the line is not whole by then.
        """
        if self._process is None:
            raise WorkerLostError("no worker runs")
        _, stdout, _ = self._pipes(self._process)
        said = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not said.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                got = os.read(stdout.fileno(), 1)
                if not got:
                    break
                said += got
        return bytes(said)

    def send(self, content: bytes) -> None:
        """Writes a few bytes, fewer than a pipe holds, to the child's stdin.

        Raises:
            WorkerLostError: the child is gone.
        """
        try:
            if self._process is not None:
                os.write(self._pipes(self._process)[0].fileno(), content)
                return
        except BrokenPipeError:
            pass
        raise self._lost("the worker was gone before it began")

    def ended(self) -> tuple[int | None, bytes]:
        """The status of a child that has closed its pipes, and its last words; it is killed if need be."""
        process = self._process
        if process is None:
            return None, b""
        try:
            self.status = self._read_status(process.wait(STOP_SECONDS))
        except subprocess.TimeoutExpired:
            self.status = None
        self._kill()
        return self.status, bytes(self._stderr)

    def stop(self) -> None:
        """Ends the child: by closing its stdin, and by SIGKILL if it does not go within a second."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        self._close()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._close()

    def _lost(self, cause: str) -> WorkerLostError:
        """The error to raise for `cause`, once the worker is gone and its last words have been read."""
        self._kill()
        return WorkerLostError(with_last_words(cause, self._stderr))

    def _close(self) -> None:
        """Reaps the child, which has ended or is about to, and closes its pipes."""
        process, self._process = self._process, None
        folder, self._folder = self._folder, None
        if process is not None:
            process.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if process is None:
            return
        if process.stderr is not None:
            self._drain(process.stderr)
        for pipe in self._pipes(process):
            pipe.close()

    @staticmethod
    def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("the worker was started without pipes")
        return process.stdin, process.stdout, process.stderr

    def _exchange(
        self,
        process: subprocess.Popen[bytes],
        request: Mapping[str, Any],
        blob: bytes | memoryview,
        deadline: float,
    ) -> Answer:
        stdin, stdout, stderr = self._pipes(process)
        waiting = [memoryview(worker.pack(request, len(blob))), memoryview(blob)]
        frame = _Frame()
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while not frame.complete:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                for key, _ in selector.select(left):
                    if key.fileobj is stdin:
                        waiting[0] = waiting[0][os.write(stdin.fileno(), waiting[0][:CHUNK]) :]
                        while waiting and not waiting[0]:
                            waiting.pop(0)
                        if not waiting:
                            selector.unregister(stdin)
                    elif key.fileobj is stderr:
                        if not self._drain(stderr):
                            selector.unregister(stderr)
                    else:
                        frame.fill(stdout.fileno())
        return frame.answer()

    def _drain(self, stderr: IO[bytes]) -> bool:
        """Whether more may come, after what is there has been added to the tail that is kept."""
        while True:
            try:
                got = os.read(stderr.fileno(), CHUNK)
            except BlockingIOError:
                return True
            self._stderr = (self._stderr + got)[-STDERR_KEPT:]
            if not got:
                return False


def _search_path() -> dict[str, str]:
    """Python's own search path, if there is one, for a child in another folder than this process."""
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, given.split(os.pathsep)))} if given else {}


class _Frame:
    """An answer on its way in: lengths, JSON object, blob."""

    def __init__(self) -> None:
        self._parts = [bytearray(worker.LENGTHS.size)]
        self._filled = 0

    @property
    def complete(self) -> bool:
        return len(self._parts) == 3 and self._filled == len(self._parts[2])

    def fill(self, descriptor: int) -> None:
        """Takes in what is there to read, and no more than belongs to this frame.

        Raises:
            EOFError: the other side has closed.
            ValueError: lengths that no answer has.
        """
        part = self._parts[-1]
        got = os.readv(descriptor, [memoryview(part)[self._filled :]])
        if got == 0:
            raise EOFError
        self._filled += got
        if self._filled < len(part) or len(self._parts) == 3:
            return
        self._filled = 0
        json_bytes, blob_bytes = parse_lengths(self._parts[0])
        self._parts.append(bytearray(json_bytes if len(self._parts) == 1 else blob_bytes))

    def answer(self) -> Answer:
        """The answer, once complete.

        Raises:
            ValueError: the JSON is none, or no object.
        """
        return parse_answer(self._parts[1], self._parts[2])
