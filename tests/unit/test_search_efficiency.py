"""The benchmark of searches: its oracles tell the truth, its claims are judged as they say."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nestling.search.encoding import Encoding

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A part of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def figures(ours: dict[str, list[float]], linas: dict[str, list[float]]) -> dict[str, Any]:
    def row(per_cent: dict[str, list[float]]) -> dict[str, Any]:
        interval = {mark: [min(values), max(values)] for mark, values in per_cent.items()}
        return {"per_cent": per_cent, "interval": interval, "proposing_ms": [1.0]}

    methods = {"LINAS": row(linas), "ours": row(ours)}
    settings = {"seeds": 2, "budget": 250, "marks": [100, 250], "methods": list(methods)}
    return {"settings": settings, "oracles": {"ofa": {"best": {}, "methods": methods}}}


def test_what_is_good_enough_has_no_misses(load: Load) -> None:
    benchmark = load("search_efficiency")
    good = figures({"100": [96.0, 97.0], "250": [98.5, 99.0]}, {"100": [88.0, 89.0], "250": [95.0, 96.0]})
    assert benchmark.misses(good) == []
    assert "ours 96.5 % at 100 and 98.8 % at 250, LINAS 95.5 % at 250" in benchmark.sentence(good)
    assert "| ours | 96.5 (96.0-97.0) | 98.8 (98.5-99.0) | 1 |" in benchmark.table(good)


def test_every_claim_that_does_not_hold_is_told(load: Load) -> None:
    benchmark = load("search_efficiency")
    poor = figures({"100": [80.0, 81.0], "250": [97.0, 97.2]}, {"100": [88.0, 89.0], "250": [95.0, 96.0]})
    told = benchmark.misses(poor)
    assert [line.split(":")[0] for line in told] == ["ofa at 100", "ofa", "ofa"]
    assert "8.0 points below LINAS" in told[0]
    assert "80.5 % at 100, LINAS 95.5 % at 250" in told[1]
    assert "97.1 % at 250, not 98 %" in told[2]


def test_a_difference_within_the_spread_of_the_seeds_is_no_miss(load: Load) -> None:
    benchmark = load("search_efficiency")
    mean, low, high = benchmark.difference([90.0, 94.0, 98.0], [91.0, 95.0, 98.0])
    assert low < mean < 0 < high


@pytest.mark.parametrize("name", ["synthetic", "precision"])
def test_an_oracle_tells_one_network_one_truth(load: Load, name: str) -> None:
    oracle = load("search_oracles").oracle(name, Path())
    encoding = Encoding(oracle.problem.space)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, encoding.levels, size=(50, len(encoding.levels)))
    raw[:, list(encoding.names).index("s1.depth")] = 0
    told, pinned = oracle.truth(raw), oracle.truth(encoding.canonical(raw))
    for metric, values in told.items():
        assert values == pytest.approx(pinned[metric])
    ends = oracle.truth(encoding.codes([oracle.problem.space.smallest, oracle.problem.space.largest]))
    assert ends["latency_ms"][0] < ends["latency_ms"][1]
    assert ((told["top1"] > 0) & (told["top1"] < 1)).all()


def test_what_is_measured_is_the_truth_with_the_noise_that_is_told(load: Load) -> None:
    oracle = load("search_oracles").oracle("synthetic", Path())
    codes = Encoding(oracle.problem.space).sample(300, np.random.default_rng(0))
    measured = oracle.measured(codes, np.random.default_rng(1))
    truth = oracle.truth(codes)
    wrong = np.array([m["top1"] for m in measured]) - truth["top1"]
    assert wrong.std() == pytest.approx(oracle.noise["top1"], rel=0.2)
    parts = np.array([m["latency_ms"] for m in measured]) / truth["latency_ms"] - 1
    assert parts.std() == pytest.approx(oracle.noise["latency_ms"], rel=0.2)


def test_the_volume_is_that_of_the_true_metrics_of_the_measured_front(load: Load) -> None:
    methods = load("search_methods")
    oracle = load("search_oracles").oracle("synthetic", Path())
    outcome = methods.run(methods.METHODS["random"], oracle, seed=0, budget=50)
    again = methods.run(methods.METHODS["random"], oracle, seed=0, budget=50)
    assert outcome["volumes"] == again["volumes"]
    best = methods.best_known(oracle, population=40, generations=20)
    assert 0 < outcome["volumes"]["50"] < best["volume"]
