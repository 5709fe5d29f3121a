"""Which images go where: as many of one class as of another, or the classes in proportion."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Few = Literal["drawn", "first"]
"""Which classes are there where there are fewer images than classes: some by chance, or those of the lowest
labels, as in runs that began when no others were known."""


def balanced(
    labels: Indices, count: int, *, rng: np.random.Generator | None = None, few: Few = "drawn"
) -> Indices:
    """`count` positions, as many of one class as of another, in an order whose every prefix is so too.

    A class that runs out leaves its turns to the others. With `rng` chance decides who comes first within a
    class, without it the position; which classes there are where `count` is below their number is drawn.
    """
    return _earliest(_turns(labels, rng).astype(np.float64), labels, count, rng=rng, few=few)


def proportional(labels: Indices, count: int, *, rng: np.random.Generator, few: Few = "drawn") -> Indices:
    """`count` positions that hold the classes in proportion, and so does every prefix; one of each is left.

    The one left out is what keeps a class known to whoever gets the rest: there are as many fewer positions
    as there are classes. This is the Webster/Sainte-Laguë apportionment: a class with `n` members has its
    k-th turn at time `(k + 1/2) / n`. Which of several classes of one size are there, where `count` is too
    small for all, is drawn.
    """
    turns = _turns(labels, rng)
    sizes = np.bincount(labels)[labels]
    times = np.where(turns < sizes - 1, (turns + 0.5) / sizes, np.inf)
    return _earliest(times, labels, count, rng=rng, few=few)


def _earliest(
    times: NDArray[np.float64], labels: Indices, count: int, *, rng: np.random.Generator | None, few: Few
) -> Indices:
    """The `count` positions of the earliest finite times.

    Of one time the lower label is first. Where that leaves classes out, chance decides in its place: the
    lowest labels are no sample of all of them.
    """
    there = int(np.isfinite(times).sum())
    chosen = np.lexsort((labels, times))[: min(count, there)]
    if few == "first" or len(np.unique(labels[chosen])) == len(np.unique(labels[np.isfinite(times)])):
        return chosen
    places = (rng or np.random.default_rng(0)).permutation(int(labels.max()) + 1)
    return np.lexsort((places[labels], times))[: len(chosen)]


def _turns(labels: Indices, rng: np.random.Generator | None) -> Indices:
    """For each position, how many of its class come before it."""
    start = np.arange(len(labels)) if rng is None else rng.permutation(len(labels))
    grouped = start[np.argsort(labels[start], kind="stable")]
    sizes = np.bincount(labels)
    firsts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    turns = np.empty(len(labels), np.int64)
    turns[grouped] = np.arange(len(labels)) - np.repeat(firsts, sizes)
    return turns
