"""The sentences of a report: its headline, the networks to look at first, and what is said about a mark."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from nestling.report.content import Member, ReportContent, TriedArch
from nestling.report.units import MINUS, byte_size, metric_named, percent, percent_span
from nestling.space import Value

NEAR_BEST = 0.01
"""The loss of accuracy, as a fraction, that "nearly the best" allows."""
MOST_LINES = 12
"""Stages named when a pointer is over a mark."""


def headline(content: ReportContent) -> str:
    """The front in one sentence: how many networks, their range of cost and test accuracy, and the device."""
    members = content.ordered_members
    if not members:
        return "The search handed over no network."
    metric = metric_named(content.cost_metrics[0])
    costs = [cost for member in members if (cost := member.cost(content.cost_metrics[0])) is not None]
    accuracies = [member.test_top1 for member in members]
    words = [f"{len(members)} network{'s' if len(members) > 1 else ''}"]
    if costs:
        words.append(_range(metric.shown(min(costs)), metric.shown(max(costs))))
    sentence = (
        f"{' '.join(words)}, {_plain_range(percent(min(accuracies)), percent(max(accuracies)))} test accuracy"
    )
    if content.device_name and any(member.latency_ms is not None for member in members):
        sentence += f", measured on {content.device_name}"
    return f"{sentence}."


def verdicts(content: ReportContent) -> list[str]:
    """How far the search deceived itself, and what it brought, a sentence each; the unknown is left out.

    The best of many are chosen for their luck on the images that choose them, too: what is left on others is
    what counts. The gain over chance is that of Yang et al. 2020, arXiv 1912.12522, at the same cost.
    """
    said = []
    if members := content.members:
        gaps = [100 * (member.search_top1 - member.test_top1) for member in members]
        mean = sum(gaps) / len(gaps)
        halves = [(high - low) / 2 for low, high in (member.test_top1_interval for member in members)]
        least, most = (f"{gap:.1f}".replace("-", MINUS) for gap in (min(gaps), max(gaps)))
        said.append(
            f"Search accuracy, by which these networks were chosen, is {abs(mean):.1f} points "
            f"{'above' if mean >= 0 else 'below'} test accuracy on average ({least} to {most} above it); the "
            f"test images alone leave {100 * sum(halves) / len(halves):.1f} points on either side open."
        )
    if content.improvement is not None:
        value, low, high = content.improvement
        said.append(
            f"On the search images, in floats, the front is {percent(abs(value))} "
            f"{'better' if value >= 0 else 'worse'} than networks of the same multiply-accumulates that "
            f"nobody chose (95 % interval {_signed(low)} to {_signed(high)}), as a part of their accuracy."
        )
    return said


def _signed(fraction: float) -> str:
    return percent(fraction).replace("-", MINUS)


def picks(content: ReportContent) -> list[tuple[str, Member, str, int]]:
    """(why, member, detail, number): the most accurate, the cheapest near it, the cheapest of all.

    Empty for fewer than three members.
    """
    metric = content.cost_metrics[0]
    members = [(m, cost) for m in content.ordered_members if (cost := m.cost(metric)) is not None]
    if len(members) < 3:
        return []
    best, best_cost = max(members, key=lambda pair: (pair[0].test_top1, -pair[1]))
    near, near_cost = next(pair for pair in members if pair[0].test_top1 >= best.test_top1 - NEAR_BEST)
    cheapest, cheapest_cost = members[0]
    numbers = member_numbers(content)
    adjective = "Fastest" if metric == "latency_ms" else "Cheapest"
    found: list[tuple[str, Member, str, int]] = []
    for label, member, cost in (
        ("Most accurate", best, best_cost),
        (f"{adjective} within {100 * NEAR_BEST:g} point of it", near, near_cost),
        (adjective, cheapest, cheapest_cost),
    ):
        if any(member is other for _, other, _, _ in found):
            continue
        number = numbers[member.arch_key]
        costs = f"{metric_named(metric).shown(cost)} · {byte_size(member.size_bytes)}"
        found.append((label, member, f"network {number} · {costs}", number))
    return found


def member_numbers(content: ReportContent) -> dict[str, int]:
    """A member's number in the table, from 1 for the cheapest, by its arch key."""
    return {member.arch_key: number for number, member in enumerate(content.ordered_members, start=1)}


def tips(content: ReportContent) -> dict[str, str]:
    """Mark to what is said when a pointer is over it: a title, the figures, the decisions, a line each."""
    numbers = member_numbers(content)
    said = {}
    for member in content.ordered_members:
        number = numbers[member.arch_key]
        low, high = member.test_top1_interval
        figures = [f"{percent(member.test_top1, decimals=2)} test ({percent_span(low, high)})"]
        figures.append(" · ".join(metric_named(name).shown(value) for name, value in member.costs.items()))
        said[f"m{number}"] = "\n".join(
            [f"{number}  {member.name}", *figures, *_lines(member.decisions, content)]
        )
    for trial in content.trials:
        if trial.metric("top1") is not None:
            said[f"t{trial.number}"] = "\n".join(_trial_lines(trial, numbers, content))
    return said


_STAGE = re.compile(r"s\d+|stem|embed|head|se")


def by_stage(decisions: Mapping[str, Value], *, idle: Container[str]) -> dict[str, dict[str, str]]:
    """Stage to kind to its value in words, idle choices left out; blocks are put together under their stage.

    `s1.b1.kernel` = 3 and `s1.b2.kernel` = 5 give `{"s1": {"kernel": "3, 5"}}`. A bare name has the stage "",
    and so have the dotted names of a family without stages, such as `layer1.0.conv1.width`.
    """
    stages: dict[str, dict[str, list[str]]] = {}
    for name, value in decisions.items():
        stage, _, kind = name.rpartition(".")
        stage = stage.partition(".")[0]
        if not _STAGE.fullmatch(stage):
            stage, kind = "", name
        kinds = stages.setdefault(stage, {})
        if name not in idle:
            kinds.setdefault(kind, []).append(str(value))
    return {stage: {kind: ", ".join(said) for kind, said in kinds.items()} for stage, kinds in stages.items()}


def _trial_lines(trial: TriedArch, numbers: Mapping[str, int], content: ReportContent) -> list[str]:
    exported = f", exported as {numbers[trial.arch_key]}" if trial.arch_key in numbers else ""
    figures = [
        metric_named(name).shown(value) + (" search" if name == "top1" else "")
        for name in trial.metrics
        if (value := trial.metric(name)) is not None
    ]
    return [f"Candidate {trial.number}{exported}", " · ".join(figures), *_lines(trial.decisions, content)]


def _lines(decisions: Mapping[str, Value], content: ReportContent) -> list[str]:
    opened = {choice.name for choice in content.choices}
    shown = {name: value for name, value in decisions.items() if name in opened or not opened}
    lines = []
    for stage, kinds in by_stage(shown, idle=content.idle(decisions)).items():
        words = " · ".join(f"{kind} {value}" for kind, value in kinds.items())
        lines.append(f"{stage}: {words}" if stage else words)
    return (
        lines
        if len(lines) <= MOST_LINES
        else [*lines[: MOST_LINES - 1], f"… {len(lines) - MOST_LINES + 1} more"]
    )


def _range(low: str, high: str) -> str:
    return f"at {low}" if low == high else f"from {low} to {high}"


def _plain_range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
