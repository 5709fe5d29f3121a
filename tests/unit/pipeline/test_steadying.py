"""Latencies that a search could not tell are taken again before it tells its front."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from nestling.pipeline.steadying import steadied
from nestling.profile import DeviceError, DevicesGoneError
from nestling.search import EvaluationFailed, Metrics, Problem, SearchResult, Trial
from nestling.space import Choice, SearchSpace

SPACE = SearchSpace("toy", (Choice("width", (1, 2, 3, 4)),))
PROBLEM = Problem.parse(SPACE, objectives=["top1", "latency_ms"], limits={})


def timed(latency_ms: float, *, unstable: bool) -> dict[str, float]:
    return {"latency_ms": latency_ms, "latency_unstable": float(unstable)}


def found(*latencies: tuple[float, bool]) -> SearchResult:
    """Networks of rising accuracy, which took so long, stable or not."""
    archs = SPACE.walk()
    return SearchResult(
        PROBLEM,
        tuple(
            Trial(number, arch, {"top1": 0.5 + number / 10, **timed(ms, unstable=unstable)}, "complete")
            for number, (arch, (ms, unstable)) in enumerate(zip(archs, latencies, strict=False))
        ),
    )


class Bench:
    """Times networks as `answers` has it, by their number, and keeps what it is told to."""

    def __init__(self, result: SearchResult, answers: dict[int, list[Metrics | str]]) -> None:
        self.result, self.answers = result, answers
        self.slept: list[float] = []
        self.notes: list[str] = []
        self.doubted: set[int] = set()

    def time_again(self, trial: Trial) -> Metrics:
        answer = self.answers[trial.number].pop(0)
        if isinstance(answer, str):
            raise EvaluationFailed(answer)
        return answer

    def keep(self, trial: Trial, metrics: Metrics) -> SearchResult:
        trials = list(self.result.trials)
        trials[trial.number] = replace(trial, metrics={**trial.metrics, **metrics})
        self.result = SearchResult(PROBLEM, tuple(trials))
        return self.result

    def steadied(self) -> SearchResult:
        return steadied(
            self.result,
            doubted=lambda trial: trial.number in self.doubted,
            time_again=self.time_again,
            keep=self.keep,
            note=self.notes.append,
            pauses=(0.0, 3.0),
            sleep=self.slept.append,
        )


def test_a_stable_front_is_not_timed_again_whatever_is_behind_it() -> None:
    bench = Bench(found((3.0, True), (1.0, False), (2.0, False)), {})
    assert [trial.number for trial in bench.result.front] == [1, 2]
    assert bench.steadied() == bench.result
    assert bench.slept == []


def test_a_member_that_was_only_lucky_makes_room_and_the_next_one_is_timed_too() -> None:
    answers: dict[int, list[Metrics | str]] = {
        2: [timed(9.0, unstable=False)],
        1: [timed(2.5, unstable=False)],
    }
    bench = Bench(found((1.0, False), (3.0, True), (2.0, True), (4.0, False)), answers)
    assert [trial.number for trial in bench.result.front] == [0, 2, 3]
    result = bench.steadied()
    assert [(t.number, t.metrics["latency_ms"]) for t in result.front] == [(0, 1.0), (1, 2.5), (3, 4.0)]
    assert result.unstable == ()
    assert bench.slept == [0.0, 3.0]


def test_what_stays_unstable_is_tried_so_often_and_keeps_what_it_had() -> None:
    bench = Bench(found((1.0, True)), {0: [timed(0.5, unstable=True), timed(0.6, unstable=True)]})
    result = bench.steadied()
    assert [trial.metrics["latency_ms"] for trial in result.unstable] == [1.0]
    assert bench.slept == [0.0, 3.0]


def test_a_doubted_member_is_timed_again_and_said_to_be_unstable_where_it_is() -> None:
    answers: dict[int, list[Metrics | str]] = {
        0: [timed(0.5, unstable=False)],
        1: [timed(0.6, unstable=True), timed(0.7, unstable=True)],
    }
    bench = Bench(found((1.0, False), (2.0, False), (3.0, False)), answers)
    bench.doubted = {0, 1}
    time_again = bench.time_again

    def timing(trial: Trial) -> Metrics:
        metrics = time_again(trial)
        bench.doubted -= {trial.number} if metrics["latency_unstable"] == 0 else set()
        return metrics

    bench.time_again = timing  # type: ignore[method-assign]
    result = bench.steadied()
    assert [trial.metrics["latency_ms"] for trial in result.front] == [0.5, 2.0, 3.0]
    assert [trial.number for trial in result.unstable] == [1]


@pytest.mark.parametrize("end", [EvaluationFailed, KeyboardInterrupt])
def test_a_doubted_member_is_recorded_as_unstable_also_where_timing_it_fails_or_is_ended(
    end: type[BaseException],
) -> None:
    bench = Bench(found((1.0, False), (2.0, False)), {})
    bench.doubted = {1}

    def fails(trial: Trial) -> Metrics:
        raise end(trial.arch.key)

    bench.time_again = fails  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        bench.steadied()
    assert [trial.number for trial in bench.result.unstable] == [1]
    assert [trial.metrics["latency_ms"] for trial in bench.result.front] == [1.0, 2.0]


def test_a_device_that_fails_is_told_of_and_the_others_are_timed() -> None:
    answers: dict[int, list[Metrics | str]] = {0: ["hung", "gone"], 1: [timed(2.0, unstable=False)]}
    bench = Bench(found((1.0, True), (2.1, True)), answers)
    assert [trial.number for trial in bench.steadied().unstable] == [0]
    assert [note.partition(" was ")[2] for note in bench.notes] == [
        "not timed again: hung",
        "not timed again: gone",
    ]


@pytest.mark.parametrize("error", [DeviceError, DevicesGoneError])
@pytest.mark.parametrize("asked", ["doubted", "time_again"])
def test_a_device_that_is_away_is_told_of_once_and_what_is_known_by_then_stays(
    error: type[Exception], asked: str
) -> None:
    answers: dict[int, list[Metrics | str]] = {0: [timed(0.5, unstable=False)]}
    bench = Bench(found((1.0, True), (2.0, asked == "time_again"), (3.0, asked == "time_again")), answers)
    work = bench.time_again

    def away(trial: Trial) -> Metrics:
        if trial.number > 0:
            raise error("the board does not answer")
        return work(trial)

    result = steadied(
        bench.result,
        doubted=lambda trial: asked == "doubted" and bool(away(trial)),
        time_again=away,
        keep=bench.keep,
        note=bench.notes.append,
        sleep=bench.slept.append,
    )
    assert result == bench.result
    first = 1.0 if asked == "doubted" else 0.5  # of a device that is away nothing is asked any more
    assert [trial.metrics["latency_ms"] for trial in result.front] == [first, 2.0, 3.0]
    told = "the front's latencies could not be looked at to the end: the board does not answer"
    assert bench.notes == [told]
    assert bench.slept == ([] if asked == "doubted" else [0.0])


@pytest.mark.parametrize("metrics", [{}, {"latency_unstable": 0.0}])
def test_networks_without_an_unstable_latency_count_as_stable(metrics: Metrics) -> None:
    trial = Trial(0, SPACE.smallest, {"top1": 0.5, "latency_ms": 1.0, **metrics}, "complete")
    assert SearchResult(PROBLEM, (trial,)).unstable == ()
