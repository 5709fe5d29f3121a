from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DAY = 86400.0


class Machine:
    """Stands for the module `time` and for the loop: seconds pass where somebody sleeps or measures."""

    def __init__(self) -> None:
        self.now, self.loop, self.made = 1e9, 1.0, 0
        self.calms = False  # whether who slept finds it quiet

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.loop = 1.0 if self.calms else self.loop

    def loop_seconds(self) -> float:
        return self.loop

    def measure(self) -> dict[str, Any]:
        self.made += 1
        self.now += 3.0
        return {"made": self.made}


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def module(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("thermometer")
    monkeypatch.setattr(module, "time", machine)
    monkeypatch.setattr(module, "loop_seconds", machine.loop_seconds)
    return module


def test_a_host_that_is_busy_throughout_is_not_taken_for_a_quiet_one(
    module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "state" / "loops.json"
    assert module.Thermometer(path).slowness() == 1.0
    machine.loop = 1.5
    assert module.Thermometer(path).slowness() == 1.5
    assert module.Thermometer(tmp_path / "another.json").slowness() == 1.0


def test_another_processor_or_python_has_a_fastest_time_of_its_own(
    module: ModuleType, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loops.json"
    module.Thermometer(path)
    machine.loop = 2.0
    monkeypatch.setattr(module, "processor", lambda: "another")
    assert module.Thermometer(path).slowness() == 1.0
    monkeypatch.setattr(module.platform, "python_version", lambda: "4.0")
    assert module.Thermometer(path).slowness() == 1.0
    assert len(json.loads(path.read_text())) == 3


@pytest.mark.parametrize(("seen_again", "slowness"), [(False, 1.0), (True, 2.0)])
def test_a_fastest_time_that_is_not_seen_again_is_forgotten(
    seen_again: bool, slowness: float, module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "loops.json"
    module.Thermometer(path)
    machine.now += 20 * DAY
    machine.loop = 1.04 if seen_again else 1.06
    module.Thermometer(path)
    machine.now += 11 * DAY
    machine.loop = 2.0
    assert module.Thermometer(path).slowness() == slowness


def test_the_faster_time_of_a_benchmark_that_runs_beside_is_kept(
    module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "loops.json"
    thermometer = module.Thermometer(path)
    machine.loop = 0.5
    module.Thermometer(path)
    machine.loop = 0.9
    assert thermometer.slowness() == pytest.approx(1.8)
    assert module.Thermometer(path).slowness() == pytest.approx(1.8)


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', '{"a": ["x", 0]}'])
def test_a_damaged_or_unwritable_file_is_done_without(
    damage: str, module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "loops.json"
    path.write_text(damage)
    assert module.Thermometer(path).slowness() == 1.0
    below = module.Thermometer(path / "below.json")  # no folder
    machine.loop = 1.2
    assert below.slowness() == 1.2
    path.write_text(json.dumps({name: [0.0, machine.now] for name in json.loads(path.read_text())}))
    assert module.Thermometer(path).slowness() == 1.0


def test_a_measurement_is_made_again_until_the_machine_is_quiet(
    module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    thermometer = module.Thermometer(tmp_path / "loops.json")
    assert thermometer.quietly(machine.measure) == {"made": 1, "restless": 0, "quiet": True}

    def disturbed() -> dict[str, Any]:
        machine.loop = 1.2 if machine.made < 3 else 1.0
        return machine.measure()

    machine.calms = True
    assert thermometer.quietly(disturbed) == {"made": 4, "restless": 2, "quiet": True}


def test_the_machine_is_quiet_before_a_measurement_too(
    module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    thermometer = module.Thermometer(tmp_path / "loops.json", waited_seconds=0.0)

    def calming() -> dict[str, Any]:
        machine.loop = 1.0
        return machine.measure()

    machine.loop = 1.2
    assert thermometer.quietly(calming) == {"made": 1, "restless": 1, "quiet": False}


@pytest.mark.parametrize("calms", [False, True])
def test_a_whole_run_waits_no_longer_than_it_may(
    calms: bool, module: ModuleType, machine: Machine, tmp_path: Path
) -> None:
    """On a host that is never quiet, or never while something is measured."""
    thermometer = module.Thermometer(tmp_path / "loops.json", waited_seconds=600.0)

    def measure() -> dict[str, Any]:
        machine.loop = 1.2
        return machine.measure()

    begun, machine.loop, machine.calms, waits = machine.now, 1.2, calms, []
    for _ in range(30):
        before = machine.now
        found = thermometer.quietly(measure)
        waits.append(machine.now - before - 3.0)
        assert not found["quiet"]
        assert 1 <= found["restless"] <= module.PATIENCE
    assert machine.now - begun <= 600.0 + 30 * 3.0
    assert waits[10] > 0  # those before took a part of it only
