"""Which numbers a format should span: all, percentiles, or what loses least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from nestling.quant.formats import Format
from nestling.quant.statistics import HALF, Bounds, Histogram

Method = Literal[
    "minmax", "moving", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse", "entropy"
]
WeightMethod = Literal["minmax", "mse"]
Cost = Callable[[Tensor, Tensor], Tensor]

_NARROWEST = 2.0**-7
"""The narrowest part of what was seen that is tried on either side of zero."""
_TRIED_PARTS = 46
"""Parts of a row's largest number that are tried for its range."""
_HELD, _HELD_ELSEWHERE = 2**18, 2**25
"""Numbers that are looked at in one go: as many as a core's cache holds, and as keep a GPU busy."""
_TRIED, _TRIED_PAIRS, _TRIED_AGAIN, _ROUNDS = 96, 12, 9, 3


def minmax(histogram: Histogram, format: Format) -> Bounds:
    """All that was seen."""
    del format
    return histogram.bounds


def moving(histogram: Histogram, format: Format) -> Bounds:
    """The extremes of the first batch, moved by a tenth towards those of each later one.

    One odd image widens them less.
    """
    del format
    low, high = histogram.extremes[0]
    for lower, higher in histogram.extremes[1:]:
        low, high = 0.9 * low + 0.1 * lower, 0.9 * high + 0.1 * higher
    return low, high


def percentile(histogram: Histogram, format: Format, *, percent: float) -> Bounds:
    """The `100 - percent`th and the `percent`th percentile of all numbers, zeros among them.

    Numbers lie evenly within a bin, so that each bound is right to the width of one. With a symmetric format
    both bounds are the percentile of the numbers without their signs.

    Raises:
        ValueError: no percentage above 50, or a histogram without counts.
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percentile {percent}; it must be above 50, and 100 at most")
    counts = _counts(histogram)
    low, high = histogram.bounds
    if format.symmetric:
        above, below = counts[HALF:], counts[:HALF].flip(0)
        bound = min(_upper(above + below, histogram, before=0.0, percent=percent), max(-low, high))
        return -bound, bound
    above, below = counts[HALF:], counts[:HALF].flip(0)
    upper = _upper(above, histogram, before=float(below.sum()), percent=percent)
    lower = -_upper(below, histogram, before=float(above.sum()), percent=percent)
    return max(low, lower), min(high, upper)


def mse(histogram: Histogram, format: Format) -> Bounds:
    """The bounds with the least squared error of what `format` makes of the numbers.

    Both ends are searched, first on a coarse grid, then around its best point. The error is that of the
    integers themselves, with the zero point rounded: cell by cell from sums over the histogram up to each
    bin, so that a pair of bounds costs as many steps as there are integers.

    Raises:
        ValueError: a histogram without counts.
    """
    counts = _counts(histogram)
    width = histogram.width
    edges = (torch.arange(2 * HALF + 1, dtype=torch.float64) - HALF) * width
    # Sums of 1, v and v * v over all numbers below an edge; evenly spread within a bin.
    powers = [counts * (edges[1:] ** power - edges[:-1] ** power) / (power * width) for power in (1, 2, 3)]
    sums = [torch.cat((torch.zeros(1, dtype=torch.float64), part.cumsum(0))) for part in powers]
    density = counts / width

    def cost(low: Tensor, high: Tensor) -> Tensor:
        steps = 2 * format.high if format.symmetric else format.high - format.low
        scale = ((high - low) / steps)[:, None]
        zero = torch.zeros_like(scale) if format.symmetric else (format.low - low[:, None] / scale).round()
        first = -format.high if format.symmetric else format.low
        levels = (torch.arange(first, format.high + 1, dtype=torch.float64) - zero) * scale
        cuts = ((levels[:, 1:] + levels[:, :-1]) / 2).clamp(float(edges[0]), float(edges[-1]))
        bins = (cuts / width + HALF).long().clamp(0, 2 * HALF - 1)
        start, inside = edges[bins], density[bins]
        error = torch.zeros(len(low), dtype=torch.float64)
        for power, weight in ((1, levels.square()), (2, -2 * levels), (3, torch.ones_like(levels))):
            below = sums[power - 1][bins] + inside * (cuts**power - start**power) / power
            whole = torch.full((len(low), 1), float(sums[power - 1][-1]), dtype=torch.float64)
            below = torch.cat((torch.zeros_like(whole), below, whole), 1)
            error += (weight * below.diff(dim=1)).sum(1)
        return error

    return _least(histogram, format, cost)


def entropy(histogram: Histogram, format: Format) -> Bounds:
    """The bounds with the least information lost, as TensorRT measures it (S7310, GTC 2017).

    That is the Kullback-Leibler divergence from the numbers cut off at the bounds to the same numbers known
    only by their integer, spread evenly over the bins of it that are not empty. As in TensorRT zeros do
    not count, and what is cut off counts with the outermost bins. Here both ends are searched; TensorRT and
    ONNX Runtime cut off both at one magnitude.

    Raises:
        ValueError: a histogram without counts.
    """
    counts = _counts(histogram)
    total = float(counts.sum())
    levels = format.high - format.low + 1

    def summed(part: Tensor) -> Tensor:
        return torch.cat((torch.zeros(1, dtype=torch.float64), part.cumsum(0)))

    below, below_filled = summed(counts), summed((counts > 0).double())
    below_logs = summed(torch.special.xlogy(counts, counts))
    parts = torch.arange(levels + 1)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        start = (low / histogram.width + HALF).floor().long().clamp(0, HALF)
        stop = (high / histogram.width + HALF).ceil().long().clamp(HALF, 2 * HALF)
        cuts = start[:, None] + (stop - start)[:, None] * parts // levels
        inside, filled = below[cuts].diff(dim=1), below_filled[cuts].diff(dim=1)
        kept = inside.sum(1)
        logs = below_logs[stop] - below_logs[start]
        crossed = torch.zeros(len(low), dtype=torch.float64)
        for outside, bin, cell in ((below[start], start, 0), (total - below[stop], stop - 1, -1)):
            there = counts[bin]
            logs = (
                logs
                + torch.special.xlogy(there + outside, there + outside)
                - torch.special.xlogy(there, there)
            )
            filled[:, cell] += ((there == 0) & (outside > 0)).double()
            average = inside[:, cell] / filled[:, cell].clamp(min=1)
            # What was cut off, but fell into a cell that holds nothing, is lost altogether.
            crossed += torch.where(outside > 0, outside * average.log(), 0.0)
        spread = torch.special.xlogy(inside, inside / filled.clamp(min=1)).sum(1) + crossed
        divergence = (logs - spread) / total - math.log(total) + kept.log()
        divergence = divergence.nan_to_num(nan=torch.inf, posinf=torch.inf)
        # With fewer bins than integers nothing is lost inside, whatever is cut off.
        return torch.where(stop - start >= levels, divergence, torch.inf).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )

    return _least(histogram, format, cost)


METHODS: Mapping[Method, Callable[[Histogram, Format], Bounds]] = MappingProxyType(
    {
        "minmax": minmax,
        "moving": moving,
        "percentile-99.9": partial(percentile, percent=99.9),
        "percentile-99.99": partial(percentile, percent=99.99),
        "percentile-99.999": partial(percentile, percent=99.999),
        "mse": mse,
        "entropy": entropy,
    }
)
"""How the bounds of a tensor follow from its histogram, by name."""
WITHOUT_COUNTS: frozenset[Method] = frozenset({"minmax", "moving"})
"""The methods that read no more than extremes."""


def largest_of_rows(rows: Tensor, ends: tuple[int, int], *, method: WeightMethod = "minmax") -> Tensor:
    """(R,): for each row of `rows` (R, K), the number that the largest integer should stand for.

    `minmax` takes the row's largest number; `mse` that part of it, of 46 between a tenth and all, whose
    integers have the least squared error.

    Args:
        rows: weights that share a scale.
        ends: the smallest and the largest integer; zero is integer 0.
        method: how.
    """
    whole = rows.abs().amax(1)
    if method == "minmax":
        return whole
    ratios = torch.linspace(1.0, 0.1, _TRIED_PARTS).tolist()
    together = _HELD if rows.device.type == "cpu" else _HELD_ELSEWHERE
    at_a_time = max(1, together // (len(ratios) * rows.shape[1]))
    parts = zip(torch.split(rows, at_a_time), torch.split(whole, at_a_time), strict=True)
    return torch.cat([_least_of_rows(part, wide, ends, ratios, together) for part, wide in parts])


def _least_of_rows(
    rows: Tensor, whole: Tensor, ends: tuple[int, int], ratios: Sequence[float], together: int
) -> Tensor:
    """The parts of `whole`, (R,), by one of `ratios` each, with which the error of `rows` (R, K) is least.

    Of equals it is the first. `together` numbers are looked at in one go, as far as a row allows: a loop over
    the ratios would take ten operators for each, which for most layers is all of the time.
    """
    best, least = whole, torch.full_like(whole, torch.inf)
    count = max(1, together // max(1, rows.numel()))
    for begin in range(0, len(ratios), count):
        tried = torch.tensor(ratios[begin : begin + count], device=rows.device)[:, None] * whole
        scale = torch.where(whole > 0, tried / ends[1], 1.0)[:, :, None]
        error = (rows / scale).round_().clamp_(*ends).mul_(scale).sub_(rows).square_().sum(2)
        here = error.amin(0)
        places = torch.arange(len(tried), device=rows.device)[:, None].expand_as(error)
        first = torch.where(error == here, places, len(tried) - 1).amin(0)
        best = torch.where(here < least, tried.gather(0, first[None])[0], best)
        least = torch.minimum(here, least)
    return best


def _counts(histogram: Histogram) -> Tensor:
    if histogram.counts is None:
        raise ValueError("the histogram holds extremes only; collect it with counts for this method")
    return histogram.counts.double()


def _upper(counts: Tensor, histogram: Histogram, *, before: float, percent: float) -> float:
    """The percentile where `before` numbers lie below zero and `counts` in the bins above; zero at least."""
    total = before + histogram.zeros + float(counts.sum())
    rank = percent / 100 * total - before - histogram.zeros
    if rank <= 0:
        return 0.0
    reached = counts.cumsum(0)
    bin = min(int(torch.searchsorted(reached, torch.tensor(rank, dtype=torch.float64))), HALF - 1)
    missing = rank - float(reached[bin] - counts[bin])
    return (bin + min(missing / max(float(counts[bin]), 1.0), 1.0)) * histogram.width


def _least(histogram: Histogram, format: Format, cost: Cost) -> Bounds:
    """The bounds around zero, no wider than what was seen, of the least `cost`; the widest of equals."""
    low, high = (min(histogram.bounds[0], 0.0), max(histogram.bounds[1], 0.0))
    if format.symmetric:
        high = max(-low, high)
        low = -high
    if not low < high:
        return low, high
    one_searched = format.symmetric or not low or not high
    tried = _TRIED if one_searched else _TRIED_PAIRS
    grid = _NARROWEST ** torch.linspace(0, 1, tried, dtype=torch.float64)
    step = _NARROWEST ** (-1 / (tried - 1))
    best = (1.0, 1.0)
    for _ in range(_ROUNDS):
        below, above = ((part * grid).clamp(_NARROWEST, 1.0) for part in best)
        pairs = torch.stack((below, below), 1) if one_searched else torch.cartesian_prod(below, above)
        first, second = pairs[int(cost(low * pairs[:, 0], high * pairs[:, 1]).argmin())].tolist()
        best = first, second
        grid = step ** torch.linspace(1, -1, _TRIED_AGAIN, dtype=torch.float64)
        step **= 2 / (_TRIED_AGAIN - 1)
    return low * best[0], high * best[1]
