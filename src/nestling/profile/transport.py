"""Transport: how a worker is started, asked and ended, wherever it runs; what may go wrong with one."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nestling.profile import worker

STDERR_KEPT = 4096
"""Bytes of a worker's last words that an error quotes."""
STOP_SECONDS = 1.0
"""What a worker that was told to go may take for it."""
CHUNK = 1 << 20


class DeviceError(RuntimeError):
    """A device did not do what was asked; the message names the device, the file and the cause."""


class WorkerLostError(DeviceError):
    """The worker crashed, hung or was cut off. The next call starts another."""


class TooSlowError(WorkerLostError):
    """The worker was lost because what was asked of it took longer than it may."""


class LineLostError(WorkerLostError):
    """The line to the worker was cut or cannot be had: this says nothing about what the worker was given."""


class DevicesGoneError(RuntimeError):
    """A device that was there cannot be used any more: nothing that is asked next could be answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker sent back: a JSON object and raw bytes."""

    message: Mapping[str, Any]
    blob: bytes | bytearray


class Transport(Protocol):
    """A worker somewhere, reached by frames: the seam between this machine and any other."""

    @property
    def running(self) -> bool:
        """Whether a worker is there. A worker that has been lost has forgotten all that it held."""

    def start(self) -> None:
        """Starts a worker.

        Raises:
            DeviceError: it cannot be started.
        """

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        """The worker's answer to `request` and `blob`.

        Raises:
            WorkerLostError: it died, or did not answer in time and was killed.
        """

    def stop(self) -> None:
        """Ends the worker, if one runs."""


def parse_lengths(head: bytes | bytearray) -> tuple[int, int]:
    """The bytes of an answer's JSON object and of its blob, out of the sixteen that every answer begins with.

    Raises:
        ValueError: lengths that no answer has.
    """
    json_bytes, blob_bytes = worker.LENGTHS.unpack(head)
    if json_bytes > worker.LONGEST_JSON or blob_bytes > worker.LONGEST_BLOB or json_bytes == 0:
        raise ValueError(f"a frame of {json_bytes} + {blob_bytes} bytes")
    return json_bytes, blob_bytes


def parse_answer(text: bytes | bytearray, blob: bytes | bytearray) -> Answer:
    """The answer whose JSON object is `text`.

    Raises:
        ValueError: `text` is no JSON, or no object.
    """
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError(f"{message!r}")
    return Answer(message, blob)


def ending(status: int | None) -> str:
    """How a worker ended, by its exit status, minus a signal's number, or None where it lives on unheard."""
    if status is None:
        return "closed its pipes"
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}" + (" (killed from outside, or out of memory)" if name == "SIGKILL" else "")


def with_last_words(cause: str, stderr: bytes | bytearray) -> str:
    """`cause`, with what the worker wrote to its stderr, where it did."""
    words = stderr.decode(errors="replace").strip()
    return f"{cause}; its last words: {words}" if words else cause
