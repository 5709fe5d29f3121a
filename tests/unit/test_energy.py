from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from nestling.energy import GpuMeter, Meter, Part, PowercapMeter, joules_of, kept_up, meters

RANGE = 262_143_328_850  # microjoules, as Intel's desktops have it


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def zone(root: Path, folder: str, name: str, *, energy: int = 0, most: int = RANGE) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path


def use(zone: Path, joules: float) -> None:
    """What the kernel does when energy is used."""
    counter, most = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
    counter.write_text(str((int(counter.read_text()) + round(joules * 1e6)) % most))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path) -> dict[str, Path]:
    """Two packages with what lies within and beside them, as an Intel server shows them."""
    (tmp_path / "intel-rapl").mkdir()  # the kind of control, no zone
    names = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram", "intel-rapl:1": "package-1", "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0", "dtpm": "dtpm",
    }  # fmt: skip
    return {folder: zone(tmp_path, folder, name) for folder, name in names.items()}


def test_packages_and_their_memory_are_told_apart_and_nothing_is_counted_twice(
    tmp_path: Path, server: dict[str, Path], clock: Clock
) -> None:
    found = meters(root=tmp_path, clock=clock)
    clock.now = 1.0
    for number, path in enumerate(server.values()):
        use(path, 2.0**number)
    assert joules_of(found) == {"cpu": 2.0**0 + 2.0**4, "dram": 2.0**3 + 2.0**5}


def test_an_amd_processor_is_told_like_any_other(tmp_path: Path, clock: Clock) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", energy=17, most=65_532_610_987)
    zone(tmp_path, "intel-rapl:0:0", "core")
    found = meters(root=tmp_path, clock=clock)
    clock.now = 1.0
    use(package, 33.0)
    assert joules_of(found) == {"cpu": 33.0}


def test_a_counter_that_starts_again_goes_on(tmp_path: Path, clock: Clock) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", energy=RANGE - 1_000_000)
    meter = PowercapMeter(package, "cpu", clock=clock)
    told = []
    for _ in range(300):  # twice around
        clock.now += 10.0
        use(package, 2000.0)
        told.append(meter.joules())
    assert told == pytest.approx([2000.0 * (step + 1) for step in range(300)])


def test_a_counter_that_was_set_back_tells_nothing_any_more(tmp_path: Path, clock: Clock) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", energy=90_000_000_000)
    meter = PowercapMeter(package, "cpu", clock=clock)
    (package / "energy_uj").write_text("5")
    clock.now = 20.0
    assert math.isnan(meter.joules())
    clock.now = 21.0
    assert math.isnan(meter.joules())


def test_a_counter_that_may_have_gone_around_unseen_tells_nothing(tmp_path: Path, clock: Clock) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", most=65_000_000_000)
    meter = PowercapMeter(package, "cpu", clock=clock)
    use(package, 100.0)
    clock.now = 64.0
    assert meter.joules() == 100.0
    use(package, 100.0)
    clock.now += 65.0
    assert math.isnan(meter.joules())


def test_a_part_of_which_one_zone_cannot_be_read_is_not_told(
    tmp_path: Path, server: dict[str, Path], clock: Clock
) -> None:
    (server["intel-rapl:1"] / "energy_uj").unlink()  # as good as mode 0400, which root reads all the same
    assert {meter.part for meter in meters(root=tmp_path, clock=clock)} == {"dram"}
    (server["intel-rapl:0:2"] / "energy_uj").write_text("no number")
    assert meters(root=tmp_path, clock=clock) == ()


def test_a_zone_that_goes_away_tells_nothing_from_then_on(tmp_path: Path, clock: Clock) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = PowercapMeter(package, "cpu", clock=clock)
    (package / "energy_uj").rename(package / "hidden")
    assert math.isnan(meter.joules())
    (package / "hidden").rename(package / "energy_uj")
    assert math.isnan(meter.joules())


def test_a_machine_without_powercap_has_no_meters(tmp_path: Path) -> None:
    assert meters(root=tmp_path / "none", nvml=None, gpus=["GPU-1"]) == ()


class Nvml:
    """What is used of `pynvml`, with two GPUs of which the older does not count."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules: dict[str, float] = {"GPU-new": 5_000}
        self.begun = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        self.begun += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in ("GPU-new", "GPU-old"):
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:  # noqa: N802
        if handle not in self.millijoules:
            raise self.NVMLError("not supported")
        return self.millijoules[handle]


def test_a_gpu_tells_joules(tmp_path: Path) -> None:
    nvml = Nvml()
    (meter,) = meters(root=tmp_path, nvml=nvml, gpus=["GPU-new"])
    before = meter.joules()
    nvml.millijoules["GPU-new"] += 1_500
    assert meter.part == "gpu"
    assert meter.joules() - before == 1.5
    assert nvml.begun == 1
    nvml.millijoules.clear()
    assert math.isnan(meter.joules())


@pytest.mark.parametrize("uuids", [["GPU-old"], ["GPU-new", "GPU-old"], ["GPU-elsewhere"]])
def test_gpus_of_which_one_does_not_tell_have_no_meters(tmp_path: Path, uuids: list[str]) -> None:
    assert meters(root=tmp_path, nvml=Nvml(), gpus=uuids) == ()
    with pytest.raises(Nvml.NVMLError):
        GpuMeter(uuids[-1], nvml=Nvml())


def test_without_a_gpu_asked_for_nvml_is_left_alone(tmp_path: Path) -> None:
    nvml = Nvml()
    assert meters(root=tmp_path, nvml=nvml) == ()
    assert nvml.begun == 0


class Counting:
    """Notes how often it is read."""

    part: Part = "cpu"

    def __init__(self) -> None:
        self.enough = threading.Event()
        self.readings = 0

    def joules(self) -> float:
        self.readings += 1
        if self.readings == 3:
            self.enough.set()
        return 0.0


def test_meters_are_read_while_the_block_is_busy_and_not_afterwards() -> None:
    meter: Any = Counting()
    with kept_up([meter], every_seconds=0.001):
        assert meter.enough.wait(10)
    readings = meter.readings
    assert not [t for t in threading.enumerate() if t.name == "energy"]
    assert meter.readings == readings


def test_without_meters_no_thread_is_started() -> None:
    none: list[Meter] = []
    with kept_up(none):
        assert not [t for t in threading.enumerate() if t.name == "energy"]
