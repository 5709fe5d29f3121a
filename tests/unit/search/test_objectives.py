"""What a search is after: parsing, violations, and limits that cannot be kept."""

from __future__ import annotations

import pytest

from nestling.search import InfeasibleLimit, Limit, Objective, Problem, SearchResult, Trial, check_limits
from nestling.space import Arch, Choice, SearchSpace

SPACE = SearchSpace("toy", (Choice("width", (1, 2)),))


def test_a_ceiling_is_broken_from_above_and_a_floor_from_below() -> None:
    latency, top1 = Limit("latency_ms", 4.0), Limit("top1", 0.8)
    assert latency.violation({"latency_ms": 5.0}) == pytest.approx(0.25)
    assert latency.violation({"latency_ms": 3.0}) == pytest.approx(-0.25)
    assert top1.violation({"top1": 0.6}) == pytest.approx(0.25)
    assert top1.violation({"top1": 1.0}) == pytest.approx(-0.25)


def test_a_network_exactly_on_its_limits_is_feasible() -> None:
    problem = Problem.parse(SPACE, objectives=["top1"], limits={"latency_ms": 4.0, "top1": 0.8})
    assert problem.feasible({"latency_ms": 4.0, "top1": 0.8})
    assert not problem.feasible({"latency_ms": 4.1, "top1": 0.8})
    assert not problem.feasible({"latency_ms": 4.0, "top1": 0.7})


def test_only_accuracy_is_maximised() -> None:
    problem = Problem.parse(SPACE, objectives=["top1", "mmacs"], limits={})
    assert problem.losses({"top1": 0.75, "mmacs": 3.0}) == (-0.75, 3.0)


def test_an_evaluation_must_bring_objectives_and_limited_metrics_once_each() -> None:
    problem = Problem.parse(SPACE, objectives=["top1", "size_mb"], limits={"size_mb": 2.0, "peak_mb": 1.0})
    assert problem.needed() == ("top1", "size_mb", "peak_mb")


def test_an_unknown_metric_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'latency' .* objective; did you mean 'latency_ms'"):
        Objective.parse("latency")
    with pytest.raises(ValueError, match=r"unknown metric 'qqq' for a search limit; known: top1, latency_ms"):
        Limit("qqq", 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_must_be_a_positive_number(bound: float) -> None:
    with pytest.raises(ValueError, match=r"the limit on size_mb is .* positive"):
        Limit("size_mb", bound)


def test_an_accuracy_in_percent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the limit on top1 is 95; write 0.9 for 90 %"):
        Limit("top1", 95)


def test_nothing_is_listed_twice() -> None:
    with pytest.raises(ValueError, match="an objective is listed twice: top1, top1"):
        Problem.parse(SPACE, objectives=["top1", "top1"], limits={})
    with pytest.raises(ValueError, match="two limits: mmacs at most 1, mmacs at most 2"):
        Problem(SPACE, (Objective.parse("top1"),), (Limit("mmacs", 1.0), Limit("mmacs", 2.0)))
    with pytest.raises(ValueError, match="at least one objective"):
        Problem.parse(SPACE, objectives=[], limits={})


def test_a_limit_that_the_smallest_network_breaks_is_infeasible() -> None:
    problem = Problem.parse(SPACE, objectives=["top1"], limits={"mmacs": 2.0, "size_mb": 0.5})
    with pytest.raises(InfeasibleLimit, match=r"mmacs at most 2: the smallest .* mmacs 2.1"):
        check_limits(problem, smallest={"top1": 0.1, "mmacs": 2.1, "size_mb": 0.5})
    check_limits(problem, smallest={"mmacs": 2.0})


def test_a_cost_that_may_be_less_elsewhere_is_refused_from_twice_the_limit_on() -> None:
    problem = Problem.parse(SPACE, objectives=["top1"], limits={"latency_ms": 1.0})
    check_limits(problem, smallest={"top1": 0.1, "latency_ms": 1.9})
    with pytest.raises(InfeasibleLimit, match="latency_ms"):
        check_limits(problem, smallest={"top1": 0.1, "latency_ms": 2.1})


def test_an_accuracy_that_the_smallest_network_lacks_is_not_infeasible() -> None:
    problem = Problem.parse(SPACE, objectives=["mmacs"], limits={"top1": 0.9})
    check_limits(problem, smallest={"top1": 0.1, "mmacs": 1.0})


def test_a_limit_that_nothing_tried_keeps_is_said_with_the_nearest_value() -> None:
    problem = Problem.parse(SPACE, objectives=["mmacs"], limits={"top1": 0.9, "mmacs": 3.0})

    def trial(number: int, top1: float, mmacs: float) -> Trial:
        return Trial(number, Arch((("width", 1),)), {"top1": top1, "mmacs": mmacs}, "complete")

    low = (trial(0, 0.5, 5.0), trial(1, 0.8, 2.0))
    assert SearchResult(problem, low).unmet == (
        "no network tried so far keeps top1 at least 0.9: the nearest has 0.8",
    )
    assert SearchResult(problem, (*low, trial(2, 0.95, 9.0))).unmet == ()
    assert SearchResult(problem, ()).unmet == ()
