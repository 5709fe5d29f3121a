from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nestling.profile import Comparison, Measurement, WorkerDevice, compare_files

Measured = Callable[..., Measurement]


def comparison(*speedups: float) -> Comparison:
    return Comparison("ort:cpu?threads=1", Path("a.onnx"), Path("b.onnx"), speedups, 1.0, 2.0)


def test_the_interval_holds_the_true_speed_up_about_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    for rounds in (3, 6, 20):
        drawn = 1.3 * np.exp(0.02 * rng.standard_normal((1000, rounds)))
        intervals = [comparison(*row).interval for row in drawn.tolist()]
        held = sum(low <= 1.3 <= high for low, high in intervals) / len(intervals)
        assert 0.98 <= held < 1, rounds


def test_the_sentence_says_which_is_faster_by_how_much() -> None:
    told = comparison(1.32, 1.30, 1.34, 1.31, 1.33, 1.32)
    assert told.sentence() == "a.onnx is 1.32 +- 0.02 times faster than b.onnx"
    turned = comparison(*(1 / speedup for speedup in told.speedups))
    assert turned.sentence() == "b.onnx is 1.32 +- 0.02 times faster than a.onnx"
    assert turned.speedup == pytest.approx(1 / told.speedup)
    small = comparison(1.011, 1.010, 1.012)
    assert small.sentence() == "a.onnx is 1.011 +- 0.006 times faster than b.onnx"


def test_two_files_that_may_be_equal_are_not_called_different() -> None:
    told = comparison(0.995, 1.002, 1.006)
    assert not told.differs
    assert told.sentence().startswith("no difference between a.onnx and b.onnx can be told (1.001 +- 0.0")


def test_rounds_that_disagree_are_unstable() -> None:
    assert comparison(1.0, 1.5, 2.0).unstable
    assert not comparison(1.30, 1.31, 1.32).unstable


def test_nothing_is_claimed_where_the_rounds_or_their_measurements_are_unstable() -> None:
    apart = comparison(2.0, 2.5, 3.0)
    assert apart.sentence().startswith(
        "whether a.onnx or b.onnx is faster cannot be told: the rounds disagree by "
    )
    calm = comparison(1.30, 1.31, 1.32, 1.31)
    assert calm.differs
    assert not dataclasses.replace(calm, unstable_rounds=1).unstable
    restless = dataclasses.replace(calm, unstable_rounds=2)
    assert restless.unstable_because == ("2 of 4 rounds were unstable",)
    assert "times faster" not in restless.sentence()
    assert "compare again on a quieter machine" in restless.sentence()


@pytest.mark.parametrize("rounds", [2, 21])
def test_rounds_without_a_quantile_are_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"3 to 20 rounds, not {rounds}"):
        comparison(*([1.0] * rounds))


class Scales:
    """A device on which each file takes the milliseconds of its name; every call is noted."""

    name = "scales"

    def __init__(self, measured: Measured, *, calm: bool = True) -> None:
        self.measured, self.calm = measured, calm
        self.calls: list[str] = []

    def compare(self, path: Path, other: Path, *, seconds: float, fresh: bool) -> Measurement:
        assert fresh
        self.calls.append(f"{path.stem} beside {other.stem} {seconds:g}")
        count = 40 if self.calm else 1
        return self.measured(*[float(path.stem)] * count, reference=(float(other.stem),) * count)


def test_every_round_has_a_fresh_worker_and_the_order_of_loading_alternates(measured: Measured) -> None:
    device = Scales(measured)
    told = compare_files(device, Path("2"), Path("3"), seconds=6, rounds=3)  # type: ignore[arg-type]
    assert device.calls == ["3 beside 2 2", "2 beside 3 2", "3 beside 2 2"]
    assert told.speedups == pytest.approx([1.5] * 3)
    assert told.unstable_rounds == 0
    restless = compare_files(Scales(measured, calm=False), Path("2"), Path("3"), rounds=3)  # type: ignore[arg-type]
    assert restless.unstable_rounds == 3
    assert (told.first_ms, told.second_ms) == pytest.approx((2, 3))
    assert math.isclose(told.half_width, 0, abs_tol=1e-9)
    with pytest.raises(ValueError, match="3 to 20 rounds, not 1"):
        compare_files(device, Path("2"), Path("3"), rounds=1)  # type: ignore[arg-type]


def test_json_holds_what_is_said() -> None:
    told = comparison(1.30, 1.31, 1.32)
    held = told.to_json()
    assert held["sentence"] == told.sentence()
    assert held["interval"] == list(told.interval)
    assert held["speedups"] == dataclasses.asdict(told)["speedups"]


@pytest.mark.slow
def test_a_real_network_is_slower_than_a_convolution(cpu: WorkerDevice, tiny: Path, tmp_path: Path) -> None:
    from nestling.profile.reference import reference_model

    network = tmp_path / "network.onnx"
    network.write_bytes(reference_model())
    told = compare_files(cpu, tiny, network, seconds=0.3, rounds=3)
    assert told.differs
    assert told.speedup > 2
