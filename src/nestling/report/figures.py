"""The figures of the page: the front, the training curves, and what the search tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nestling.report.content import Member, ReportContent, TrainingPoint, TriedArch
from nestling.report.markup import Markup, tag
from nestling.report.plot import Axis, Plot, Point, thinned
from nestling.report.units import metric_named, percent
from nestling.search import Objective

LOG_FROM = 4.0
"""A cost that spans more than this factor is drawn on a logarithmic axis."""
LEAST_TOP1_SPAN = 2.0
"""The front's figure shows at least this many points of accuracy ..."""
LEAST_COST_SPAN = 0.5
"""... and at least this part of the dearest member's cost, so that a front of one stays a point."""


@dataclass(frozen=True, slots=True)
class FrontView:
    """The part of the front's plane that is drawn: both axes, and the candidates inside and outside of them.

    Accuracies are in percent. The frame follows the members, so that one poor candidate cannot flatten them.
    """

    metric: str
    x: Axis
    y: Axis
    members: tuple[tuple[Member, Point], ...]
    candidates: tuple[tuple[TriedArch, Point], ...]
    outside: int

    @classmethod
    def of(cls, content: ReportContent, *, metric: str) -> FrontView | None:
        """The view of accuracy over the cost `metric`; None where there is nothing to draw."""
        members = tuple(
            (member, (cost, 100 * member.test_top1))
            for member in content.ordered_members
            if (cost := member.cost(metric)) is not None
        )
        tried = [
            (trial, (cost, 100 * top1))
            for trial in content.trials
            if (cost := trial.metric(metric)) is not None and (top1 := trial.metric("top1")) is not None
        ]
        if not members and not tried:
            return None
        xs, ys = [x for _, (x, _) in members], [y for _, (_, y) in members]
        for member, _ in members:
            xs += member.cost_interval(metric) or ()
            ys += [100 * bound for bound in member.test_top1_interval]
        least_x = LEAST_COST_SPAN * max(xs, default=0.0)
        around_x = _with_neighbours(xs, (x for _, (x, _) in tried), reach=0.3, least=least_x)
        around_y = _with_neighbours(ys, (y for _, (_, y) in tried), reach=0.6, least=LEAST_TOP1_SPAN)
        x_axis = Axis.over(around_x, least=least_x, log_from=LOG_FROM)
        y_axis = Axis.over(around_y, least=LEAST_TOP1_SPAN, top=100.0)
        inside = tuple((trial, (x, y)) for trial, (x, y) in tried if x_axis.holds(x) and y_axis.holds(y))
        return cls(metric, x_axis, y_axis, members, inside, len(tried) - len(inside))


def front_figure(view: FrontView, *, numbers: Mapping[str, int]) -> Markup:
    """Test accuracy over a cost: members with error bars, candidates as faint dots at their search accuracy.

    `numbers` gives a member's number in the table by its arch key.
    """
    plot = Plot(view.x, view.y)
    candidates = [
        _candidate(plot, trial, spot, number=numbers.get(trial.arch_key)) for trial, spot in view.candidates
    ]
    members = [
        _member(plot, member, spot, number=numbers[member.arch_key], metric=view.metric)
        for member, spot in view.members
    ]
    metric = metric_named(view.metric)
    scale = ", logarithmic" if view.x.logarithmic else ""
    return plot.frame(
        tag("g", *candidates),
        plot.line([spot for _, spot in view.members], class_="front"),
        *members,
        x_label=f"{metric.label}{scale}",
        y_label="Accuracy (%)",
        summary=f"{len(members)} networks by {metric.title.lower()} and test accuracy; see the table",
        class_="tall",
    )


def training_figures(training: Sequence[TrainingPoint], *, shrinking_step: int | None) -> list[Markup]:
    """The loss, and the accuracy of the largest and smallest network; a figure without points is left out."""
    if not training:
        return []
    by_epoch = all(point.epoch is not None for point in training)

    def place(point: TrainingPoint) -> float:
        return point.epoch if by_epoch and point.epoch is not None else float(point.step)

    def curve(read: Callable[[TrainingPoint], float | None], *, factor: float = 1.0) -> list[Point]:
        pairs = ((place(point), read(point)) for point in training)
        return [(x, factor * y) for x, y in pairs if y is not None and math.isfinite(y)]

    later = [point for point in training if shrinking_step is not None and point.step >= shrinking_step]
    switch = place(later[0]) if later else None
    x_label = "Epoch" if by_epoch else "Step"
    loss = curve(lambda point: point.loss)
    largest = curve(lambda point: point.largest_top1, factor=100)
    smallest = curve(lambda point: point.smallest_top1, factor=100)
    figures = []
    if loss:
        figures.append(_curves([("plain", loss)], switch=switch, x_label=x_label, y_label="Training loss"))
    if largest or smallest:
        curves = [("one", largest), ("two", smallest)]
        figures.append(
            _curves(curves, switch=switch, x_label=x_label, y_label="Search accuracy (%)", top=100.0)
        )
    return figures


def _curves(
    curves: Sequence[tuple[str, list[Point]]],
    *,
    switch: float | None,
    x_label: str,
    y_label: str,
    top: float = math.inf,
) -> Markup:
    points = [point for _, curve in curves for point in curve]
    plot = Plot(
        Axis.over([*(x for x, _ in points), *([] if switch is None else [switch])], margin=0.0),
        Axis.over((y for _, y in points), top=top),
    )
    lines = [plot.line(thinned(curve), class_=f"curve {name}") for name, curve in curves]
    ends = [plot.dot(curve[-1], radius=3, class_=f"end-dot {name}") for name, curve in curves if curve]
    mark = None if switch is None else plot.upright(switch, class_="switch")
    return plot.frame(
        mark, *lines, *ends, x_label=x_label, y_label=y_label, summary=f"{y_label} by {x_label.lower()}"
    )


def progress_figure(trials: Sequence[TriedArch], goal: Objective) -> Markup | None:
    """One objective trial by trial, with the best so far; None where no trial has it."""
    metric = metric_named(goal.name)
    points = [(float(t.number), metric.factor * v) for t in trials if (v := t.metric(goal.name)) is not None]
    if not points:
        return None
    better = max if goal.direction == "maximise" else min
    best: list[Point] = []
    for x, y in points:
        best.append((x, better(y, best[-1][1]) if best else y))
    plot = Plot(
        Axis.over((x for x, _ in points), margin=0.02),
        Axis.over((y for _, y in points), log_from=LOG_FROM, top=100.0 if metric.unit == "%" else math.inf),
    )
    dots = [plot.dot(point, radius=2.2, class_="tried") for point in points]
    return plot.frame(
        tag("g", *dots),
        plot.steps(best, class_="curve one"),
        x_label="Trial",
        y_label=metric.label,
        summary=f"{metric.title} of {len(points)} trials and the best so far",
    )


def area_figure(progress: Sequence[Point], *, x_label: str = "Trial") -> Markup | None:
    """The hypervolume of the front, trial by trial, in percent of the final one; None for fewer than two."""
    if len(progress) < 2:
        return None
    plot = Plot(Axis.over((x for x, _ in progress), margin=0.02), Axis(0.0, 104.0))
    return plot.frame(
        plot.steps(progress, class_="curve one"),
        x_label=x_label,
        y_label="Hypervolume of the front (% of the final)",
        summary=f"Hypervolume of the front over {len(progress)} trials, by {x_label.lower()}",
    )


def _candidate(plot: Plot, trial: TriedArch, spot: Point, *, number: int | None) -> Markup:
    return plot.dot(
        spot,
        radius=3.2 if trial.on_front else 2.4,
        class_="candidate best" if trial.on_front else "candidate",
        data_tip=f"t{trial.number}",
        data_member=number,
    )


def _member(plot: Plot, member: Member, spot: Point, *, number: int, metric: str) -> Markup:
    x, y = spot
    low, high = (100 * bound for bound in member.test_top1_interval)
    across = member.cost_interval(metric)
    label = f"Network {number}: {percent(member.test_top1)}, {metric_named(metric).shown(x)}"
    return tag(
        "a",
        plot.bar((x, low), (x, high), class_="error"),
        None if across is None else plot.bar((across[0], y), (across[1], y), class_="error"),
        plot.dot(spot, radius=13, class_="target"),
        plot.dot(spot, radius=5, class_="member unstable" if member.unstable else "member"),
        plot.text(spot, str(number), dx=8, dy=-7, class_="number"),
        href=f"#row-{number}",
        class_="point",
        data_tip=f"m{number}",
        data_member=str(number),
        aria_label=label,
    )


def _with_neighbours(
    own: Sequence[float], around: Iterable[float], *, reach: float, least: float
) -> list[float]:
    """`own` and those of `around` within `reach` (in spans) of it; all of `around` where `own` is empty."""
    if not own:
        return list(around)
    low, high = min(own), max(own)
    if low > 0 and high / low >= LOG_FROM:
        factor = (high / low) ** reach
        return [*own, *(value for value in around if low / factor <= value <= high * factor)]
    beyond = reach * max(high - low, least)
    return [*own, *(value for value in around if low - beyond <= value <= high + beyond)]
