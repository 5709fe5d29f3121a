"""How good a supernet is: the area under its accuracy-cost curve, its ranking of subnets, with intervals.

Pure functions of numbers. A figure's interval is the middle 95 % of what it comes to when what it was taken
from is drawn anew, with replacement (Efron 1979): subnets, and for accuracies the images too, at once
(Owen 2007, arXiv 0712.1111: somewhat too wide rather than too narrow). It says nothing of another training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[[Indices, Floats], float]
"""A figure of the rows (of subnets) that are drawn, each image counting by a weight; the weights add to 1."""

RESAMPLES = 1000
COVERED = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic,
    *,
    rows: int,
    images: int = 0,
    kept: Sequence[int] = (),
    bounds: tuple[float, float] = (-math.inf, math.inf),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """`statistic` of what there is, and its interval; None where it is not a number, or has no interval.

    Args:
        statistic: of the numbers of rows and the images' weights.
        rows: how many there are. Those of `kept` are in every draw; the others are drawn.
        images: how many there are; 0: the statistic uses none.
        kept: rows that were chosen, not drawn, such as the ends of a curve.
        bounds: the least and the most that the statistic can be. A draw of which it is not a number, such as
            one row over and over, which has no ranking, may have been either: it widens both ends.
        seed: of the draws.
        resamples: how many.

    Raises:
        ValueError: no rows.
    """
    if rows < 1:
        raise ValueError("a bootstrap needs at least one row")
    even = np.full(images, 1 / images) if images else np.empty(0)
    value = statistic(np.arange(rows), even)
    if not math.isfinite(value):
        return None
    rng = np.random.default_rng(seed)
    fixed = np.array(sorted(set(kept)), dtype=np.int64)
    others = np.setdiff1d(np.arange(rows), fixed)
    found = []
    for _ in range(resamples):
        drawn = np.sort(np.concatenate([fixed, rng.choice(others, len(others)) if len(others) else others]))
        weights = rng.multinomial(images, even) / images if images else even
        found.append(statistic(drawn, weights))
    values = np.array(found)
    low, high = (
        # an order statistic: nothing can be interpolated between infinities
        float(np.quantile(np.where(np.isnan(values), bound, values), tail, method="nearest"))
        for bound, tail in zip(bounds, ((1 - COVERED) / 2, (1 + COVERED) / 2), strict=True)
    )
    return Estimate(value, low, high) if math.isfinite(low) and math.isfinite(high) else None


def along_cost(costs: Sequence[float], *, least: float, most: float) -> Floats:
    """Where each of `costs` lies between `least`, at 0, and `most`, at 1, on a logarithmic axis.

    Raises:
        ValueError: not 0 < least < most.
    """
    if not 0 < least < most:
        raise ValueError(f"a cost axis from {least:g} to {most:g}; it must rise, from above 0")
    places: Floats = np.log(np.asarray(costs, dtype=np.float64) / least) / math.log(most / least)
    return places


def area(places: Floats, accuracies: Floats) -> float:
    """The area under the line from point to point, `places` (N,) running from 0 to 1; flat beyond its ends.

    It is the mean accuracy of a supernet's subnets over the logarithm of their cost: each halving of the cost
    counts alike. Points with one place count as their mean. All points count, not the best of each cost: the
    best of noisy figures is too high, and the more so the more there are, so that two supernets scored on
    different numbers of subnets would not compare. What can be gained by choosing is the search's to show.

    Raises:
        ValueError: no points.
    """
    if not len(places):
        raise ValueError("an area needs at least one point")
    unique, means = _curve(places, accuracies)
    along = np.concatenate([[min(0.0, unique[0])], unique, [max(1.0, unique[-1])]])
    heights = np.concatenate([means[:1], means, means[-1:]])
    trapezoids = np.diff(along) * (heights[1:] + heights[:-1]) / 2
    return float(trapezoids.sum() / (along[-1] - along[0]))


def kendall_tau(first: Floats, second: Floats) -> float:
    """How alike two scores (N,) order what they score: 1 alike, -1 in reverse; tau-b, which allows for ties.

    Not a number where one of them is the same throughout (Kendall 1945, Biometrika 33).
    """
    signs = [np.sign(scores[:, None] - scores[None, :]) for scores in (first, second)]
    untied = math.prod(float(np.abs(sign).sum()) for sign in signs)
    return float((signs[0] * signs[1]).sum() / math.sqrt(untied)) if untied else math.nan


def partial_tau(first: Floats, second: Floats, *, given: Floats) -> float:
    """Kendall's tau of two scores (N,) beyond what both owe to a third, `given` (Kendall 1942).

    A supernet may order networks well merely because dearer ones are better. This is what it knows beside
    their cost: 0 for one that knows nothing else. Not a number where `given` orders either of them fully.
    """
    both, a, b = kendall_tau(first, second), kendall_tau(first, given), kendall_tau(second, given)
    left = (1 - a**2) * (1 - b**2)
    return (both - a * b) / math.sqrt(left) if left > 0 else math.nan


def relative_improvement(method: float, chance: float) -> float:
    """By which part of `chance`, the accuracy of the average random network, `method`'s is better.

    Yang et al. 2020, "NAS evaluation is frustratingly hard", arXiv 1912.12522, who state it in per cent. Not
    a number where `chance` is 0.
    """
    return (method - chance) / chance if chance else math.nan


def neighbours(costs: Floats) -> Indices:
    """Pairs (P, 2) of those next to each other in `costs` (N,); of an odd number the dearest is left out."""
    order = np.argsort(costs, kind="stable")
    pairs: Indices = order[: len(order) // 2 * 2].reshape(-1, 2).astype(np.int64)
    return pairs


def improvement_of_choice(pairs: Indices, scores: Floats, accuracies: Floats) -> float:
    """The relative improvement of taking, of each pair (P, 2), the one with the better score.

    Chance takes either. Networks of a pair cost about the same, so it is not won by what dearer ones are
    better by. Of equal scores both count half.

    Raises:
        ValueError: no pairs.
    """
    if not len(pairs):
        raise ValueError("a choice needs at least one pair")
    share = (1 + np.sign(scores[pairs[:, 0]] - scores[pairs[:, 1]])) / 2
    taken = share * accuracies[pairs[:, 0]] + (1 - share) * accuracies[pairs[:, 1]]
    return relative_improvement(float(taken.mean()), float(accuracies[pairs].mean()))


def improvement_along(places: Floats, accuracies: Floats, *, at: Floats, found: Floats) -> float:
    """The relative improvement of networks with accuracies `found` (M,) at the places `at` on the cost axis.

    Chance is the line from point to point through `places` and `accuracies` (N,) of networks that nobody
    chose, read at the same costs.
    """
    unique, means = _curve(places, accuracies)
    return relative_improvement(float(found.mean()), float(np.interp(at, unique, means).mean()))


def hits_to_text(hits: NDArray[np.bool_]) -> str:
    """One bit an image, as hexadecimal digits."""
    return np.packbits(hits).tobytes().hex()


def hits_from_text(text: str, count: int) -> NDArray[np.bool_]:
    """What `hits_to_text` wrote of `count` images.

    Raises:
        ValueError: `text` is something else.
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    if not 0 <= len(bits) - count < 8:
        raise ValueError(f"{len(bits)} bits for {count} images")
    hits: NDArray[Any] = bits[:count].astype(bool)
    return hits


def _curve(places: Floats, accuracies: Floats) -> tuple[Floats, Floats]:
    """The places, ascending, each once, and the mean accuracy at each."""
    unique, group = np.unique(places, return_inverse=True)
    means: Floats = np.bincount(group, weights=accuracies) / np.bincount(group)
    return unique, means
