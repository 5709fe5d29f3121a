"""Losses and violations of many archs at once, from arrays of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Codes
from nestling.search.objectives import Problem

Rows = NDArray[np.float64]
Told = Mapping[str, Rows]
"""Metric -> its values, in arrays of one shape."""
Exact = Callable[[Codes], NDArray[np.float64]]
"""A metric that is computed for any codes (N, open choices), in its own unit (N,)."""

SIGNS = {"maximise": -1.0, "minimise": 1.0}


def losses_of(problem: Problem, told: Told) -> Rows:
    """The objectives, turned so that less is better, in a new last axis."""
    return np.stack([SIGNS[o.direction] * told[o.name] for o in problem.objectives], axis=-1)


def violations_of(problem: Problem, told: Told) -> Rows:
    """By how much limits are broken in all, as fractions of their bounds; 0 where all are kept."""
    total = np.zeros(np.shape(told[problem.objectives[0].name]))
    for limit in problem.limits:
        excess = (told[limit.metric] - limit.bound) / limit.bound
        total = total + np.maximum(excess if limit.is_ceiling else -excess, 0.0)
    return total
