"""Which images go where: orders whose every prefix is fair to the classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def balanced(labels: Indices, *, rng: np.random.Generator | None = None) -> Indices:
    """All positions in an order whose every prefix holds as many of one class as of another.

    A class that runs out leaves its turns to the others. With `rng` chance decides who comes first within a
    class, without it the position.
    """
    return np.lexsort((labels, _turns(labels, rng)))


def proportional(labels: Indices, *, rng: np.random.Generator) -> Indices:
    """Positions in an order whose every prefix holds the classes in proportion; one of each is left out.

    The one left out is what keeps a class known to whoever gets the rest. This is the Webster/Sainte-Laguë
    apportionment: a class with `n` members has its k-th turn at time `(k + 1/2) / n`.
    """
    turns = _turns(labels, rng)
    sizes = np.bincount(labels)[labels]
    order = np.lexsort((labels, (turns + 0.5) / sizes))
    return order[turns[order] < sizes[order] - 1]


def _turns(labels: Indices, rng: np.random.Generator | None) -> Indices:
    """For each position, how many of its class come before it."""
    start = np.arange(len(labels)) if rng is None else rng.permutation(len(labels))
    grouped = start[np.argsort(labels[start], kind="stable")]
    sizes = np.bincount(labels)
    firsts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    turns = np.empty(len(labels), np.int64)
    turns[grouped] = np.arange(len(labels)) - np.repeat(firsts, sizes)
    return turns
