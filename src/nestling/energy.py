"""Meter: the joules that a part of this machine has used, where the machine tells them.

Processors tell through Linux's powercap (RAPL, of Intel and AMD alike), NVIDIA's GPUs through NVML, for which
the package `nvidia-ml-py` must be installed. Where nothing tells, or it may not be read, there is no meter:
energy is never estimated here.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

try:
    import pynvml
except ImportError:  # it is optional: without it no GPU tells
    pynvml = None

Part = Literal["cpu", "dram", "gpu"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What is told apart: processor packages, the memory beside them, GPUs."""

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 1000.0
"""No package, and no memory of one, draws more: a counter that moved faster was set back, not used up."""
_UPDATE_JOULES = 10.0
"""What may be in one update of a counter, beyond what the time between two readings allows."""


class Meter(Protocol):
    """A counter that only grows; the difference of two readings is what was used in between."""

    @property
    def part(self) -> Part:
        """What it measures."""
        ...

    def joules(self) -> float:
        """Joules since some moment; nan from the reading on at which it can no longer tell."""
        ...


def meters(
    *,
    gpus: Sequence[str] = (),
    root: Path = POWERCAP,
    nvml: Any = pynvml,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Meter, ...]:
    """The meters of this machine's packages, of their memory, and of the GPUs named.

    A part of which one package or GPU does not tell has no meter at all: its joules would not be the part's.
    Counters that are contained in others (cores within their package, the whole platform, the same counter by
    another way) are left out.

    Args:
        gpus: their UUIDs, as NVML names them (`GPU-...`).
        root: where the kernel shows its counters.
        nvml: the module `pynvml`; None where it is not installed.
        clock: seconds.
    """
    found: list[Meter] = []
    for part, folders in _zones(root).items():
        zones = [_zone(folder, part, clock) for folder in folders]
        found += [zone for zone in zones if zone is not None] if None not in zones else []
    return (*found, *_gpu_meters(gpus, nvml))


def joules_of(found: Sequence[Meter]) -> dict[Part, float]:
    """The sum of the meters of each part; parts without a meter are left out."""
    told: dict[Part, float] = {}
    for meter in found:
        told[meter.part] = told.get(meter.part, 0.0) + meter.joules()
    return told


@contextmanager
def kept_up(found: Sequence[Meter], *, every_seconds: float = 20.0) -> Iterator[None]:
    """Reads the meters now and then, so that none goes around unseen, whatever the block is busy with.

    A counter of 65 kJ goes around in four minutes on a large processor. A reading takes some microseconds.
    """
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(every_seconds):
            joules_of(found)

    reader = threading.Thread(target=read, name="energy", daemon=True)
    if found:
        reader.start()
    try:
        yield
    finally:
        ended.set()
        if found:
            reader.join()


class PowercapMeter:
    """A powercap zone, whose counter of microjoules starts again from 0 after `max_energy_range_uj`.

    Safe to read from several threads.

    Args:
        folder: of the zone.
        part: what it measures.
        clock: seconds.

    Raises:
        OSError: the zone may not be read (kernels show it to root alone by default) or is not there.
        ValueError: it holds no numbers.
    """

    def __init__(self, folder: Path, part: Part, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._part = part
        self._clock = clock
        self._range = self._number("max_energy_range_uj")
        self._last, self._read_at = self._number("energy_uj"), clock()
        self._microjoules = 0.0
        self._lock = threading.Lock()

    @property
    def part(self) -> Part:
        """What it measures."""
        return self._part

    def joules(self) -> float:
        """Joules since it was made.

        nan from the moment on at which the zone cannot be read, was set back (as by a machine that slept), or
        was not read for so long that it may have gone around more than once.
        """
        with self._lock:
            try:
                now, at = self._number("energy_uj"), self._clock()
            except (OSError, ValueError):
                self._microjoules = math.nan
                return math.nan
            most = MOST_WATTS * (at - self._read_at) * 1e6
            used = now - self._last if now >= self._last else now + self._range - self._last
            lost = most >= self._range or used > most + _UPDATE_JOULES * 1e6
            self._microjoules += math.nan if lost else used
            self._last, self._read_at = now, at
            return self._microjoules / 1e6

    def _number(self, name: str) -> int:
        return int((self._folder / name).read_text())


class GpuMeter:
    """An NVIDIA GPU's count of millijoules since its driver was loaded (Volta and later).

    Args:
        uuid: of the GPU, as NVML names it.
        nvml: the module `pynvml`, initialised.

    Raises:
        nvml.NVMLError: there is no such GPU, or it does not count.
    """

    def __init__(self, uuid: str, *, nvml: Any) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    @property
    def part(self) -> Part:
        """What it measures."""
        return "gpu"

    def joules(self) -> float:
        """Joules since the driver was loaded; nan while the driver does not answer."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return math.nan


def _zones(root: Path) -> Mapping[Part, list[Path]]:
    """The zones of each part. Of `intel-rapl-mmio` none: it shows the same packages once more."""
    zones: dict[Part, list[Path]] = {"cpu": [], "dram": []}
    folders = sorted(root.iterdir()) if root.is_dir() else []
    for folder in folders:
        named = re.fullmatch(r"intel-rapl:\d+(:\d+)?", folder.name)
        if named is None:
            continue
        name = (folder / "name").read_text().strip() if (folder / "name").is_file() else ""
        if named[1] is None and name.startswith("package-"):
            zones["cpu"].append(folder)
        elif name == "dram":
            zones["dram"].append(folder)
    return zones


def _zone(folder: Path, part: Part, clock: Callable[[], float]) -> PowercapMeter | None:
    try:
        return PowercapMeter(folder, part, clock=clock)
    except (OSError, ValueError):
        return None


def _gpu_meters(uuids: Sequence[str], nvml: Any) -> Sequence[Meter]:
    if nvml is None or not uuids:
        return ()
    try:
        nvml.nvmlInit()
        return [GpuMeter(uuid, nvml=nvml) for uuid in uuids]
    except nvml.NVMLError:
        return ()
