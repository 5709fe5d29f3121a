from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nestling.profile import Conditions, Elsewhere, Fingerprint, Measurement
from nestling.profile.worker import interval_ranks, median_interval

Measured = Callable[..., Measurement]


@pytest.mark.parametrize("count", [6, 7, 10, 31, 100, 501])
def test_the_interval_is_the_narrowest_symmetric_one_that_keeps_its_confidence(count: int) -> None:
    def confidence(low: int) -> float:
        return 1.0 - 2 * sum(math.comb(count, below) for below in range(low + 1)) / float(2**count)

    low, high = interval_ranks(count)
    assert high == count - 1 - low
    assert confidence(low) >= 0.95
    assert confidence(low + 1) < 0.95


def test_fewer_samples_than_six_give_their_whole_range() -> None:
    assert [interval_ranks(count) for count in (1, 2, 5)] == [(0, 0), (0, 1), (0, 4)]


@pytest.mark.parametrize(("count", "least", "most"), [(10, 0.96, 0.99), (40, 0.94, 0.98), (200, 0.94, 0.97)])
def test_the_interval_holds_the_true_median_about_95_times_in_100(
    count: int, least: float, most: float
) -> None:
    rng = np.random.default_rng(7)
    samples = rng.lognormal(mean=0.0, sigma=0.5, size=(1500, count))  # skewed, as times are; its median is 1
    held = 0
    for row in samples:
        low, middle, high = median_interval(row)
        assert low <= middle <= high
        held += low <= 1.0 <= high
    assert least <= held / len(samples) <= most


def test_the_figures_are_medians_and_quantiles_of_the_raw_times(measured: Measured) -> None:
    taken = measured(*range(1, 102))
    assert taken.latency_ms == pytest.approx(51)
    assert taken.p90_ms == pytest.approx(91)
    assert taken.p99_ms == pytest.approx(100)
    assert taken.interval_ms == pytest.approx((41, 61))
    assert taken.device == "ort:cpu?threads=1"


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians(measured: Measured) -> None:
    taken = measured(2, 8, 30, reference=(1, 2, 30))
    assert taken.ratio == pytest.approx(2)
    assert taken.ratio_interval == pytest.approx((1, 4))


def test_a_slowdown_that_hits_both_leaves_the_ratio_alone(measured: Measured) -> None:
    slow = np.linspace(1, 1.09, 50)
    taken = measured(*(3 * slow), reference=tuple(slow))
    assert taken.ratio_interval == pytest.approx((3, 3))
    assert not taken.unstable


def test_a_reference_that_drifts_makes_it_unstable(measured: Measured) -> None:
    slow = np.repeat([1.0, 1.2], 25)
    assert measured(*(3 * slow), reference=tuple(slow)).unstable


def test_a_wide_interval_makes_it_unstable(measured: Measured) -> None:
    assert measured(*([1.0, 1.1] * 20)).unstable
    assert not measured(*([1.0, 1.04] * 20)).unstable
    assert measured(1.0).unstable


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (Conditions(interrupted=0.3), "other programs interrupted 30% of the pairs"),
        (Conditions(stolen=0.2), "other machines of the host had the core for 20% of the time"),
        (Conditions(throttled=2), "the processor slowed itself down 2 times"),
        (
            Conditions(curbed=3),
            "its control group had used up its share of the processor 3 times",
        ),
        (Conditions(mhz_before=2000, mhz=1700), "the processor's clock fell from 2000 to 1700 MHz"),
        (Conditions(missed=4), "half of the time limit was gone after 30 pairs of calls"),
    ],
)
def test_a_busy_or_hot_machine_makes_it_unstable_and_is_named(
    told: Conditions, reason: str, measured: Measured
) -> None:
    taken = dataclasses.replace(measured(*([3.0] * 30)), conditions=told)
    assert taken.unstable_because == (reason,)


def test_a_machine_whose_interruptions_were_left_out_is_not_unstable(measured: Measured) -> None:
    told = Conditions(
        waited=0.9,
        left_out=400,
        interrupted=0.0,
        load=8.0,
        stolen=0.01,
        throttled=0,
        curbed=0,
        mhz_before=2000,
        mhz=1900,
    )
    assert not dataclasses.replace(measured(*([3.0] * 30)), conditions=told).unstable


def test_json_gives_back_the_same_measurement(measured: Measured) -> None:
    taken = measured(0.1, 1 / 3, 7, reference=(1, 2, 3))
    assert Measurement.from_json(taken.to_json()) == taken
    told = dataclasses.replace(
        taken, conditions=Conditions(waited=0.5, celsius=60.0), elsewhere=Elsewhere(0.25, 0.5)
    )
    assert Measurement.from_json(told.to_json()) == told


def test_measurements_that_were_stored_before_conditions_are_read(measured: Measured) -> None:
    held = json.loads(measured(1, 2, 3).to_json())
    del held["conditions"], held["elsewhere"]
    assert Measurement.from_json(json.dumps(held)) == measured(1, 2, 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": {"instructions": []}}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a measurement|Expecting value"):
        Measurement.from_json(text)


@pytest.mark.parametrize("times", [{"seconds": ()}, {"seconds": (1.0,) * 3}, {"seconds": (1.0, 0.0)}])
def test_times_that_cannot_be_are_refused(times: dict[str, Any], measured: Measured) -> None:
    with pytest.raises(ValueError, match=r"as many times|above zero"):
        dataclasses.replace(measured(1, 2), **times)


def test_whatever_changes_latency_changes_the_fingerprint(fingerprint: Fingerprint) -> None:
    changes: list[dict[str, Any]] = [
        {"device": "ort:cpu?threads=2"},
        {"cpu": "B"},
        {"instructions": ()},
        {"runtime": "onnxruntime 2.0"},
        {"reference": "f" * 12},
        {"cores": 3},
        {"platform": "Linux aarch64"},
    ]
    keys = {dataclasses.replace(fingerprint, **change).key for change in changes}
    assert len(keys | {fingerprint.key}) == len(changes) + 1
