"""AdbProcess: a worker on an Android device, through the `adb` program.

It never ran on hardware: the tests put a program in adb's place that runs what it is told on this machine.

`adb shell -T` (the shell protocol of Android 7 and later) carries stdin, stdout and stderr apart and as they
are, and the exit status. The device needs a Python with NumPy and onnxruntime that adb's user may run; name
it with `?python=`.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nestling.profile.address import AdbPlace
from nestling.profile.transport import (
    Answer,
    DeviceError,
    LineLostError,
    WorkerLostError,
    with_last_words,
)
from nestling.profile.transport_local import LocalProcess
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

CONNECT_SECONDS = 60.0
"""What adb, its server's start included, and the device's shell may take."""
KILL_SECONDS = 10.0
TEMPORARY = "/data/local/tmp"
"""Where Android lets the shell's user keep files."""
LINE_LOST = 255
"""The status of an `adb shell` that cannot reach its device, or loses it."""


class AdbProcess:
    """A worker on the Android device at `place`.

    Args:
        place: which.
        modules: what the worker must be able to import there.
        adb: the program.
        temporary: where private folders are made on the device.
    """

    def __init__(
        self,
        place: AdbPlace,
        *,
        modules: Sequence[str] = ("numpy", "onnxruntime"),
        adb: str = "adb",
        temporary: str = TEMPORARY,
    ) -> None:
        self.place = place
        self.modules = tuple(modules)
        self.adb, self.temporary = adb, temporary
        self._shell: LocalProcess | None = None
        self._lodging: Lodging | None = None
        self._orphan: str | None = None
        """The folder of a worker that is not known to have ended: it may still be at work there."""

    @property
    def running(self) -> bool:
        """Whether the worker is alive, as far as adb tells."""
        return self._shell is not None and self._shell.running

    @property
    def folder(self) -> str | None:
        """The worker's private folder on the device, while there is one."""
        return None if self._lodging is None else self._lodging.folder

    def start(self) -> None:
        """Starts a worker.

        Raises:
            LineLostError: adb does not reach the device, or a worker that was cut off there does not end.
            DeviceError: adb is not there or cannot be run; the device's Python is too old or lacks what the
                worker needs.
        """
        self.stop()
        name, source = worker_file()
        command = lodge_command(self.place.python, modules=self.modules, name=name, base=self.temporary)
        shell = LocalProcess((*self._words(), "shell", "-T", command), read_status=_worker_status)
        try:
            shell.start()
        except DeviceError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError) and cause.filename == self.adb:
                install = "install Android's platform tools (apt install adb)"
                raise DeviceError(f"{self.place}: there is no {self.adb}; {install}") from None
            raise DeviceError(f"{self.place}: {error}") from None
        self._shell = shell
        try:
            until = time.monotonic() + CONNECT_SECONDS
            self._lodging = self._greeted(shell, until)
            if self._orphan is not None:  # a worker that was cut off would disturb the new one
                if not self._killed(self._orphan):
                    told = f"the worker in {self._orphan}, which may still run there, could not be ended"
                    raise LineLostError(f"{self.place}: {told}")
                self._orphan = None
            check_python(self._lodging, self.place.python, where=str(self.place))
            self._push(source, f"{self._lodging.folder}/{name}")
            shell.send(GO)
        except BaseException:
            self._evict()
            raise

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        """The worker's answer to `request` and `blob`.

        Raises:
            LineLostError: adb lost the device, or the worker could not be killed there.
            WorkerLostError: it died, did not answer within `timeout_seconds`, or sent what is no answer; it
                is killed then.
        """
        if self._shell is None:
            raise WorkerLostError("no worker runs")
        try:
            return self._shell.exchange(request, blob, timeout_seconds=timeout_seconds)
        except WorkerLostError as error:
            cut = self._shell.status == LINE_LOST
            if not self._evict() or cut:
                raise LineLostError(f"the line to {self.place} was lost: {error}") from None
            raise
        except BaseException:
            self._evict()
            raise

    def stop(self) -> None:
        """Ends the worker, which then leaves nothing on the device."""
        if self._shell is not None:
            self._shell.stop()
        self._shell = self._lodging = None

    def _evict(self) -> bool:
        """Kills the worker, here and there: whether it is known to have ended there."""
        folder = self.folder
        killed = folder is None or self._killed(folder)
        if not killed and self._orphan is None:  # else the new one has no worker yet
            self._orphan = folder
        self.stop()
        return killed

    def _killed(self, folder: str) -> bool:
        """Whether the device says that the keeper of `folder` was told to kill its worker, or is gone."""
        done = self._run("shell", "-T", kill_command(folder))
        return done is not None and done.returncode == 0

    def _greeted(self, shell: LocalProcess, until: float) -> Lodging:
        heard = 0
        while heard < LONGEST_GREETING:
            try:
                line = shell.line(until=until)
            except TimeoutError:
                raise LineLostError(f"{self.place} does not answer within {CONNECT_SECONDS:.0f} s") from None
            if line.startswith(GREETING):
                return parse_greeting(line, where=str(self.place))
            heard += len(line)
            if not line:
                status, words = shell.ended()
                if status in (1, LINE_LOST):  # 1: adb never reached it; the shell's own statuses are others
                    raise LineLostError(with_last_words(f"{self.place} cannot be reached", words))
                raise DeviceError(
                    with_last_words(no_lodging(status, self.place.python, where=str(self.place)), words)
                )
        raise DeviceError(
            f"{self.place}: its login prints more than {LONGEST_GREETING} bytes before the worker"
        )

    def _push(self, content: bytes, path: str) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            done = self._run("push", file.name, path)
        if done is None or done.returncode != 0:
            said = b"no end of it" if done is None else done.stderr or done.stdout
            raise DeviceError(with_last_words(f"{self.place}: the worker's file cannot be laid down", said))

    def _run(self, *words: str) -> subprocess.CompletedProcess[bytes] | None:
        try:
            return subprocess.run(
                (*self._words(), *words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=KILL_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None

    def _words(self) -> tuple[str, ...]:
        return (self.adb, "-s", self.place.serial)


def _worker_status(status: int) -> int | None:
    return status if status == LINE_LOST else shell_status(status)
