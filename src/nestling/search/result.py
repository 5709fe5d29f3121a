"""Trial and SearchResult: what a search tried, and the front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from nestling.search.objectives import Metrics, Problem, check_limits
from nestling.search.pareto import nondominated, spread
from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Trial:
    """One arch that was tried.

    Attributes:
        number: of the trial in the study.
        arch: what was tried.
        metrics: what was found; empty where it failed.
        state: `complete` or `failed`; in studies of before there were queues also `duplicate` of an earlier
            trial, whose metrics it has.
        reason: why it failed.
        seconds: what the evaluation took.
    """

    number: int
    arch: Arch
    metrics: Metrics
    state: Literal["complete", "failed", "duplicate"]
    reason: str = ""
    seconds: float = 0.0

    @property
    def is_partial(self) -> bool:
        """Whether its accuracy is that on a part of the images: it lost a race, and is of no front."""
        return self.metrics.get("top1_partial", 0.0) > 0


@dataclass(frozen=True)
class SearchResult:
    """Everything that a search tried."""

    problem: Problem
    trials: tuple[Trial, ...]

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """The trials that brought metrics, each arch once."""
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @cached_property
    def failed(self) -> tuple[Trial, ...]:
        """The trials that failed, each with its reason."""
        return tuple(trial for trial in self.trials if trial.state == "failed")

    @cached_property
    def unmet(self) -> tuple[str, ...]:
        """A sentence for each limit that no network tried so far keeps; none before one is tried."""
        sentences = []
        whole = [trial for trial in self.complete if not trial.is_partial]
        for limit in self.problem.limits if whole else ():
            best = min(whole, key=lambda trial: limit.violation(trial.metrics))
            if limit.violation(best.metrics) > 0:
                value = best.metrics[limit.metric]
                sentences.append(f"no network tried so far keeps {limit}: the nearest has {value:.4g}")
        return tuple(sentences)

    @cached_property
    def best(self) -> Trial | None:
        """The trial that is best in the first objective of those that keep all limits; None without any."""
        return min(self.front, key=lambda trial: self.problem.losses(trial.metrics), default=None)

    @cached_property
    def front(self) -> tuple[Trial, ...]:
        """The complete trials that keep all limits and that none such beats, from cheapest to dearest."""
        kept = [t for t in self.complete if not t.is_partial and self.problem.feasible(t.metrics)]
        if not kept:
            return ()
        points = np.array([self.problem.losses(trial.metrics) for trial in kept])
        best = [trial for trial, keep in zip(kept, nondominated(points), strict=True) if keep]
        costs = [o.name for o in self.problem.objectives if o.direction == "minimise"]
        order = costs[0] if costs else self.problem.objectives[0].name
        return tuple(sorted(best, key=lambda trial: (trial.metrics[order], trial.number)))

    @cached_property
    def unstable(self) -> tuple[Trial, ...]:
        """The members of the front whose latency was unstable each time that it was measured."""
        return tuple(trial for trial in self.front if trial.metrics.get("latency_unstable", 0.0) > 0)


def check_smallest(problem: Problem, trials: Sequence[Trial]) -> None:
    """Refuses limits that not even the smallest network keeps, once it was tried.

    Raises:
        InfeasibleLimit: a cost of the smallest network is beyond its limit.
    """
    smallest = problem.space.smallest
    found = next((trial for trial in trials if trial.state == "complete" and trial.arch == smallest), None)
    if found is not None:
        check_limits(problem, smallest=found.metrics)


def spread_along_front(result: SearchResult, count: int) -> tuple[Trial, ...]:
    """At most `count` members of the result's front that lie far apart, its ends among them."""
    front: Sequence[Trial] = result.front
    points = np.array([result.problem.losses(trial.metrics) for trial in front])
    return tuple(front[index] for index in spread(points, count))
