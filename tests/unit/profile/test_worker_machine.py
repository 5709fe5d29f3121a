from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nestling.profile import worker
from nestling.profile.reference import reference_model
from nestling.profile.worker import (
    Input,
    OrtRuntime,
    RefusalError,
    Waits,
    Worker,
    between,
    core_kinds,
    cores_used,
    interleave,
    joules,
    made_up,
    readings,
    used_joules,
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A machine of two cores whose files tell everything."""
    for core, mhz in ((0, 1_200_000), (1, 800_000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}"
        write(folder / "cpufreq/scaling_cur_freq", str(mhz))
        write(folder / "thermal_throttle/core_throttle_count", "7")
        write(folder / "thermal_throttle/core_throttle_total_time_ms", "900")
    write(tmp_path / "sys/class/thermal/thermal_zone0/temp", "41000")
    write(tmp_path / "sys/class/hwmon/hwmon0/temp1_input", "56500")
    write(tmp_path / "sys/class/hwmon/hwmon0/name", "sensor")
    write(tmp_path / "sys/class/hwmon/hwmon0/energy1_input", "2000000")
    for zone, name, count, most in (
        ("intel-rapl:0", "package-0", 5, 262),
        ("intel-rapl:0:0", "core", 3, 262),
        ("intel-rapl:0:1", "dram", 1, 65),
        ("intel-rapl:1", "psys", 9, 262),
        ("intel-rapl-mmio:0", "package-0", 5, 262),
    ):
        write(tmp_path / f"sys/class/powercap/{zone}/name", name)
        write(tmp_path / f"sys/class/powercap/{zone}/energy_uj", str(count * 1_000_000))
        write(tmp_path / f"sys/class/powercap/{zone}/max_energy_range_uj", str(most * 1_000_000))
    write(tmp_path / "proc/stat", "cpu 1\ncpu0 100 0 0 500 0 0 0 40 0 0\ncpu1 300 0 0 5 0 0 0 0 0 0\n")
    write(tmp_path / "proc/self/task/1/schedstat", "9 2000000000 3")
    write(tmp_path / "proc/self/task/2/schedstat", "9 1000000000 3")
    return tmp_path


class Nvml:
    """Two GPUs, of which the first does not count."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 the library's name
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:  # noqa: N802
        if gpu == 0:
            raise self.NVMLError
        return 1500


def test_gpus_that_count_energy_tell_it(tmp_path: Path) -> None:
    assert joules(root=tmp_path, nvml=Nvml()) == {"gpu 1": (1.5, 0.0)}


def test_the_machine_tells_what_its_files_hold(board: Path) -> None:
    told = readings([0], root=board)
    assert told["celsius"] == pytest.approx(56.5)
    assert told["mhz"] == pytest.approx(1200)
    assert told["throttled"] == 7  # a time is no count
    assert told["waited"] == pytest.approx(3)
    assert told["stolen"] * worker.TICKS == pytest.approx(40)
    assert told["others"] * worker.TICKS == pytest.approx(300)


def test_a_machine_that_tells_nothing_has_no_figures(tmp_path: Path) -> None:
    assert set(readings([0], root=tmp_path)) <= {"at", "switches", "load"}
    assert joules(root=tmp_path) == {}


def test_what_is_inside_another_counter_of_energy_is_not_counted_twice(board: Path) -> None:
    assert joules(root=board) == {
        "package-0 intel-rapl:0": (5.0, 262.0),
        "dram intel-rapl:0:1": (1.0, 65.0),
        "sensor hwmon0": (2.0, 0.0),
    }


def test_a_counter_that_went_around_is_followed_and_one_that_was_set_back_is_left_out() -> None:
    before = {"package": (260.0, 262.0), "sensor": (7.0, 0.0), "reset": (100.0, 65_000.0), "gone": (1.0, 0.0)}
    after = {"package": (3.0, 262.0), "sensor": (9.0, 0.0), "reset": (0.0, 65_000.0)}
    assert used_joules(before, after, seconds=0.1) == {"package": 5.0, "sensor": 2.0}
    assert used_joules(before, after, seconds=0.3) == {"sensor": 2.0}  # or twice around
    assert used_joules({"set": (7.0, 0.0)}, {"set": (3.0, 0.0)}, seconds=1.0) == {}


def test_energy_is_that_of_calls_whose_end_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class Lazy(OrtRuntime):
        def timer(self) -> Callable[[Callable[[], object]], int]:  # type: ignore[override]
            def timed(call: Callable[[], object]) -> int:
                call()
                ended.append(1)
                return 1

            return timed

    asked = Worker()
    asked.runtime = Lazy("cpu", 1)
    asked.load({"model": "m"}, bytearray(reference_model()))
    counts = iter([{"package": (1.0, 0.0)}, {"package": (1.5, 0.0)}])
    monkeypatch.setattr(worker, "joules", lambda **_: next(counts))
    before = len(ended)
    told, _ = asked.energy({"model": "m", "seconds": 0.005}, bytearray())
    assert told["calls"] > 0
    assert len(ended) == before + 1 + told["calls"]  # one to warm up
    assert told["joules"] == {"package": 0.5}


def test_counters_become_shares_of_the_time_and_states_stay_what_they_are() -> None:
    before = {"at": 1.0, "waited": 3.0, "stolen": 0.0, "others": 5.0, "throttled": 7.0, "celsius": 40.0}
    after = {"at": 3.0, "waited": 4.0, "stolen": 0.2, "others": 8.0, "throttled": 9.0, "celsius": 50.0}
    told = between(before, after, cores=2)
    assert told == pytest.approx(
        {
            "waited": 0.25,
            "stolen": 0.05,
            "others": 1.5,
            "throttled": 2.0,
            "celsius_before": 40.0,
            "celsius": 50.0,
        }
    )


def test_waits_add_up_over_threads_and_a_thread_that_ends_is_no_error(board: Path) -> None:
    with Waits(board / "proc/self/task") as waits:
        first = waits.nanoseconds()
        write(board / "proc/self/task/1/schedstat", "9 2000000005 3")
        assert (first, waits.nanoseconds() - first) == (3_000_000_000, 5)
        opened = list(waits._files)
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


class BusyMachine:
    """A clock, two models of 3 and 1 ms, and another program, which interrupts where `interrupts` says.

    Only timed calls are counted; an interruption takes 5 ms.
    """

    def __init__(self, interrupts: Iterator[bool]) -> None:
        self.now = self.waited = 0
        self.interrupts = interrupts

    def run(self, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += int(milliseconds * 1e6)

        return call

    def timer(self, call: Callable[[], object]) -> int:
        begun = self.now
        call()
        if next(self.interrupts):
            self.now += 5_000_000
            self.waited += 5_000_000
        return self.now - begun

    def measure(self, *, seconds: float) -> worker.Timed:
        return interleave(
            self.run(3),
            self.run(1),
            seconds=seconds,
            tolerance=1e-3,
            clock=lambda: self.now,
            timer=self.timer,
            waited=lambda: self.waited,
        )


def test_pairs_that_were_interrupted_are_left_out_and_counted() -> None:
    # the second call of every third pair
    timed = BusyMachine(call % 6 == 5 for call in range(10**6)).measure(seconds=10)
    assert set(timed.candidate) == {3_000_000}
    assert set(timed.reference) == {1_000_000}
    assert len(timed.candidate) == worker.TRUSTED_PAIRS
    assert timed.left_out == pytest.approx(worker.TRUSTED_PAIRS / 2, abs=1)
    assert timed.interrupted == 0


def test_where_nearly_all_pairs_are_interrupted_they_are_kept_and_told() -> None:
    timed = BusyMachine(call % 12 != 5 for call in range(10**6)).measure(seconds=0.5)
    assert timed.left_out == 0
    assert timed.interrupted == len(timed.candidate) >= worker.LEAST_PAIRS


def test_made_up_inputs_are_always_the_same_and_fit_their_type() -> None:
    inputs = [
        Input("images", "float32", ["batch", 3, 8, 8]),
        Input("bytes", "uint8", [64]),
        Input("tokens", "int64", [2, 16]),
        Input("mask", "bool", [None, 16]),
    ]
    feed, again = made_up(inputs), made_up(inputs)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    assert {name: array.dtype.name for name, array in feed.items()} == {i.name: i.dtype for i in inputs}
    assert feed["images"].shape == (1, 3, 8, 8)
    assert abs(float(feed["images"].mean())) < 0.3
    assert feed["bytes"].max() > 128
    assert set(feed["tokens"].ravel().tolist()) == {0, 1}


def test_an_open_size_that_is_not_the_first_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        RefusalError, match=r"'x' has shape \[1, 'h'\]; only its first.*make_dynamic_shape_fixed"
    ):
        made_up([Input("x", "float32", [1, "h"])])


def test_a_module_sent_along_becomes_the_runtime() -> None:
    source = b"""
from dataclasses import dataclass
@dataclass
class ForeignRuntime:
    threads: int
    options: dict
    refusal: type
    def __post_init__(self):
        if self.threads > 2:
            raise self.refusal("two at most")
"""
    made = worker.foreign_runtime(source, "odd", 2, {"dtype": "f32"}, refusal=RefusalError)
    assert vars(made) == {"threads": 2, "options": {"dtype": "f32"}, "refusal": RefusalError}
    with pytest.raises(RefusalError, match="two at most"):
        worker.foreign_runtime(source, "odd", 3, {}, refusal=RefusalError)


@pytest.mark.parametrize(
    ("name", "speeds", "kinds"),
    [
        ("cpu_capacity", [446, 1024, 446, 1024, 871], [2, 0, 2, 0, 1]),
        ("cpufreq/cpuinfo_max_freq", [5_300_000, 5_200_000, 3_800_000], [0, 0, 1]),
        ("cpu_capacity", [1024, 1000, 900], [0, 0, 1]),
        ("cpufreq/cpuinfo_max_freq", [2_000_000, 2_000_000], [0, 0]),
        ("nothing", [1, 2], []),
    ],
)
def test_cores_of_like_speed_are_of_one_kind(
    name: str, speeds: list[int], kinds: list[int], tmp_path: Path
) -> None:
    for core, speed in enumerate(speeds):
        write(tmp_path / f"sys/devices/system/cpu/cpu{core}/{name}", str(speed))
    write(tmp_path / "sys/devices/system/cpu/cpufreq/boost", "1")
    assert core_kinds(root=tmp_path) == dict(enumerate(kinds))


def test_the_kind_of_core_is_named_only_where_there_are_several(tmp_path: Path, board: Path) -> None:
    assert cores_used([0], root=board) == ""
    for core, capacity in enumerate((446, 1024, 446)):
        write(tmp_path / f"sys/devices/system/cpu/cpu{core}/cpu_capacity", str(capacity))
    assert cores_used([1], root=tmp_path) == ", cores of kind 1 of 2"
    assert cores_used([0, 1, 2], root=tmp_path) == ", cores of kind 1 and 2 of 2"


def test_a_group_and_those_around_it_tell_how_often_they_were_held_back(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "3:memory:/x\n2:cpu,cpuacct:/old\n0::/outer/inner\n")
    write(tmp_path / "sys/fs/cgroup/outer/inner/cpu.stat", "usage_usec 5\nnr_periods 9\nnr_throttled 2\n")
    write(tmp_path / "sys/fs/cgroup/outer/cpu.stat", "nr_throttled 30\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/old/cpu.stat", "nr_throttled 400\n")
    write(tmp_path / "sys/fs/cgroup/memory/x/cpu.stat", "nr_throttled 5000\n")
    assert readings([], root=tmp_path)["curbed"] == 432
    told = between({"at": 0.0, "curbed": 430.0}, {"at": 1.0, "curbed": 432.0}, cores=1)
    assert told["curbed"] == 2


@pytest.mark.parametrize("big", [0, 1])
def test_a_big_core_is_taken_before_a_little_one(big: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    monkeypatch.setattr(worker, "core_kinds", lambda: {0: 1, 1: 1, big: 0})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: taken.append(cores))
    assert worker.pin(1) == [big]
    assert taken == [[big]]


def test_interruptions_do_not_lengthen_the_budget() -> None:
    machine = BusyMachine(itertools.repeat(True))
    machine.measure(seconds=1)
    assert machine.now / 1e9 < 1.5
