"""Limits in words, and limits that are changed after candidates were tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest

from nestling.search import (
    Metrics,
    Problem,
    SearchResult,
    StudyMismatch,
    change_limits,
    load_result,
    parse_limits,
    search,
)
from nestling.space import Arch, SearchSpace

Evaluate = Callable[[Arch], Metrics]


def limited(space: SearchSpace, **limits: float) -> Problem:
    return Problem.parse(space, objectives=["top1", "latency_ms"], limits=limits)


def by_optuna(file: Path) -> optuna.Study:
    return optuna.load_study(study_name="toy", storage=f"sqlite:///{file}")


def test_words_become_limits() -> None:
    found = parse_limits(at_most=["latency_ms=5", "size_mb=0.5"], at_least=["top1=0.9"])
    assert found == {"latency_ms": 5.0, "size_mb": 0.5, "top1": 0.9}


@pytest.mark.parametrize(
    ("at_most", "at_least", "message"),
    [
        (["latency_ms"], [], "--at-most 'latency_ms' must be a metric and a number, such as latency_ms=5"),
        (["latency_ms=fast"], [], "--at-most 'latency_ms=fast' must be"),
        (["latency=5"], [], "unknown metric 'latency' for a search limit; did you mean 'latency_ms'"),
        (["top1=0.9"], [], "--at-least top1=0.9 is meant"),
        ([], ["latency_ms=5"], "--at-most latency_ms=5 is meant"),
        (["latency_ms=5", "latency_ms=6"], [], "limited twice, to 5 and 6"),
        ([], ["top1=90"], "write 0.9 for 90 %"),
    ],
)
def test_words_that_are_no_limits_are_refused(
    at_most: Sequence[str], at_least: Sequence[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_limits(at_most=at_most, at_least=at_least)


def test_other_limits_judge_what_was_tried_before(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    found = search(limited(space), toy, storage=file, name="toy", trials=12, strategy="random")
    strict = limited(space, latency_ms=8.0, top1=0.6)
    with pytest.raises(StudyMismatch, match="with other limits; `nestling search` lays"):
        load_result(strict, storage=file, name="toy")
    assert change_limits(strict, storage=file, name="toy") == 12
    assert change_limits(strict, storage=file, name="toy") == 0
    judged = load_result(strict, storage=file, name="toy")
    assert judged.trials == found.trials
    study = by_optuna(file)
    expected = [{lim.metric: lim.violation(t.metrics) for lim in strict.limits} for t in found.trials]
    assert [trial.constraints for trial in study.trials] == expected
    assert 0 < len(judged.front) < len(found.front)
    assert {trial.number for trial in study.best_trials} == {trial.number for trial in judged.front}
    assert change_limits(limited(space), storage=file, name="toy") == 12
    assert {len(trial.constraints) for trial in by_optuna(file).trials} == {0}


def test_a_failed_trial_keeps_no_limit(space: SearchSpace, file: Path) -> None:
    search(limited(space), lambda _: {}, storage=file, name="toy", trials=1)
    change_limits(limited(space, latency_ms=8.0), storage=file, name="toy")
    study = by_optuna(file)
    assert [trial.constraints for trial in study.trials] == [{"latency_ms": 1.0}]


def test_a_limit_on_what_was_not_measured_is_refused(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    search(limited(space), toy, storage=file, name="toy", trials=2)
    with pytest.raises(StudyMismatch, match=r"2 candidates .* were evaluated without mmacs, which is to be"):
        change_limits(limited(space, mmacs=5.0), storage=file, name="toy")
    assert len(load_result(limited(space), storage=file, name="toy").trials) == 2


def test_nothing_is_changed_where_there_is_no_such_study(
    space: SearchSpace, file: Path, tmp_path: Path
) -> None:
    strict = limited(space, latency_ms=8.0)
    assert change_limits(strict, storage=tmp_path / "none.db", name="toy") == 0
    assert not (tmp_path / "none.db").exists()
    assert change_limits(strict, storage=file, name="toy") == 0
    empty = tmp_path / "empty.db"
    empty.touch()
    assert change_limits(strict, storage=empty, name="toy") == 0


def test_the_limits_of_a_study_of_something_else_stay(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    strict, mine = limited(space, latency_ms=8.0), {"images": "these", "weights": "mine"}
    search(limited(space), toy, storage=file, name="toy", trials=2, about=mine)
    before = file.read_bytes()
    smaller = limited(space.only({space.open_choices[0].name: space.open_choices[0].values[:1]}))
    ours = limited(space)
    for other, about, differing in (
        (Problem.parse(space, objectives=["top1"], limits={}), mine, "objectives"),
        (Problem.parse(space, objectives=["top1"], limits={"latency_ms": 8.0}), mine, "objectives, limits"),
        (smaller, mine, "space"),
        (strict, {**mine, "weights": "yours"}, "limits, weights"),
        (ours, {**mine, "weights": ""}, "weights"),
    ):
        with pytest.raises(StudyMismatch, match=rf"of another problem \(it differs in {differing}\)"):
            change_limits(other, storage=file, name="toy", about=about)
        assert file.read_bytes() == before
    assert change_limits(strict, storage=file, name="toy", about=mine) == 2


def test_trials_of_another_tool_have_no_limits_laid_over(space: SearchSpace, file: Path) -> None:
    theirs = optuna.create_study(
        study_name="toy", storage=f"sqlite:///{file}", directions=["maximize", "minimize"]
    )
    theirs.add_trial(optuna.trial.create_trial(values=[0.5, 1.0]))
    with pytest.raises(StudyMismatch, match="was not written by a search of Nestling"):
        change_limits(limited(space), storage=file, name="toy")


def test_a_search_under_way_hears_of_other_limits(space: SearchSpace, toy: Evaluate, file: Path) -> None:
    def evaluate(arch: Arch) -> Metrics:
        if arch == space.largest:
            change_limits(limited(space, latency_ms=8.0), storage=file, name="toy")
        return toy(arch)

    with pytest.raises(StudyMismatch, match="was given other limits meanwhile; start again"):
        search(limited(space), evaluate, storage=file, name="toy", trials=4)
    assert len(load_result(limited(space, latency_ms=8.0), storage=file, name="toy").trials) == 1


def test_the_best_is_the_most_accurate_that_keeps_all_limits(
    space: SearchSpace, toy: Evaluate, file: Path
) -> None:
    problem = limited(space, latency_ms=8.0)
    result = search(problem, toy, storage=file, name="toy", trials=30, strategy="random")
    kept = [trial for trial in result.complete if trial.metrics["latency_ms"] <= 8.0]
    assert result.best is not None
    assert result.best.metrics["top1"] == max(trial.metrics["top1"] for trial in kept)
    assert SearchResult(problem, ()).best is None
