"""Axes and marks of a figure as SVG whose text keeps its size however wide the page is.

Positions are percentages of the plot's box, so nothing is scaled but the lines between points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nestling.report.markup import Markup, join, tag
from nestling.report.units import MINUS

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from `low` to `high`. `at` gives the share of the way, 0 at `low` and 1 at `high`.

    Raises:
        ValueError: `low` is not below `high`, or a logarithmic axis reaches zero.
    """

    low: float
    high: float
    logarithmic: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"an axis runs upwards, not from {self.low} to {self.high}")
        if self.logarithmic and self.low <= 0:
            raise ValueError(f"a logarithmic axis starts above zero, not at {self.low}")

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        *,
        margin: float = 0.05,
        least: float = 0.0,
        log_from: float = math.inf,
        top: float = math.inf,
    ) -> Axis:
        """An axis that holds every value with a `margin` at both ends (in spans), but ends by `top`.

        It spans at least `least`, so that a few close values do not fill it. Logarithmic where all values are
        positive and the largest is `log_from` times the smallest, or more.
        """
        kept = list(values) or [0.0, 1.0]
        low, high = min(kept), max(kept)
        if low > 0 and high / low >= log_from:
            spread = (high / low) ** margin
            return cls(low / spread, high * spread, logarithmic=True)
        least = least or (0.0 if high > low else abs(high) * 0.2 or 1.0)
        widened = max(0.0, least - (high - low)) / 2
        low, high = low - widened, high + widened
        beyond = margin * (high - low)
        return cls(low - beyond, max(min(high + beyond, top), max(kept)))

    def at(self, value: float) -> float:
        """How far along the axis `value` lies."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether `value` lies on the axis."""
        return self.low <= value <= self.high

    def ticks(self, *, aim: int = 6) -> list[tuple[float, str]]:
        """About `aim` round values on the axis with their labels."""
        if self.logarithmic:
            values = self._round_powers()
            if len(values) >= 3:
                return [(value, f"{value:.6g}") for value in values]
        step = _round_step((self.high - self.low) / aim)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [
            (index * step, f"{index * step:,.{decimals}f}".replace("-", MINUS))
            for index in range(first, last + 1)
        ]

    def _round_powers(self) -> list[float]:
        ratio = self.high / self.low
        mantissas: tuple[float, ...] = (1, 2, 5)
        if ratio < 8:
            mantissas = (1, 1.5, 2, 3, 4, 5, 7)
        elif ratio < 30:
            mantissas = (1, 2, 3, 5)
        elif ratio > 1000:
            mantissas = (1,)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        values = [mantissa * 10.0**power for power in range(first, last + 1) for mantissa in mantissas]
        return [value for value in values if self.holds(value)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)


@dataclass(frozen=True, slots=True)
class Plot:
    """Two axes; its methods place marks between them."""

    x: Axis
    y: Axis

    def frame(
        self, *marks: Markup | None, x_label: str, y_label: str, summary: str, class_: str = ""
    ) -> Markup:
        """The whole figure: grid, ticks, titles of the axes, and marks. `summary` is for screen readers."""
        grid = [
            self._x_tick(value, label, minor=index % 2 == 1)
            for index, (value, label) in enumerate(self.x.ticks())
        ]
        grid += [self._y_tick(value, label) for value, label in self.y.ticks(aim=5)]
        base = tag("line", class_="base", x1="0%", x2="100%", y1="100%", y2="100%")
        picture = tag("svg", *grid, base, *marks, role="img", aria_label=summary)
        return tag(
            "div",
            tag("div", y_label, class_="y-label"),
            tag("div", picture, class_="box"),
            tag("div", x_label, class_="x-label"),
            class_=f"plot {class_}".strip(),
        )

    def line(self, points: Sequence[Point], *, class_: str) -> Markup | None:
        """A line through the points; None for fewer than two."""
        if len(points) < 2:
            return None
        path = " ".join(f"{1000 * self.x.at(x):.1f},{1000 * (1 - self.y.at(y)):.1f}" for x, y in points)
        line = tag("polyline", points=path, class_=class_, vector_effect="non-scaling-stroke")
        return tag("svg", line, viewBox="0 0 1000 1000", preserveAspectRatio="none", class_="stretch")

    def steps(self, points: Sequence[Point], *, class_: str) -> Markup | None:
        """A line that keeps its height until the next point."""
        corners = [
            corner for (x, y), (next_x, _) in itertools.pairwise(points) for corner in ((x, y), (next_x, y))
        ]
        return self.line([*corners, *points[-1:]], class_=class_)

    def dot(self, point: Point, *, radius: float, **attributes: str | float | None) -> Markup:
        """A round mark at the point."""
        x, y = point
        return tag("circle", cx=self._left(x), cy=self._top(y), r=radius, **attributes)

    def bar(self, start: Point, end: Point, *, class_: str) -> Markup:
        """A straight line from `start` to `end`, such as an error bar."""
        return tag(
            "line",
            class_=class_,
            x1=self._left(start[0]),
            y1=self._top(start[1]),
            x2=self._left(end[0]),
            y2=self._top(end[1]),
        )

    def text(self, point: Point, words: str, *, dx: float = 0, dy: float = 0, class_: str) -> Markup:
        """Words beside the point, `dx` and `dy` pixels from it."""
        x, y = point
        return tag("text", words, x=self._left(x), y=self._top(y), dx=dx, dy=dy, class_=class_)

    def upright(self, x: float, *, class_: str) -> Markup:
        """A vertical line over the whole height."""
        return tag("line", class_=class_, x1=self._left(x), x2=self._left(x), y1="0%", y2="100%")

    def _x_tick(self, value: float, label: str, *, minor: bool) -> Markup:
        left = self._left(value)
        line = tag("line", class_="grid", x1=left, x2=left, y1="0%", y2="100%")
        text = tag(
            "text", label, class_="tick middle minor" if minor else "tick middle", x=left, y="100%", dy=18
        )
        return join(line, text)

    def _y_tick(self, value: float, label: str) -> Markup:
        top = self._top(value)
        line = tag("line", class_="grid", x1="0%", x2="100%", y1=top, y2=top)
        return join(line, tag("text", label, class_="tick end", x="0%", y=top, dx=-8, dy=4))

    def _left(self, x: float) -> str:
        return f"{100 * self.x.at(x):.2f}%"

    def _top(self, y: float) -> str:
        return f"{100 * (1 - self.y.at(y)):.2f}%"


def thinned(points: Sequence[Point], *, most: int = 240) -> list[Point]:
    """At most `most` points: each the mean of a run of neighbours; short sequences as they are."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    runs = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
