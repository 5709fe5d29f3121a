"""search(): what it evaluates, what it records, what it refuses."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from nestling.search import (
    EvaluationFailed,
    InfeasibleLimit,
    Metrics,
    Problem,
    SearchResult,
    StudyMismatch,
    Trial,
    load_result,
    make_proposer,
    search,
    spread_along_front,
    watch,
)
from nestling.search.opening import open_queue
from nestling.search.queue import Queue, Task
from nestling.space import Arch, Choice, SearchSpace

Evaluate = Callable[[Arch], Metrics]


class InterruptedSearchError(Exception):
    """Stands for whatever ends a process."""


def stored_trials(file: Path) -> list[FrozenTrial]:
    """The trials as any other Optuna tool sees them."""
    return optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").trials


def true_front(space: SearchSpace, toy: Evaluate, *, latency_ms: float) -> set[str]:
    found = {arch.key: toy(arch) for arch in space.walk() if toy(arch)["latency_ms"] <= latency_ms}
    points = {key: (-metrics["top1"], metrics["latency_ms"]) for key, metrics in found.items()}
    return {
        key
        for key, (error, cost) in points.items()
        if not any(e <= error and c <= cost and (e, c) != (error, cost) for e, c in points.values())
    }


def test_a_space_searched_whole_gives_the_true_front_and_evaluates_each_arch_once(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    small = space.only({"resolution": [16], "width": [1, 3], "depth": [1, 3]})
    problem = Problem.parse(small, objectives=["top1", "latency_ms"], limits={"latency_ms": 12.0})
    evaluated: Counter[Arch] = Counter()

    def evaluate(arch: Arch) -> Metrics:
        evaluated[arch] += 1
        return toy(arch)

    result = search(problem, evaluate, storage=file, name="toy", trials=1000, population=4)
    assert set(evaluated) == set(small.walk())
    assert set(evaluated.values()) == {1}
    expected = true_front(small, toy, latency_ms=12.0)
    assert {trial.arch.key for trial in result.front} == expected
    assert {trial.state for trial in result.trials} == {"complete"}
    costs = [trial.metrics["latency_ms"] for trial in result.front]
    assert costs == sorted(costs)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{file}")
    assert {Arch.from_json(trial.user_attrs["arch"]).key for trial in study.best_trials} == expected


def test_the_ends_come_first_and_trials_counts_different_archs(
    problem: Problem, toy: Evaluate, file: Path
) -> None:
    result = search(problem, toy, storage=file, name="toy", trials=12, warm_start=4)
    archs = [trial.arch for trial in result.trials]
    assert archs[:2] == [problem.space.smallest, problem.space.largest]
    assert set(archs[:4]) == set(problem.space.spread(4))
    assert len(result.complete) == 12
    assert len({trial.arch for trial in result.complete}) == 12


def test_seeds_are_tried_right_after_the_archs_that_are_spread(
    problem: Problem, toy: Evaluate, file: Path
) -> None:
    seeds = [problem.space.sample(random.Random(number)) for number in range(3)]
    result = search(problem, toy, storage=file, name="toy", trials=9, warm_start=4, seeds=seeds)
    spread = problem.space.spread(4)
    wanted = list(dict.fromkeys([problem.space.smallest, problem.space.largest, *spread, *seeds]))
    assert [trial.arch for trial in result.trials][: len(wanted)] == wanted
    assert set(seeds) - set(spread)


def test_every_trial_is_told_once_in_order_when_it_is_stored(
    problem: Problem, toy: Evaluate, file: Path
) -> None:
    seen: list[Trial] = []

    def on_trial(trial: Trial, result: SearchResult) -> None:
        assert result.trials[trial.number] == trial
        assert len(stored_trials(file)) > trial.number
        seen.append(trial)

    result = search(problem, toy, storage=file, name="toy", trials=6, population=4, on_trial=on_trial)
    assert seen == list(result.trials)
    assert [trial.number for trial in seen] == list(range(6))


def test_a_failed_evaluation_is_recorded_with_its_reason_and_never_feasible(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    problem = Problem.parse(
        space, objectives=["top1", "latency_ms"], limits={"latency_ms": 40.0, "top1": 0.3}
    )

    def evaluate(arch: Arch) -> Metrics:
        if arch["width"] == 4:
            raise EvaluationFailed("the runtime crashed")
        return toy(arch)

    result = search(problem, evaluate, storage=file, name="toy", trials=15)
    assert result.failed
    assert {trial.reason for trial in result.failed} == {"the runtime crashed"}
    assert len(result.failed) + len(result.complete) == 15
    assert not {trial.number for trial in result.failed} & {trial.number for trial in result.front}
    for trial in stored_trials(file):
        failed = trial.state == TrialState.FAIL
        assert failed == (Arch.from_json(trial.user_attrs["arch"])["width"] == 4)
        metrics = trial.user_attrs.get("metrics")
        expected = {limit.metric: limit.violation(metrics) if metrics else 1.0 for limit in problem.limits}
        assert trial.constraints == expected


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"top1": math.nan, "latency_ms": 1.0}, "top1 is nan"),
        ({"top1": 0.5, "latency_ms": math.inf}, "latency_ms is inf"),
        ({"top1": 0.5, "latency_ms": -math.inf}, "latency_ms is -inf"),
        ({"top1": 0.5}, "latency_ms was not measured"),
    ],
)
def test_metrics_that_are_no_numbers_fail_the_trial(
    problem: Problem, toy: Evaluate, file: Path, broken: Metrics, reason: str
) -> None:
    result = search(
        problem,
        lambda arch: broken if arch == problem.space.largest else toy(arch),
        storage=file,
        name="toy",
        trials=3,
    )
    assert [(trial.arch, trial.reason) for trial in result.failed] == [(problem.space.largest, reason)]
    assert problem.space.largest not in {trial.arch for trial in result.front}


def test_a_limit_that_cannot_be_kept_is_said_after_one_evaluation(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    problem = Problem.parse(space, objectives=["top1"], limits={"latency_ms": 0.5})
    evaluated: list[Arch] = []

    def evaluate(arch: Arch) -> Metrics:
        evaluated.append(arch)
        return toy(arch)

    for _ in range(2):
        with pytest.raises(InfeasibleLimit, match=r"latency_ms at most 0.5: the smallest one .* 1.3"):
            search(problem, evaluate, storage=file, name="toy", trials=5)
    assert evaluated == [space.smallest]


@pytest.mark.parametrize("sampler", ["NSGAIISampler", "TPESampler", "QMCSampler", "GridSampler"])
def test_a_search_that_is_interrupted_anywhere_goes_on_as_if_it_had_not_been(
    problem: Problem, toy: Evaluate, tmp_path: Path, sampler: str
) -> None:
    def run(file: Path, evaluate: Evaluate) -> SearchResult:
        return search(
            problem,
            evaluate,
            storage=file,
            name="toy",
            trials=13,
            strategy=sampler,
            population=4,
            warm_start=0,
        )

    whole = run(tmp_path / "whole.db", toy)
    evaluated: list[Arch] = []
    interrupt = count(1)

    def interrupted_at_every_fifth(arch: Arch) -> Metrics:
        if next(interrupt) % 5 == 0:
            raise InterruptedSearchError
        evaluated.append(arch)
        return toy(arch)

    result = None
    for _ in range(20):
        try:
            result = run(tmp_path / "parts.db", interrupted_at_every_fifth)
            break
        except InterruptedSearchError:
            continue
    assert result is not None
    assert [trial.arch for trial in result.trials] == [trial.arch for trial in whole.trials]
    assert [trial.state for trial in result.trials] == [trial.state for trial in whole.trials]
    assert len(evaluated) == len(set(evaluated)) == 13


def test_a_search_with_a_plan_ends_with_it_once_others_have_ended_theirs(
    problem: Problem, toy: Evaluate, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_proposer("sorted_net", problem).propose(problem, [], pending=[], count=99, seed=0)
    theirs = next(arch for arch in problem.space.walk() if arch not in chain)
    tried: list[Arch] = []

    def evaluate(arch: Arch) -> Metrics:
        tried.append(arch)
        return toy(arch)

    run = partial(search, problem, evaluate, storage=file, name="toy", strategy="sorted_net", warm_start=4)
    with open_queue(problem, file, "toy") as queue:
        another = Queue(queue.record, owner="another")
        another.offer([theirs])
        task = another.next(99)
        assert isinstance(task, Task)

        def sleep(_: float) -> None:
            assert set(tried) == set(chain)
            another.next(1, outcome=(task, Trial(0, theirs, toy(theirs), "complete")))

        monkeypatch.setattr(time, "sleep", sleep)
        result = run(trials=99)
    assert {trial.arch for trial in result.complete} == {*chain, theirs}
    assert run(trials=99).trials == result.trials
    assert len(tried) == len(chain)
    more = len(chain) + 4
    assert len(search(problem, toy, storage=file, name="toy", strategy="random", trials=more).trials) == more


def test_who_watches_a_search_with_a_plan_sees_its_end(problem: Problem, toy: Evaluate, file: Path) -> None:
    def work(done: int) -> bool:
        if done == 0:
            search(problem, toy, storage=file, name="toy", strategy="sorted_net", trials=99)
        return False

    result = watch(problem, storage=file, name="toy", trials=99, while_waiting=work)
    assert result.trials == load_result(problem, storage=file, name="toy").trials
    assert 0 < len(result.trials) < 99


def test_another_seed_tries_other_archs(
    problem: Problem, toy: Evaluate, empty_study_file: Path, tmp_path: Path
) -> None:
    tried = []
    for seed in (0, 1):
        file = Path(shutil.copy(empty_study_file, tmp_path / f"{seed}.db"))
        result = search(
            problem, toy, storage=file, name="toy", trials=8, strategy="random", warm_start=0, seed=seed
        )
        tried.append({trial.arch for trial in result.trials})
    assert tried[0] != tried[1]


def test_a_finished_search_is_not_evaluated_again_and_can_be_widened(
    problem: Problem, toy: Evaluate, file: Path
) -> None:
    result = search(problem, toy, storage=file, name="toy", trials=10)

    def never(arch: Arch) -> Metrics:
        raise AssertionError(f"{arch.key} was evaluated")

    assert search(problem, never, storage=file, name="toy", trials=10) == result
    assert load_result(problem, storage=file, name="toy") == result
    wider = search(problem, toy, storage=file, name="toy", trials=12)
    assert wider.trials[: len(result.trials)] == result.trials
    assert len(wider.complete) == 12


def test_a_result_that_was_never_stored_is_empty_and_makes_no_file(problem: Problem, tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    assert load_result(problem, storage=file, name="toy").trials == ()
    assert not file.exists()


def test_a_result_of_another_name_is_empty(problem: Problem, toy: Evaluate, file: Path) -> None:
    search(problem, toy, storage=file, name="toy", trials=1)
    assert load_result(problem, storage=file, name="other").trials == ()


def test_seconds_are_those_of_the_evaluation(problem: Problem, toy: Evaluate, file: Path) -> None:
    ticks = count()
    result = search(problem, toy, storage=file, name="toy", trials=2, clock=lambda: float(next(ticks)))
    assert [trial.seconds for trial in result.trials] == [1.0, 1.0]


def test_one_objective_has_one_best(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    problem = Problem.parse(space, objectives=["latency_ms"], limits={})
    result = search(problem, toy, storage=file, name="toy", trials=6)
    assert [trial.arch for trial in result.front] == [space.smallest]


def test_a_space_without_open_choices_is_evaluated_once(
    toy: Evaluate, file: Path, space: SearchSpace
) -> None:
    only = SearchSpace("toy", tuple(Choice(c.name, c.values[:1]) for c in space.choices))
    problem = Problem.parse(only, objectives=["top1", "latency_ms"], limits={})
    result = search(problem, toy, storage=file, name="toy", trials=5)
    assert [trial.arch for trial in result.trials] == [only.smallest]


def test_a_front_is_spread_with_its_ends(problem: Problem, toy: Evaluate, file: Path) -> None:
    result = search(problem, toy, storage=file, name="toy", trials=14)
    assert len(result.front) > 3
    chosen = spread_along_front(result, 3)
    assert len(chosen) == 3
    assert (chosen[0], chosen[-1]) == (result.front[0], result.front[-1])
    assert spread_along_front(SearchResult(problem, ()), 3) == ()


def test_a_path_with_odd_characters_is_that_file(problem: Problem, toy: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "a b{c}?d#%41.db"
    search(problem, toy, storage=file, name="toy", trials=1)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert len(load_result(problem, storage=file, name="toy").trials) == 1


def test_a_study_of_another_problem_is_refused(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    def problem(space: SearchSpace = space, bound: float = 9.0) -> Problem:
        return Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": bound})

    search(problem(), toy, storage=file, name="toy", trials=1)
    with pytest.raises(
        StudyMismatch, match=r"study.db holds the study 'toy' with other limits; `nestling search` lays"
    ):
        search(problem(bound=8.0), toy, storage=file, name="toy", trials=2)
    unlinked = SearchSpace("toy", tuple(Choice(c.name, c.values) for c in space.choices))
    with pytest.raises(StudyMismatch, match="differs in space"):
        load_result(problem(unlinked), storage=file, name="toy")


def test_trials_that_others_wrote_are_refused(problem: Problem, toy: Evaluate, file: Path) -> None:
    search(problem, toy, storage=file, name="toy", trials=1)
    optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").ask()
    with pytest.raises(StudyMismatch, match=r"trial 1 \(RUNNING\) of the study 'toy' was not written"):
        search(problem, toy, storage=file, name="toy", trials=2)


def test_trials_that_others_write_meanwhile_are_refused(problem: Problem, toy: Evaluate, file: Path) -> None:
    def evaluate(arch: Arch) -> Metrics:
        optuna.load_study(study_name="toy", storage=f"sqlite:///{file}").ask()
        return toy(arch)

    with pytest.raises(StudyMismatch, match=r"trial 0 \(RUNNING\) of the study 'toy' was not written"):
        search(problem, evaluate, storage=file, name="toy", trials=2)


def test_a_file_that_is_no_database_is_refused_and_kept(problem: Problem, toy: Evaluate, file: Path) -> None:
    file.write_text("a letter to my mother")
    with pytest.raises(StudyMismatch, match=r"study.db is not an SQLite file"):
        search(problem, toy, storage=file, name="toy", trials=1)
    assert file.read_text() == "a letter to my mother"


def test_a_folder_that_is_not_there_is_named(problem: Problem, toy: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        search(problem, toy, storage=tmp_path / "nowhere" / "study.db", name="toy", trials=1)
