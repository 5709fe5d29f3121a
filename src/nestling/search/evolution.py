"""NSGA-II on codes, vectorised: ranks, crowding, and generations of thousands of scored codes a second.

Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II"; constraints by Deb's rule:
what keeps them beats what does not. Crossover takes each choice from one of two parents, mutation draws a
choice anew or moves it by one value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Codes, Encoding, unlike

Points = NDArray[np.float64]
Score = Callable[[Codes], tuple[Points, NDArray[np.float64]]]
"""The losses of codes (N, objectives), less is better, and by how much they break limits (N,), 0 for none."""

CROSSED = 0.9
"""Part of the children that have two parents."""
STEP = 0.5
"""Part of the mutations that go to the value beside, and not to any."""


def ranks(points: Points, violations: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """The front that each row of `points` (N, objectives) belongs to: 0 where no row beats it.

    A row beats another that it equals or undercuts everywhere, and undercuts somewhere. With `violations`
    (N,), rows that break no limit come first; those that do follow, the least violation first.
    """
    points = np.asarray(points, dtype=np.float64)
    if violations is not None and (violations > 0).any():
        broken = violations > 0
        ranked = np.empty(len(points), dtype=np.int64)
        ranked[~broken] = ranks(points[~broken])
        first = ranked[~broken].max() + 1 if (~broken).any() else 0
        ranked[broken] = first + np.unique(violations[broken], return_inverse=True)[1]
        return ranked
    no_worse = np.ones((len(points), len(points)), dtype=bool)
    for column in points.T:
        no_worse &= column[:, None] <= column[None, :]
    beats = no_worse & ~no_worse.T
    beaten_by = beats.sum(axis=0)
    ranked = np.full(len(points), -1, dtype=np.int64)
    rank = 0
    while (front := (ranked < 0) & (beaten_by == 0)).any():
        ranked[front] = rank
        beaten_by = beaten_by - beats[front].sum(axis=0)
        rank += 1
    return ranked


def crowding(points: Points, ranked: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far apart the neighbours of each row are, within its front; infinite at a front's ends."""
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.lexsort((column, ranked))
        sorted_ranks, values = ranked[order], column[order]
        first = np.append(True, sorted_ranks[1:] != sorted_ranks[:-1])
        last = np.append(first[1:], True)
        width = np.maximum.reduceat(values, np.nonzero(first)[0]) - values[first]
        width = np.where(width > 0, width, 1.0)[np.cumsum(first) - 1]
        gap = np.zeros(len(points))
        gap[1:-1] = (values[2:] - values[:-2]) / width[1:-1]
        gap[first | last] = np.inf
        distance[order] += gap
    return distance


def best(points: Points, violations: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The places of the `count` rows that NSGA-II keeps, the best first."""
    ranked = ranks(points, violations)
    return np.lexsort((-crowding(points, ranked), ranked))[:count]


def children(
    encoding: Encoding, parents: Codes, count: int, rng: np.random.Generator, *, mutated: float | None = None
) -> Codes:
    """`count` codes made of `parents`, which are listed from best to worst: the better of two is taken.

    Each choice mutates with probability `mutated`, by default so that one and a half do.
    """
    width = parents.shape[1]
    chosen = rng.integers(0, len(parents), size=(4, count)).reshape(2, 2, count).min(axis=1)
    mixed = (rng.random((count, width)) < 0.5) & (rng.random((count, 1)) < CROSSED)
    made = np.where(mixed, parents[chosen[1]], parents[chosen[0]])
    return mutate(encoding, made, rng, probability=1.5 / width if mutated is None else mutated)


def mutate(encoding: Encoding, codes: Codes, rng: np.random.Generator, *, probability: float) -> Codes:
    """The codes with each choice changed with `probability`: by one value, or to any."""
    changed = rng.random(codes.shape) < min(1.0, probability)
    near = np.clip(codes + rng.choice((-1, 1), size=codes.shape), 0, encoding.levels - 1)
    anywhere = rng.integers(0, encoding.levels, size=codes.shape)
    drawn = np.where(rng.random(codes.shape) < STEP, near, anywhere)
    return encoding.canonical(np.where(changed, drawn, codes))


def evolve(
    encoding: Encoding,
    score: Score,
    initial: Codes,
    *,
    population: int,
    generations: int,
    rng: np.random.Generator,
) -> Codes:
    """The population that NSGA-II comes to, the best first, each code once.

    Args:
        encoding: of the codes.
        score: losses and violations of codes.
        initial: the codes to begin with, as many as there are; random ones fill up.
        population: how many survive a generation.
        generations: how many; each scores `population` codes.
        rng: draws everything.
    """
    codes = encoding.canonical(initial)
    if len(codes) < population:
        codes = np.concatenate([codes, encoding.sample(population - len(codes), rng, tilted=True)])
    codes = codes[unlike(codes, codes[:0])]
    points, violations = score(codes)
    for _ in range(generations):
        kept = best(points, violations, population)
        codes, points, violations = codes[kept], points[kept], violations[kept]
        made = children(encoding, codes, population, rng)
        made = made[unlike(made, codes)]
        if not len(made):
            continue
        more, broken = score(made)
        codes = np.concatenate([codes, made])
        points, violations = np.concatenate([points, more]), np.concatenate([violations, broken])
    return codes[best(points, violations, population)]
