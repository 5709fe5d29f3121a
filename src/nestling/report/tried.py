"""What the search tried, in numbers: the values that the front uses, how it grew, and why trials failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nestling.report.content import ReportContent, TriedArch
from nestling.report.plot import Point
from nestling.search import BEYOND_WORST, Limit, hypervolume
from nestling.space import Choice, Value


@dataclass(frozen=True, slots=True)
class Usage:
    """How often a choice took each of its values: among all candidates and on the front, as fractions.

    Only candidates in which the choice was not idle are counted.
    """

    choice: Choice
    tried: tuple[float, ...]
    front: tuple[float, ...]
    active: float
    """The part of the front in which the choice was not idle."""

    @property
    def shift(self) -> float:
        """How far the front's values are from those tried: 0 the same, 1 other values throughout."""
        return self.active * sum(abs(a - b) for a, b in zip(self.tried, self.front, strict=True)) / 2


def usages(content: ReportContent) -> list[Usage]:
    """One `Usage` for each open choice that both the candidates and the front decide, largest shift first."""
    complete = [trial for trial in content.trials if trial.state == "complete"]
    shown = [trial.decisions for trial in complete if trial.on_front]
    shown = shown or [member.decisions for member in content.members]
    tried = [_counting(content, trial.decisions) for trial in complete]
    front = [_counting(content, decisions) for decisions in shown]
    found = []
    for choice in content.choices:
        among_tried, among_front = (
            [arch[choice.name] for arch in archs if choice.name in arch] for archs in (tried, front)
        )
        if among_tried and among_front:
            active = len(among_front) / len(front)
            found.append(Usage(choice, _shares(choice, among_tried), _shares(choice, among_front), active))
    return sorted(found, key=lambda usage: -usage.shift)


def front_growth(content: ReportContent) -> list[Point]:
    """(trial number, hypervolume in percent of the final one) by feasible trial; empty for one objective.

    Measured from a little beyond the worst value of each objective among the feasible trials.
    """
    names = [goal.name for goal in content.objectives]
    signs = [1.0 if goal.direction == "minimise" else -1.0 for goal in content.objectives]
    if len(names) not in (2, 3):
        return []
    numbers: list[int] = []
    points: list[list[float]] = []
    for trial in content.trials:
        values = [trial.metric(name) for name in names]
        known = [sign * value for sign, value in zip(signs, values, strict=True) if value is not None]
        if len(known) == len(names) and within_limits(trial, content.limits):
            numbers.append(trial.number)
            points.append(known)
    if len(points) < 2:
        return []
    table = np.array(points)
    worst, best = table.max(axis=0), table.min(axis=0)
    reference = (worst + BEYOND_WORST * np.where(worst > best, worst - best, 1.0)).tolist()
    final = hypervolume(table, reference)
    growth: list[Point] = []
    kept = table[:0]
    for number, point in zip(numbers, table, strict=True):
        if not (kept <= point).all(axis=1).any():
            kept = np.vstack([kept[~(point <= kept).all(axis=1)], point])
        growth.append((float(number), 100 * hypervolume(kept, reference) / final))
    return growth


def by_time(content: ReportContent, growth: Sequence[Point]) -> list[Point]:
    """`growth`, by trial number, over the seconds that evaluating took up to that trial, of all workers.

    Empty where nobody took the time.
    """
    numbers = [trial.number for trial in content.trials]
    spent = np.cumsum([trial.seconds for trial in content.trials])
    if not len(spent) or spent[-1] <= 0:
        return []
    seconds = dict(zip(numbers, spent.tolist(), strict=True))
    return [(seconds[int(number)], volume) for number, volume in growth]


def within_limits(trial: TriedArch, limits: Sequence[Limit]) -> bool:
    """Whether the trial has every metric that is limited, and keeps its bound."""
    for limit in limits:
        value = trial.metric(limit.metric)
        if value is None or limit.violation({limit.metric: value}) > 0:
            return False
    return True


def failures(trials: Sequence[TriedArch]) -> list[tuple[str, list[int]]]:
    """Reason and the numbers of the trials that failed for it, most frequent first."""
    failed = [
        (trial.reason or "no reason was given", trial.number) for trial in trials if trial.state == "failed"
    ]
    counted = Counter(reason for reason, _ in failed)
    return [
        (reason, [number for other, number in failed if other == reason])
        for reason, _ in counted.most_common()
    ]


def _counting(content: ReportContent, decisions: Mapping[str, Value]) -> dict[str, Value]:
    idle = content.idle(decisions)
    return {name: value for name, value in decisions.items() if name not in idle}


def _shares(choice: Choice, used: Sequence[Value]) -> tuple[float, ...]:
    return tuple(used.count(value) / len(used) for value in choice.values)
