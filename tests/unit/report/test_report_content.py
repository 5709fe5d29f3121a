from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nestling.report import Member, ReportContent, TrainingPoint, TriedArch
from nestling.search import Objective
from nestling.space import Choice, Need, SearchSpace, Value


def test_json_gives_back_the_same_content(content: ReportContent) -> None:
    assert ReportContent.from_json(content.to_json()) == content


def test_json_keeps_the_type_of_every_decision(content: ReportContent, member: Member) -> None:
    decisions: dict[str, Value] = {"a": 1, "b": 1.0, "c": "1", "d": True}
    changed = replace(content, members=(replace(member, decisions=decisions),))
    back = ReportContent.from_json(changed.to_json()).members[0].decisions
    assert [type(value) for value in back.values()] == [int, float, str, bool]


def test_a_loss_that_is_not_a_number_still_makes_valid_json(content: ReportContent) -> None:
    broken = replace(content, training=(TrainingPoint(0, loss=math.nan), TrainingPoint(1, loss=math.inf)))
    assert [point["loss"] for point in json.loads(broken.to_json())["training"]] == [None, None]
    assert [point.loss for point in ReportContent.from_json(broken.to_json()).training] == [None, None]


def test_json_that_lacks_a_field_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="command"):
        ReportContent.from_json('{"title": "x", "created": "2026-11-21"}')


def test_an_accuracy_in_percent_is_refused(member: Member) -> None:
    with pytest.raises(ValueError, match=r"test_top1 of 'small' must be a fraction in \[0, 1\], not 95.1"):
        replace(member, test_top1=95.1)


@pytest.mark.parametrize("latency_ms", [math.nan, math.inf, -1.0])
def test_a_latency_that_is_no_time_is_refused(member: Member, latency_ms: float) -> None:
    with pytest.raises(ValueError, match="latency_ms of 'small'"):
        replace(member, latency_ms=latency_ms)


def test_two_members_with_one_arch_are_refused(content: ReportContent, member: Member) -> None:
    with pytest.raises(ValueError, match="two members share the arch key 000000000000"):
        replace(content, members=(member, member))


def test_members_are_ordered_by_the_first_cost(content: ReportContent) -> None:
    assert [member.name for member in content.ordered_members] == ["small", "middle", "large"]
    by_macs = replace(content, objectives=(Objective("mmacs", "minimise"), content.objectives[1]))
    assert by_macs.cost_metrics == ("mmacs", "latency_ms")
    assert [member.name for member in by_macs.ordered_members] == ["small", "middle", "large"]


def test_without_a_cost_objective_or_a_latency_the_macs_are_the_cost(member: Member) -> None:
    untimed = replace(member, latency_ms=None, latency_interval_ms=None)
    content = ReportContent(
        "t", "2026-11-21", "c", members=(untimed,), objectives=(Objective("top1", "maximise"),)
    )
    assert content.cost_metrics == ("mmacs",)


def test_only_a_complete_trial_has_a_metric() -> None:
    metrics = {"top1": 0.9, "latency_ms": math.inf}
    complete = TriedArch(0, "a", {}, "complete", metrics)
    assert complete.metric("top1") == 0.9
    assert complete.metric("latency_ms") is None
    assert replace(complete, state="failed").metric("top1") is None


def test_a_kernel_of_a_block_beyond_the_depth_is_idle(content: ReportContent) -> None:
    assert content.idle({"s1.depth": 1, "s1.b2.kernel": 3}) == {"s1.b2.kernel"}
    assert content.idle({"s1.depth": 2, "s1.b2.kernel": 3}) == set()


def test_the_report_holds_idle_what_the_space_does(content: ReportContent) -> None:
    space = SearchSpace(
        "toy",
        (
            Choice("depth", (1, 2)),
            Choice("heads", (0, 2, 4), (Need("depth", 2),)),
            Choice("window", (3, 5), (Need("heads", 2),)),
        ),
    )
    told = replace(content, choices=space.open_choices)
    decisions: list[dict[str, Value]] = [
        {"depth": depth, "heads": heads, "window": 3} for depth in (1, 2) for heads in (0, 2, 4)
    ]
    assert [told.idle(each) for each in decisions] == [
        {choice.name for choice in space.choices if space.is_idle(choice, each)} for each in decisions
    ]
    assert told.idle({"depth": 1, "heads": 4, "window": 3}) == {"heads", "window"}
    assert told.idle({"depth": 2, "heads": 0, "window": 3}) == {"window"}
