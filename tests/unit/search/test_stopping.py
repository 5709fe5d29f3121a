"""Stopping: a search ends where candidates hardly add to its front, at the same trial whoever looks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nestling.search import (
    Metrics,
    Problem,
    Stopping,
    Trial,
    change_limits,
    correct_trial,
    load_result,
    load_stop,
    search,
    stopping,
    watch,
)
from nestling.search.stopping import gained
from nestling.space import Arch, SearchSpace


def trials_of(space: SearchSpace, accuracies: list[float]) -> list[Trial]:
    """Of one latency each but for the first, which sets the other end of the scale."""
    return [
        Trial(n, space.smallest, {"top1": top1, "latency_ms": 2.0 if n == 0 else 1.0}, "complete")
        for n, top1 in enumerate(accuracies)
    ]


def test_the_gain_is_that_of_the_hypervolume_from_a_little_beyond_the_worst(problem: Problem) -> None:
    trials = trials_of(problem.space, [0.5, 0.6, 0.7])
    # scaled: (0, 0), (-0.5, -1), (-1, -1); the reference is 0.1 beyond (0, 0)
    assert gained(problem, trials, window=1) == pytest.approx(1 - 0.6 * 1.1 / (1.1 * 1.1))
    assert gained(problem, trials[:2], window=1) == pytest.approx(1 - 0.1 * 0.1 / (1.1 * 1.1))


def test_trials_that_keep_no_limit_gain_nothing_and_stop_nothing(space: SearchSpace) -> None:
    limited = Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": 1.5})
    trials = trials_of(space, [0.9, 0.5, 0.5])
    assert gained(limited, trials, window=1) == pytest.approx(0.0)
    assert gained(limited, trials[:1], window=1) is None
    beyond = Problem.parse(space, objectives=["top1", "latency_ms"], limits={"latency_ms": 0.5})
    assert Stopping(beyond, 0.5).look(trials_of(space, [0.5] * 60)) is None


def test_it_stops_once_the_last_twenty_add_too_little_and_not_before(problem: Problem) -> None:
    trials = trials_of(problem.space, [0.5 + 0.01 * min(n, 29) for n in range(100)])
    stop = Stopping(problem, 0.01).look(trials)
    assert stop is not None
    assert (stop.trials, stop.window) == (50, 20)  # the last that added anything is number 29
    assert Stopping(problem, 0.01).look(trials[:49]) is None
    assert Stopping(problem, 0.9).look(trials) == Stopping(problem, 0.9).look(trials[:40])
    assert Stopping(problem, 0.0).look(trials) is None


def test_looking_now_and_then_finds_the_same_place_as_looking_once(problem: Problem) -> None:
    trials = trials_of(problem.space, [0.5 + 0.01 * min(n, 29) + 0.2 * (n >= 60) for n in range(100)])
    often = Stopping(problem, 0.01)
    found = [often.look(trials[:count]) for count in range(101)]
    assert found[49] is None
    assert set(found[50:]) == {Stopping(problem, 0.01).look(trials)}


@pytest.mark.parametrize("below", [-0.1, 1.0, float("nan")])
def test_a_part_that_is_none_is_refused(problem: Problem, below: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), not"):
        Stopping(problem, below)


def never(asked: Arch | int) -> Any:
    raise AssertionError(f"{asked} is asked for")


def test_a_search_ends_there_is_not_continued_and_leaves_nothing_begun(
    problem: Problem, toy: Callable[[Arch], Metrics], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "LEAST_WINDOW", 5)
    run = partial(search, problem, storage=file, name="toy", strategy="random")
    stopped = run(toy, trials=100, stop_below=0.5)
    assert len(stopped.trials) in range(10, 30)
    assert run(never, trials=100, stop_below=0.5).trials == stopped.trials
    on = run(toy, trials=len(stopped.trials) + 2)
    assert on.trials[:-2] == stopped.trials
    assert len({trial.arch for trial in on.complete}) == len(on.trials)


def test_an_end_holds_where_metrics_are_taken_again_until_something_else_is_asked_for(
    problem: Problem, toy: Callable[[Arch], Metrics], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "LEAST_WINDOW", 5)
    where: Any = {"storage": file, "name": "toy"}
    run = partial(search, problem, storage=file, name="toy", strategy="random", trials=100)
    assert load_stop(problem, 0.5, **where) is None
    stopped = run(toy, stop_below=0.5)
    found = load_stop(problem, 0.5, **where)
    assert found == Stopping(problem, 0.5).look(stopped.trials)
    for trial in stopped.trials[:-5]:  # all that came last beats whatever was there before
        correct_trial(problem, trial, {"top1": 0.01, "latency_ms": 1e3 + trial.number}, **where)
    corrected = load_result(problem, **where)
    assert Stopping(problem, 0.5).look(corrected.trials) is None
    assert run(never, stop_below=0.5).trials == corrected.trials
    assert watch(problem, **where, trials=100, stop_below=0.5, while_waiting=never).trials == corrected.trials
    assert load_stop(problem, 0.5, **where) == found
    assert load_stop(problem, 0.4, **where) is None
    limited = Problem.parse(problem.space, objectives=["top1", "latency_ms"], limits={"latency_ms": 1e5})
    change_limits(limited, **where)
    assert load_stop(limited, 0.5, **where) is None
    more = len(stopped.trials) + 1
    on = search(limited, toy, storage=file, name="toy", strategy="random", trials=more, stop_below=0.5)
    assert len(on.trials) == more


def test_who_watches_sees_the_end_as_well(
    problem: Problem, toy: Callable[[Arch], Metrics], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "LEAST_WINDOW", 5)
    stopped = search(problem, toy, storage=file, name="toy", strategy="random", trials=100, stop_below=0.5)

    def waiting(done: int) -> bool:
        raise InterruptedError(f"{done} are done")

    seen = partial(watch, problem, storage=file, name="toy", trials=100, while_waiting=waiting)
    assert seen(stop_below=0.5).trials == stopped.trials
    with pytest.raises(InterruptedError, match=f"{len(stopped.trials)} are done"):
        seen()
