"""Stopping: whether a search has come to where more candidates hardly add to its front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nestling.search.objectives import Problem
from nestling.search.pareto import BEYOND_WORST, hypervolume
from nestling.search.result import SearchResult, Trial

LEAST_WINDOW = 20
"""The fewest trials whose gain is looked at."""
WINDOW_PART = 4
"""... and of many trials every so manieth: the longer a search has gone, the rarer are its gains."""
STEP = 5
"""After how many trials it is looked again."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a search ends early: after `trials` of them the last `window` added `gain` of the hypervolume."""

    trials: int
    window: int
    gain: float

    def __str__(self) -> str:
        return f"the last {self.window} of {self.trials} candidates added {self.gain:.2%} to the hypervolume"


@dataclass(slots=True)
class Stopping:
    """Looks at trials as they come, and remembers how far it has looked.

    What it finds follows from the trials in their order alone: every process of a search, and one that
    continues it, ends it at the same trial; `Ending` holds to it where metrics are taken again later. The
    gain is that of the front's hypervolume over a quarter of the trials, at least 20, as a part of the
    hypervolume that there is now, both measured from a little beyond the worst of all feasible trials. A
    search is not stopped before a half of its trials are outside of that window, nor before any keeps the
    limits.

    Attributes:
        problem: what is searched.
        below: the part below which a gain is too small; 0 never stops.

    Raises:
        ValueError: `below` is not in [0, 1).
    """

    problem: Problem
    below: float
    _looked: int = field(default=0, init=False)
    _found: Stop | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.below < 1:
            raise ValueError(f"a search stops below a part of the hypervolume in [0, 1), not {self.below}")

    def look(self, trials: Sequence[Trial]) -> Stop | None:
        """The first place among `trials`, in their order, where the search ends; None where it goes on."""
        if self.below == 0 or self._found is not None:
            return self._found
        while self._found is None and self._looked + STEP <= len(trials):
            self._looked += STEP
            self._found = self._at(trials[: self._looked])
        return self._found

    def _at(self, trials: Sequence[Trial]) -> Stop | None:
        window = max(LEAST_WINDOW, len(trials) // WINDOW_PART)
        if len(trials) < 2 * window:
            return None
        gain = gained(self.problem, trials, window=window)
        if gain is None or gain >= self.below:
            return None
        return Stop(len(trials), window, gain)


def gained(problem: Problem, trials: Sequence[Trial], *, window: int) -> float | None:
    """What the last `window` of `trials` added to the hypervolume, as a part of it.

    None where no trial of before keeps the limits.
    """
    result = SearchResult(problem, tuple(trials))
    front, before = result.front, SearchResult(problem, tuple(trials[:-window])).front
    if not before:
        return None
    kept = np.array([problem.losses(t.metrics) for t in result.complete if problem.feasible(t.metrics)])
    worst, span = kept.max(axis=0), np.ptp(kept, axis=0)
    span = np.where(span > 0, span, 1.0)
    now, then = (
        hypervolume(
            (np.array([problem.losses(trial.metrics) for trial in members]) - worst) / span,
            [BEYOND_WORST] * len(worst),
        )
        for members in (front, before)
    )
    return 1 - then / now
