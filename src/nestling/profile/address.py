"""Addresses: how a person names a device, `ort:cpu?threads=2` or `ssh://pi@board/ort:cpu`, or a pool."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from nestling.profile.runtimes import RUNTIMES
from nestling.profile.transport import DeviceError

OPTIONS = ("threads", "memory")
REMOTE_OPTIONS = (*OPTIONS, "python")
POOL = "pool:"
PYTHON = "python3"
"""The Python of a board whose address names none."""
UNITS = {"M": 1, "G": 1 << 10}
"""Megabytes (of 2**20 bytes) of the units that `memory` may have."""

_SIZE = re.compile(r"([1-9][0-9]{0,8})([MG])")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]*)")
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_PYTHON = re.compile(r"[A-Za-z0-9/_.][^\s\0]*")


@dataclass(frozen=True, slots=True)
class SshPlace:
    """A board that ssh reaches; a `user` or `port` of None is what ~/.ssh/config says, or ssh's default."""

    host: str
    user: str | None = None
    port: int | None = None
    python: str = PYTHON

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{host}{port}"


@dataclass(frozen=True, slots=True)
class AdbPlace:
    """An Android device that adb reaches, by its serial (`adb devices` lists them)."""

    serial: str
    python: str = PYTHON

    def __str__(self) -> str:
        return f"adb://{self.serial}"


@dataclass(frozen=True, slots=True)
class Address:
    """A device's address, taken apart."""

    runtime: str
    threads: int = 1
    memory_mb: int | None = None
    """The worker's address space, where it is limited, in units of 2**20 bytes."""
    place: SshPlace | AdbPlace | None = None
    """Where the worker runs; None is this machine."""
    engine: str = "ort"
    """What runs models: `ort`, `openvino` or `torch`."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of the runtime that change what is measured, in alphabetical order, as (name, value)."""

    @property
    def device(self) -> str:
        """The runtime and its options, without the place: boards of which it differs are not of one class."""
        more = "".join(f"&{option}={value}" for option, value in self.options)
        return f"{self.engine}:{self.runtime}?threads={self.threads}{more}"

    @property
    def name(self) -> str:
        """The address in full: two spellings of one device have one name."""
        return self.device if self.place is None else f"{self.place}/{self.device}"


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """Boards of one class, which share the work."""

    members: tuple[Address, ...]

    @property
    def device(self) -> str:
        """What all members are: `ort:cpu?threads=1`."""
        return self.members[0].device

    @property
    def name(self) -> str:
        """The address in full."""
        return POOL + ",".join(member.name for member in self.members)


def parse_addresses(text: str) -> Address | PoolAddress:
    """The device, or the pool of devices, that `text` spells: `pool:ssh://a/ort:cpu,ssh://b/ort:cpu`.

    Raises:
        DeviceError: as `parse_address`; or a pool with no member, one member twice, or members that differ in
            their runtime or its options.
    """
    if not text.startswith(POOL):
        return parse_address(text)
    members = tuple(parse_address(part.strip()) for part in text.removeprefix(POOL).split(","))
    names = [member.name for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DeviceError(f"device {text!r}: {twice[0]} is there twice; a board measures one file at a time")
    if other := next(
        (m for m in members if (m.device, m.memory_mb) != (members[0].device, members[0].memory_mb)), None
    ):
        raise DeviceError(
            f"device {text!r}: {members[0].name} and {other.name} are not of one class; the boards of a pool "
            "have one runtime, and the same threads and memory"
        )
    return PoolAddress(members)


def parse_address(text: str) -> Address:
    """The one device that `text` spells.

    `ort:cpu?threads=2&memory=4G` on this machine, `ssh://user@host:port/ort:cpu?python=/usr/bin/python3` on
    a board behind ssh, `adb://serial/ort:cpu` on an Android device. In options, `%2C` is a comma and `%26`
    is `&`.

    Raises:
        DeviceError: an unknown runtime or option, an option twice or with a value that it cannot have, a
            place that cannot be read, or a pool.
    """
    if text.startswith(POOL):
        raise DeviceError(f"device {text!r}: a pool cannot be used here; name one device")
    place, device = None, text
    scheme, sign, rest = text.partition("://")
    if sign:
        where, slash, device = rest.partition("/")
        if not slash:
            raise DeviceError(f"device {text!r}: it names no runtime; write {scheme}://{where}/ort:cpu")
        place = _place(scheme, where, text)
    runtime, question, query = device.partition("?")
    if runtime not in RUNTIMES:
        raise DeviceError(
            f"device {text!r}: unknown runtime {runtime!r}; {_nearest(runtime, list(RUNTIMES))}"
        )
    choices = RUNTIMES[runtime].options
    own = OPTIONS if place is None else REMOTE_OPTIONS
    options = _options(query if question else None, (*own, *choices), text)
    for option, values in choices.items():
        if option in options and options[option] not in values:
            raise DeviceError(
                f"device {text!r}: {option}={options[option]!r} must be one of: {', '.join(values)}"
            )
    # an option that says what goes without saying is the same device
    chosen = {
        name: options[name] for name in choices if options.get(name, choices[name][0]) != choices[name][0]
    }
    if place is not None and "python" in options:
        if not _PYTHON.fullmatch(options["python"]):
            raise DeviceError(f"device {text!r}: python={options['python']!r} must be a path or a command")
        if isinstance(place, SshPlace):
            place = SshPlace(place.host, place.user, place.port, options["python"])
        else:
            place = AdbPlace(place.serial, options["python"])
    engine, _, target = runtime.partition(":")
    return Address(
        target,
        threads=_threads(options.get("threads", "1"), text),
        memory_mb=_megabytes(options["memory"], text) if "memory" in options else None,
        place=place,
        engine=engine,
        options=tuple(sorted(chosen.items())),
    )


def _place(scheme: str, where: str, text: str) -> SshPlace | AdbPlace:
    if scheme == "adb":
        if not _SERIAL.fullmatch(where):
            raise DeviceError(f"device {text!r}: {where!r} is no serial; `adb devices` lists them")
        return AdbPlace(where)
    if scheme != "ssh":
        raise DeviceError(f"device {text!r}: unknown kind of place {scheme!r}; known: ssh, adb")
    user, at, rest = where.rpartition("@")
    host, colon, port = rest.rpartition(":") if not rest.endswith("]") else (rest, "", "")
    if not colon:
        host, port = rest, ""
    if at and not _USER.fullmatch(user):
        raise DeviceError(f"device {text!r}: {user!r} is no name of a user")
    if not _HOST.fullmatch(host):
        raise DeviceError(
            f"device {text!r}: {host!r} is no name of a host; an IPv6 address stands in brackets"
        )
    if colon and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise DeviceError(f"device {text!r}: port {port!r} must be a number from 1 to 65535")
    return SshPlace(host.strip("[]"), user if at else None, int(port) if colon else None)


def _options(query: str | None, known: Sequence[str], text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in [] if query is None else query.split("&"):
        option, _, value = part.partition("=")
        if option not in known:
            raise DeviceError(f"device {text!r}: unknown option {option!r}; {_nearest(option, known)}")
        if option in options:
            raise DeviceError(f"device {text!r}: option {option!r} is there twice")
        options[option] = unquote(value)
    return options


def _threads(value: str, text: str) -> int:
    if not (value.isascii() and value.isdecimal()) or int(value) == 0:
        raise DeviceError(f"device {text!r}: threads={value!r} must be a whole number above zero")
    return int(value)


def _megabytes(value: str, text: str) -> int:
    size = _SIZE.fullmatch(value)
    if size is None:
        raise DeviceError(
            f"device {text!r}: memory={value!r} must be a number above zero and M or G, such as 2G"
        )
    return int(size[1]) * UNITS[size[2]]


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
