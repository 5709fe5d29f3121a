"""What the study's file says of each trial, to Nestling and to any other Optuna tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from nestling.search import EvaluationFailed, Metrics, Problem, StudyMismatch, Trial, load_result, search
from nestling.search.record import FAILED_VIOLATION, Record
from nestling.search.samplers import make_sampler
from nestling.space import Arch, SearchSpace

Evaluate = Callable[[Arch], Metrics]


@pytest.fixture
def limited(space: SearchSpace) -> Problem:
    return Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": 20.0, "top1": 0.5})


def fill(record: Record, archs: list[Arch], outcome: Callable[[Arch], Metrics | None]) -> None:
    """Forces `archs` one after the other; an arch that comes again is told as a duplicate."""
    known: dict[Arch, Trial] = {}
    for number, arch in enumerate(archs):
        sampler = make_sampler("NSGAIISampler", record.problem, seed=number, population=4)
        assert record.ask(sampler, forced=arch) == arch
        original = known.get(arch)
        metrics = outcome(arch)
        if original is not None:
            told = Trial(number, arch, original.metrics, "duplicate", original.reason)
        elif metrics is None:
            told = known[arch] = Trial(number, arch, {}, "failed", "no reason")
        else:
            told = known[arch] = Trial(number, arch, metrics, "complete")
        record.tell(told, original=original)


def test_every_trial_has_every_constraint_duplicates_and_failures_included(
    limited: Problem, toy: Evaluate, file: Path
) -> None:
    small, large = limited.space.smallest, limited.space.largest
    archs = [small, large, small, large]
    fill(Record(limited, file, "toy"), archs, lambda arch: None if arch == large else toy(arch))
    trials = optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").trials
    kept = {limit.metric: limit.violation(toy(small)) for limit in limited.limits}
    broken = {"latency_ms": FAILED_VIOLATION, "top1": FAILED_VIOLATION}
    assert [trial.constraints for trial in trials] == [kept, broken, kept, broken]
    states = [TrialState.COMPLETE, TrialState.FAIL] * 2
    assert [trial.state for trial in trials] == states
    assert [trial.user_attrs.get("duplicate_of") for trial in trials] == [None, None, 0, 1]


def test_the_feasible_front_is_the_one_that_optuna_finds(limited: Problem, toy: Evaluate, file: Path) -> None:
    archs = limited.space.spread(12)
    fill(Record(limited, file, "toy"), archs, toy)
    front = load_result(limited, storage=file, name="toy").front
    best = optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").best_trials
    assert 0 < len(front) < len(archs)
    assert {trial.number for trial in front} == {trial.number for trial in best}


def test_a_reopened_record_holds_the_trials_that_it_was_told(
    limited: Problem, toy: Evaluate, file: Path
) -> None:
    archs = [*limited.space.spread(4), limited.space.largest]
    record = Record(limited, file, "toy")
    fill(record, archs, lambda arch: None if arch["width"] == 2 else toy(arch))
    again = Record(limited, file, "toy")
    assert again.trials == record.trials
    assert again.result == load_result(limited, storage=file, name="toy")
    assert {trial.state for trial in again.trials} == {"complete", "failed", "duplicate"}


def test_a_trial_that_was_asked_for_and_not_told_is_not_in_the_file(limited: Problem, file: Path) -> None:
    record = Record(limited, file, "toy")
    record.ask(make_sampler("RandomSampler", limited, seed=0, population=4))
    assert optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").trials == []
    assert Record(limited, file, "toy").trials == []


def test_nothing_can_be_told_before_it_was_asked_for(limited: Problem, file: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing was asked for"):
        Record(limited, file, "toy").tell(Trial(0, limited.space.smallest, {}, "failed", "x"))


def test_an_arch_that_failed_is_not_evaluated_again(space: SearchSpace, file: Path) -> None:
    small = space.only({"resolution": [16], "width": [1, 2], "depth": [1], "precision": ["w8a8"]})
    problem = Problem.parse(small, objectives=["top1"], limits={"latency_ms": 1.0})
    tried: list[Arch] = []

    def evaluate(arch: Arch) -> Metrics:
        tried.append(arch)
        raise EvaluationFailed

    result = search(problem, evaluate, storage=file, name="toy", trials=9, sampler="TPESampler")
    assert set(tried) == set(small.walk())
    assert len(tried) == len(result.failed) == small.size
    assert {trial.reason for trial in result.failed} == {"the evaluation failed without a reason"}
    assert result.front == ()


@pytest.mark.parametrize(
    "directions", [[StudyDirection.MINIMIZE, StudyDirection.MINIMIZE], [StudyDirection.MAXIMIZE]]
)
def test_an_empty_study_of_others_is_refused_and_left_as_it_was(
    problem: Problem, file: Path, directions: list[StudyDirection]
) -> None:
    theirs = optuna.create_study(study_name="toy", storage=f"sqlite:///{file}", directions=directions)
    with pytest.raises(StudyMismatch, match="differs in objectives"):
        Record(problem, file, "toy")
    with pytest.raises(StudyMismatch, match="differs in objectives"):
        load_result(problem, storage=file, name="toy")
    assert theirs.user_attrs == {}
