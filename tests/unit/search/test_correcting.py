"""Metrics of a recorded trial that are taken again, as we and as Optuna read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from nestling.search import Metrics, Problem, StudyMismatch, correct_trial, load_result, search
from nestling.space import Arch, SearchSpace

Evaluate = Callable[[Arch], Metrics]


def test_new_metrics_hold_for_us_and_for_optuna_and_the_old_ones_stay_readable(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": 50.0})
    before = search(problem, toy, storage=file, name="toy", trials=5, strategy="random").trials
    for latency_ms in (60.0, 70.0):
        correct_trial(problem, before[2], {"latency_ms": latency_ms}, storage=file, name="toy")
    after = load_result(problem, storage=file, name="toy").trials
    assert after[2] == replace(before[2], metrics={**before[2].metrics, "latency_ms": 70.0})
    assert after[:2] + after[3:] == before[:2] + before[3:]

    told = optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").trials[2]
    assert told.values == [before[2].metrics["top1"], 70.0]
    assert told.constraints == {
        "latency_ms": pytest.approx(problem.limits[0].violation({"latency_ms": 70.0}))
    }
    kept = [metrics["latency_ms"] for metrics in told.user_attrs["metrics_before"]]
    assert kept == [before[2].metrics["latency_ms"], 60.0]
    json.dumps(told.user_attrs)


def test_a_trial_that_the_study_does_not_have_is_refused(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={})
    trials = search(problem, toy, storage=file, name="toy", trials=3, strategy="random").trials
    for other in (replace(trials[0], number=7), replace(trials[0], arch=trials[1].arch)):
        with pytest.raises(StudyMismatch, match=f"no complete trial {other.number} of the arch"):
            correct_trial(problem, other, {"latency_ms": 1.0}, storage=file, name="toy")
    assert load_result(problem, storage=file, name="toy").trials == trials
