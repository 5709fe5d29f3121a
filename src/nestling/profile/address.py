"""Addresses: how a person names a device, `ort:cpu?threads=2`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from nestling.profile.transport import DeviceError
from nestling.profile.worker import PROVIDERS

OPTIONS = ("threads", "memory_mb")


@dataclass(frozen=True, slots=True)
class Address:
    """A device's address, taken apart."""

    runtime: str
    threads: int = 1
    memory_mb: int | None = None
    """The worker's address space, where it is limited."""

    @property
    def name(self) -> str:
        """The address in full: two spellings of one device have one name."""
        return f"ort:{self.runtime}?threads={self.threads}"


def parse_address(text: str) -> Address:
    """The address that `text` spells: `ort:cpu?threads=2&memory_mb=4096`.

    Raises:
        DeviceError: an unknown runtime or option, or an option twice or without a number above zero.
    """
    runtime, question, query = text.partition("?")
    runtimes = [f"ort:{known}" for known in PROVIDERS]
    if runtime not in runtimes:
        raise DeviceError(f"device {text!r}: unknown runtime {runtime!r}; {_nearest(runtime, runtimes)}")
    options: dict[str, int] = {}
    for part in query.split("&") if question else []:
        option, _, value = part.partition("=")
        if option not in OPTIONS:
            hint = _nearest(option, OPTIONS)
            raise DeviceError(f"device {text!r}: unknown option {option!r}; {hint}")
        if option in options:
            raise DeviceError(f"device {text!r}: option {option!r} is there twice")
        if not (value.isascii() and value.isdecimal()) or int(value) == 0:
            raise DeviceError(f"device {text!r}: {option}={value!r} must be a whole number above zero")
        options[option] = int(value)
    return Address(runtime.removeprefix("ort:"), **options)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
