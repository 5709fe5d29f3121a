from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nestling.console.networks import beyond_limits, print_best, print_trials
from nestling.console.progress import spent_words
from nestling.console.words import duration, si
from nestling.pipeline import Forecast, SearchResult, Spent
from nestling.search import Problem, Trial
from nestling.space import Choice, SearchSpace


@pytest.mark.parametrize(
    ("value", "told"), [(566_163_744, "566 MMACs"), (1.5e12, "1.5 TMACs"), (999, "999 MACs"), (0, "0 MACs")]
)
def test_si_keeps_three_digits_and_a_prefix(value: float, told: str) -> None:
    assert si(value, "MACs") == told


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")]
)
def test_duration_reads_as_a_person_says_it(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_what_training_cost_is_said_beside_its_forecast() -> None:
    forecast = Forecast(steps=100, images=6400, macs=2e12, seconds=50.0)
    spent = Spent(100, 6400, 2.2e12, 2.2e10, 75.0, {"cpu": 4321.0, "dram": None, "gpu": 900.0})
    assert spent_words(spent, forecast) == (
        "spent: 100 steps; 6.4 k images; 2.2 TMACs (+- 1.0%), 1.10 of the forecast; "
        "1 min 15 s, 1.50 of the forecast; energy cpu 4.32 kJ, gpu 900 J"
    )
    untold = Spent(100, 6400, 2e12, 0.0, 50.0, {"cpu": None, "dram": None, "gpu": None})
    assert spent_words(untold, forecast) == (
        "spent: 100 steps; 6.4 k images; 2 TMACs, 1.00 of the forecast; 50 s, 1.00 of the forecast; "
        "energy not told by this machine"
    )


def card_and_result(**measured: Any) -> tuple[dict[str, Any], SearchResult]:
    """A network that the search found at 4.9 ms and 0.91, within 5 ms and 0.9."""
    space = SearchSpace("toy", (Choice("depth", (1, 2)),))
    objectives, limits = ["top1", "latency_ms"], {"latency_ms": 5.0, "top1": 0.9}
    problem = Problem.parse(space, objectives=objectives, limits=limits)
    trial = Trial(0, space.smallest, {"top1": 0.91, "latency_ms": 4.9}, "complete")
    card = {"name": "abc", "file": "model.onnx", "device": "ort:cpu", "unstable": False, "test_total": 5000}
    card |= {"test_top1": 0.905, "test_top1_interval": [0.897, 0.913]}
    card |= {"latency_ms": 4.95, "latency_interval_ms": [4.8, 5.1]}
    return card | measured, SearchResult(problem, (trial,))


def test_the_best_within_limits_is_said_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    card, result = card_and_result()
    print_best(card, result, Path("runs/a"))
    said = capsys.readouterr().out
    assert "the best network with latency_ms at most 5 and top1 at least 0.9 on ort:cpu: abc" in said
    assert "top-1 90.50% (89.7%-91.3%) on 5,000 test images, 4.95 ms (4.8-5.1)" in said
    assert "runs/a/exports/abc/model.onnx" in said
    assert "when measured again" not in said


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        ({"latency_interval_ms": [5.1, 5.3]}, ["latency_ms at most 5", "--at-most latency_ms=4.75"]),
        ({"test_top1_interval": [0.87, 0.89]}, ["top1 at least 0.9", "--at-least top1=0.905"]),
        ({"latency_interval_ms": [5.1, 5.3], "unstable": True}, []),
        ({"latency_ms": None, "latency_interval_ms": None}, []),
    ],
)
def test_a_limit_that_is_missed_when_measured_again_is_told(
    measured: dict[str, Any], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    card, result = card_and_result(**measured)
    assert len(beyond_limits(card, result)) == bool(told)
    print_best(card, result, Path("runs/a"))
    said = capsys.readouterr().out
    assert all(words in said for words in told)
    assert ("when measured again" in said) == bool(told)


def test_the_front_s_unstable_latencies_are_told_last(capsys: pytest.CaptureFixture[str]) -> None:
    space = SearchSpace("toy", (Choice("width", (1, 2)),))
    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={})

    def told(*unstable: float) -> str:
        trials = tuple(
            Trial(n, arch, {"top1": 0.5 + n / 9, "latency_ms": 1.0 + n, "latency_unstable": flag}, "complete")
            for n, (arch, flag) in enumerate(zip(space.walk(), unstable, strict=True))
        )
        print_trials(SearchResult(problem, trials))
        return capsys.readouterr().out

    assert "do not trust" not in told(0.0, 0.0)
    last = told(1.0, 0.0).splitlines()[-1]
    assert last.startswith("the latency of 1 of 2 is unstable, do not trust it: ")
    assert "the same command measures them again" in last
