"""What the study's file says of each trial, to Nestling and to any other Optuna tool."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from nestling.search import EvaluationFailed, Metrics, Problem, StudyMismatch, Trial, load_result, search
from nestling.search.opening import open_queue
from nestling.search.queue import Task
from nestling.search.tables import FAILED_VIOLATION
from nestling.space import Arch, SearchSpace

Evaluate = Callable[[Arch], Metrics]


@pytest.fixture
def limited(space: SearchSpace) -> Problem:
    return Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": 20.0, "top1": 0.5})


def fill(file: Path, problem: Problem, outcomes: list[tuple[Arch, Metrics]]) -> list[Trial]:
    """What the file holds after these outcomes were recorded in it; an arch without metrics has failed."""
    with open_queue(problem, file, "toy") as queue:
        queue.offer([arch for arch, _ in outcomes])
        task = queue.next(1000)
        for arch, metrics in outcomes:
            assert isinstance(task, Task)
            assert task.arch == arch
            state: Literal["complete", "failed"] = "complete" if metrics else "failed"
            told = Trial(0, arch, metrics, state, "" if metrics else "no reason", 0.5)
            task = queue.next(1000, outcome=(task, told))
        return queue.record.trials


def read_by_optuna(file: Path) -> optuna.Study:
    return optuna.load_study(study_name="toy", storage=f"sqlite:///{file}")


def test_every_trial_has_every_constraint_failures_included(
    limited: Problem, toy: Evaluate, file: Path
) -> None:
    small, large = limited.space.smallest, limited.space.largest
    fill(file, limited, [(small, toy(small)), (large, {})])
    trials = read_by_optuna(file).trials
    kept = {limit.metric: limit.violation(toy(small)) for limit in limited.limits}
    broken = {"latency_ms": FAILED_VIOLATION, "top1": FAILED_VIOLATION}
    assert [trial.constraints for trial in trials] == [kept, broken]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL]


def test_the_feasible_front_is_the_one_that_optuna_finds(limited: Problem, toy: Evaluate, file: Path) -> None:
    archs = limited.space.spread(12)
    fill(file, limited, [(arch, toy(arch)) for arch in archs])
    front = load_result(limited, storage=file, name="toy").front
    best = read_by_optuna(file).best_trials
    assert 0 < len(front) < len(archs)
    assert {trial.number for trial in front} == {trial.number for trial in best}


def test_a_reopened_record_holds_the_trials_that_it_was_told(
    limited: Problem, toy: Evaluate, file: Path
) -> None:
    archs = limited.space.spread(5)
    told = fill(file, limited, [(arch, {} if arch["width"] == 2 else toy(arch)) for arch in archs])
    assert [trial.number for trial in told] == [0, 1, 2, 3, 4]
    assert {trial.state for trial in told} == {"complete", "failed"}
    assert load_result(limited, storage=file, name="toy").trials == tuple(told)


def test_a_trial_that_was_begun_and_not_finished_is_not_in_the_file(limited: Problem, file: Path) -> None:
    with open_queue(limited, file, "toy") as queue:
        queue.offer([limited.space.smallest])
        assert isinstance(queue.next(1), Task)
    assert read_by_optuna(file).trials == []
    assert load_result(limited, storage=file, name="toy").trials == ()


def test_a_study_of_another_supernet_is_refused_by_what_differs(problem: Problem, file: Path) -> None:
    with open_queue(problem, file, "toy", about={"weights": "a", "images": "b"}):
        pass
    with open_queue(problem, file, "toy", about={"images": "b"}):
        pass
    with (
        pytest.raises(StudyMismatch, match=r"another problem \(it differs in weights\)"),
        open_queue(problem, file, "toy", about={"weights": "c", "images": "b"}),
    ):
        pass


def test_trials_of_a_study_from_before_there_were_queues_are_not_tried_again(
    problem: Problem, toy: Evaluate, file: Path
) -> None:
    archs = problem.space.spread(4)
    fill(file, problem, [(arch, toy(arch)) for arch in archs])
    with closing(sqlite3.connect(file)) as database, database:
        for table in ("candidates", "leases", "facts"):
            database.execute(f"drop table nestling_{table}")
    tried: list[Arch] = []

    def evaluate(arch: Arch) -> Metrics:
        tried.append(arch)
        return toy(arch)

    result = search(problem, evaluate, storage=file, name="toy", trials=6, warm_start=4, strategy="random")
    assert [trial.arch for trial in result.trials] == [*archs, *tried]
    assert len(set(tried) - set(archs)) == len(tried) == 2


def test_an_arch_that_failed_is_not_evaluated_again(space: SearchSpace, file: Path) -> None:
    small = space.only({"resolution": [16], "width": [1, 2], "depth": [1], "precision": ["w8a8"]})
    problem = Problem.parse(small, objectives=["top1"], limits={"latency_ms": 1.0})
    tried: list[Arch] = []

    def evaluate(arch: Arch) -> Metrics:
        tried.append(arch)
        raise EvaluationFailed

    result = search(problem, evaluate, storage=file, name="toy", trials=9, strategy="TPESampler")
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
        search(problem, lambda _: {}, storage=file, name="toy", trials=1)
    with pytest.raises(StudyMismatch, match="differs in objectives"):
        load_result(problem, storage=file, name="toy")
    assert theirs.user_attrs == {}
