from __future__ import annotations

import random
from dataclasses import replace

import pytest

from nestling.report import ReportContent, TriedArch
from nestling.report.page import report_html
from nestling.report.tried import by_time, failures, front_growth, usages, within_limits
from nestling.search import Limit, Objective


def test_the_growth_by_time_counts_every_trial_that_took_some(content: ReportContent) -> None:
    growth = front_growth(replace(content, limits=()))
    assert [number for number, _ in growth] == [0, 1, 3]
    assert by_time(content, growth) == []
    taken = tuple(replace(trial, seconds=10.0 * (trial.number + 1)) for trial in content.trials)
    timed = by_time(replace(content, trials=taken), growth)
    # the third trial failed after 30 seconds
    assert timed == [(seconds, volume) for seconds, (_, volume) in zip((10, 30, 100), growth, strict=True)]


@pytest.mark.parametrize(("seconds", "label"), [(0.5, "(s)"), (30.0, "(min)"), (7200.0, "(h)")])
def test_the_page_shows_the_growth_by_time_in_a_unit_that_suits(
    content: ReportContent, seconds: float, label: str
) -> None:
    taken = tuple(replace(trial, seconds=seconds) for trial in content.trials)
    assert f"Time of evaluation, of all workers {label}" in report_html(
        replace(content, limits=(), trials=taken)
    )
    assert "Time of evaluation" not in report_html(replace(content, limits=()))


def test_shares_count_only_archs_in_which_the_choice_is_not_idle(content: ReportContent) -> None:
    by_name = {usage.choice.name: usage for usage in usages(content)}
    assert by_name["s1.depth"].tried == pytest.approx((1 / 3, 2 / 3))
    assert by_name["s1.depth"].front == pytest.approx((1 / 2, 1 / 2))
    assert by_name["s1.b2.kernel"].tried == (1.0, 0.0)
    assert by_name["s1.b2.kernel"].active == 0.5


def test_the_choice_with_the_largest_shift_comes_first(content: ReportContent) -> None:
    shifts = [usage.shift for usage in usages(content)]
    assert shifts == sorted(shifts, reverse=True)
    assert shifts[0] == pytest.approx(1 / 6)


def beyond(values: list[float]) -> float:
    return max(values) + 0.1 * (max(values) - min(values))


def brute_force_growth(trials: tuple[TriedArch, ...]) -> list[float]:
    points = [(trial.metrics["latency_ms"] or 0.0, -(trial.metrics["top1"] or 0.0)) for trial in trials]
    worst = (beyond([x for x, _ in points]), beyond([y for _, y in points]))
    xs, ys = sorted({x for x, _ in points}), sorted({y for _, y in points})

    def area(seen: list[tuple[float, float]]) -> float:
        cells = 0.0
        for x, next_x in zip([*xs, worst[0]], [*xs[1:], worst[0]], strict=False):
            for y, next_y in zip([*ys, worst[1]], [*ys[1:], worst[1]], strict=False):
                if any(a <= x and b <= y for a, b in seen):
                    cells += (next_x - x) * (next_y - y)
        return cells

    return [100 * area(points[: end + 1]) / area(points) for end in range(len(points))]


def test_the_growth_of_the_front_is_the_area_that_brute_force_counts() -> None:
    rng = random.Random(5)
    trials = tuple(
        TriedArch(n, str(n), {}, "complete", {"top1": rng.random(), "latency_ms": rng.random()})
        for n in range(12)
    )
    goals = (Objective("top1", "maximise"), Objective("latency_ms", "minimise"))
    growth = front_growth(ReportContent("t", "2026-11-21", "c", trials=trials, objectives=goals))
    assert [number for number, _ in growth] == list(range(12))
    assert [share for _, share in growth] == pytest.approx(brute_force_growth(trials))


def test_growth_counts_feasible_trials_only(content: ReportContent) -> None:
    bounded = replace(content, limits=(Limit("latency_ms", 1.5),))
    assert [number for number, _ in front_growth(replace(content, limits=()))] == [0, 1, 3]
    assert [number for number, _ in front_growth(bounded)] == [0, 3]


def test_one_objective_has_no_hypervolume(content: ReportContent) -> None:
    assert front_growth(replace(content, objectives=content.objectives[:1])) == []


def test_a_limit_is_a_floor_for_accuracy_and_a_ceiling_for_costs(content: ReportContent) -> None:
    trial = content.trials[0]
    assert within_limits(trial, (Limit("top1", 0.944), Limit("latency_ms", 0.21)))
    assert not within_limits(trial, (Limit("top1", 0.945),))
    assert not within_limits(trial, (Limit("latency_ms", 0.2),))


def test_failures_are_grouped_by_reason_most_frequent_first() -> None:
    reasons = ["slow", "crash", "crash"]
    trials = [TriedArch(n, str(n), {}, "failed", {}, reason) for n, reason in enumerate(reasons)]
    assert failures(trials) == [("crash", [1, 2]), ("slow", [0])]
