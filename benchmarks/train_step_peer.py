"""Once-for-all's package in a virtual environment of its own, and the process that runs it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

PACKAGE, VERSION = "ofa", "0.1.0.post202307202001"
LIMIT_SECONDS = 300.0
WORKER = Path(__file__).with_name("train_step_ofa.py")


class PeerError(RuntimeError):
    """The package cannot be installed or run; the message says what went wrong."""


def interpreter_with_package(folder: Path) -> Path:
    """The interpreter of a virtual environment in `folder` that has the package; made where it is not there.

    Everything else, torch first of all, is what this interpreter has: both sides compute with one torch.

    Raises:
        PeerError: it cannot be made, such as without a network.
    """
    environment = folder / f"{PACKAGE}-{VERSION}"
    python = environment / "bin" / "python"
    places = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    try:
        if not python.exists():
            venv.create(environment, with_pip=False, symlinks=True)
        own = Path(_said([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))
        # written each time: this interpreter's packages may have moved since
        (own / "what_torch_is_in.pth").write_text("\n".join(dict.fromkeys(places.values())) + "\n")
        if not (own / f"{PACKAGE}-{VERSION}.dist-info").exists():
            # into that folder alone: packages seen through the .pth stay as they are
            install = ["install", "--quiet", "--no-deps", "--target", str(own), f"{PACKAGE}=={VERSION}"]
            _said([sys.executable, "-m", "pip", "--disable-pip-version-check", *install])
    except OSError as error:
        raise PeerError(f"no virtual environment can be made in {folder}: {error}") from None
    return python


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{command[1:3]} took more than {LIMIT_SECONDS:g} s") from None
    if done.returncode != 0:
        raise PeerError(_last_line(done.stderr) or f"{command[1:3]} ended with {done.returncode}")
    return done.stdout.strip()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


class Peer:
    """A process that trains OFA's network, and does nothing unless it is told to.

    Args:
        python: an interpreter that has the package.
    """

    def __init__(self, python: Path) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to `message`, when the process has done what it says.

        Raises:
            PeerError: the process has ended instead.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            self._errors.seek(0)
            raise PeerError(_last_line(self._errors.read()) or f"its process ended with {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._errors.close()
