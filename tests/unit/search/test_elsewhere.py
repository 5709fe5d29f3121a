"""What another search has found teaches the models of this one, each metric by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nestling.search import Metrics, Problem
from nestling.search.encoding import Encoding
from nestling.search.features import FeatureMap
from nestling.search.guided import Guided, View
from nestling.search.result import Trial
from nestling.space import Arch

Evaluate = Callable[[Arch], Metrics]


@pytest.fixture
def trials(problem: Problem, toy: Evaluate) -> list[Trial]:
    archs = Encoding(problem.space).archs(
        Encoding(problem.space).sample(8, np.random.default_rng(0), tilted=True)
    )
    return [Trial(n, arch, toy(arch), "complete") for n, arch in enumerate(dict.fromkeys(archs))]


def test_accuracies_from_elsewhere_teach_accuracy_and_nothing_else(
    problem: Problem, toy: Evaluate, trials: list[Trial]
) -> None:
    features = FeatureMap(Encoding(problem.space))
    everything = list(problem.space.walk())
    known = {arch: {"top1": toy(arch)["top1"]} for arch in everything[::3]}
    rest = [arch for arch in everything if arch not in known]
    truth = np.array([toy(arch)["top1"] for arch in rest])
    asked = features(features.encoding.codes(rest))
    taught = View.of(problem, features, trials, known)
    alone = View.of(problem, features, trials, {})

    def off(view: View) -> float:
        return float(np.abs(view.models["top1"].mean(asked) - truth).mean())

    assert off(taught) < 0.3 * off(alone)
    assert (taught.models["latency_ms"].values == alone.models["latency_ms"].values).all()
    assert (taught.losses == alone.losses).all()


def test_a_trial_that_was_taken_over_counts_once(problem: Problem, trials: list[Trial]) -> None:
    features = FeatureMap(Encoding(problem.space))
    known = {trial.arch: {"top1": trial.metrics["top1"]} for trial in trials[:5]}
    models = View.of(problem, features, trials, known).models
    assert len(models["top1"].values) == len(trials)
    assert sorted(models["top1"].values) == sorted(trial.metrics["top1"] for trial in trials)


def test_archs_from_elsewhere_are_proposed_like_any_other(
    problem: Problem, toy: Evaluate, trials: list[Trial]
) -> None:
    everything = list(problem.space.walk())
    known = {arch: {"top1": toy(arch)["top1"]} for arch in everything}
    proposer = Guided(elsewhere=known, starts=0, population=12, generations=3)
    found = proposer.propose(problem, trials, pending=[], count=5, seed=0)
    assert len(set(found)) == 5
    assert not set(found) & {trial.arch for trial in trials}
