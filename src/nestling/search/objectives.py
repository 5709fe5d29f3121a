"""What a search is after: objectives, limits, and the problem that they make with a space."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nestling.space import SearchSpace

Metrics = Mapping[str, float]
Direction = Literal["maximise", "minimise"]

DIRECTIONS: dict[str, Direction] = {
    "top1": "maximise",
    "latency_ms": "minimise",
    "size_mb": "minimise",
    "mmacs": "minimise",
    "peak_mb": "minimise",
}


class InfeasibleLimit(ValueError):  # noqa: N818 - it names what is wrong
    """A limit that no network of the space can keep; the message names it and the best value there is."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric to be made large or small."""

    name: str
    direction: Direction

    @classmethod
    def parse(cls, name: str) -> Objective:
        """The objective called `name`.

        Raises:
            ValueError: no such metric; the nearest one is named.
        """
        return cls(name, _direction(name, what="objective"))

    def loss(self, metrics: Metrics) -> float:
        """The metric, turned so that less is better."""
        value = metrics[self.name]
        return -value if self.direction == "maximise" else value


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound: a cost may be at most `bound`, an accuracy must be at least that.

    Raises:
        ValueError: no such metric, or a bound that is not positive or, for an accuracy, above 1.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        _direction(self.metric, what="limit")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"the limit on {self.metric} is {self.bound}; it must be a positive number")
        if not self.is_ceiling and self.bound > 1:
            raise ValueError(f"the limit on {self.metric} is {self.bound}; write 0.9 for 90 %")

    @property
    def is_ceiling(self) -> bool:
        """Whether the metric may be at most the bound."""
        return DIRECTIONS[self.metric] == "minimise"

    def violation(self, metrics: Metrics) -> float:
        """How far `metrics` is beyond the bound, as a fraction of it; zero or less where it is kept."""
        excess = metrics[self.metric] - self.bound
        return (excess if self.is_ceiling else -excess) / self.bound

    def __str__(self) -> str:
        return f"{self.metric} {'at most' if self.is_ceiling else 'at least'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A space, what to improve, and what to keep.

    Raises:
        ValueError: no objective, or one twice, or two limits on one metric.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        names = [objective.name for objective in self.objectives]
        if not names:
            raise ValueError("a search needs at least one objective, such as top1")
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is listed twice: {', '.join(names)}")
        limited = [limit.metric for limit in self.limits]
        if len(set(limited)) < len(limited):
            raise ValueError(f"a metric has two limits: {', '.join(map(str, self.limits))}")

    @classmethod
    def parse(cls, space: SearchSpace, *, objectives: Iterable[str], limits: Mapping[str, float]) -> Problem:
        """The problem with objectives and limits given by metric name.

        Raises:
            ValueError: an unknown metric, an objective twice, or a bound that is not positive.
        """
        return cls(
            space,
            tuple(Objective.parse(name) for name in objectives),
            tuple(Limit(metric, bound) for metric, bound in limits.items()),
        )

    def feasible(self, metrics: Metrics) -> bool:
        """Whether every limit is kept."""
        return all(limit.violation(metrics) <= 0 for limit in self.limits)

    def losses(self, metrics: Metrics) -> tuple[float, ...]:
        """The objectives' values, turned so that less is better."""
        return tuple(objective.loss(metrics) for objective in self.objectives)

    def needed(self) -> tuple[str, ...]:
        """The metrics that an evaluation must bring."""
        return tuple(
            dict.fromkeys([o.name for o in self.objectives] + [limit.metric for limit in self.limits])
        )


def check_limits(problem: Problem, *, smallest: Metrics) -> None:
    """Refuses limits that not even the smallest network keeps.

    Multiply-accumulates are least there. Other costs need not be: 8 bits can be slower than floats, and a
    file of few weights larger; they are refused where they are more than twice the limit. Of accuracies the
    ends of a space say nothing for sure. A metric that `smallest` does not have is passed over.

    Raises:
        InfeasibleLimit: a cost of the smallest network is beyond its limit.
    """
    for limit in problem.limits:
        allowed = 0.0 if limit.metric == "mmacs" else 1.0
        if limit.is_ceiling and limit.metric in smallest and limit.violation(smallest) > allowed:
            raise InfeasibleLimit(
                f"no network can keep {limit}: the smallest one of the space has {limit.metric} "
                f"{smallest[limit.metric]:.4g}; raise the limit, or give the space smaller values"
            )


def _direction(name: str, *, what: str) -> Direction:
    if name not in DIRECTIONS:
        near = difflib.get_close_matches(name, DIRECTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DIRECTIONS)}"
        raise ValueError(f"unknown metric {name!r} for a search {what}; {hint}")
    return DIRECTIONS[name]
