"""What the tensors of a float network held on images: histograms, made in one pass and kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.ranges import Unquantizable

Bounds = tuple[float, float]
"""The smallest and the largest number."""

HALF = 4096
"""Bins on either side of zero."""
_CHUNK = 2**15
"""Numbers that are counted at a time on a CPU, so that they stay in its cache."""
_FINEST = -120
"""The exponent of the smallest width, whose inverse is still a 32-bit float."""


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How often a tensor held which numbers.

    Bins are `2 ** exponent` wide and begin at zero, and the exponent is the smallest with which they hold
    every number: so it does not depend on how the images were cut into batches, and two histograms add up.

    Attributes:
        extremes: the smallest and the largest number of each batch, in order.
        counts: int64 (2 * HALF,): bin `i` counts the numbers, zeros apart, from `(i - HALF) * width` to
            before `(i + 1 - HALF) * width`. None where only extremes were asked for.
        exponent: of two, the width of a bin; None as long as all numbers are zero.
        zeros: how many numbers are exactly zero.
    """

    extremes: tuple[Bounds, ...]
    counts: Tensor | None = None
    exponent: int | None = None
    zeros: int = 0

    @property
    def bounds(self) -> Bounds:
        """The smallest and the largest number of all."""
        return min(low for low, _ in self.extremes), max(high for _, high in self.extremes)

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0 ** (self.exponent or 0)

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of both, exact: the finer one's bins are merged in pairs until they are as wide.

        Raises:
            ValueError: one of them counts, the other does not.
        """
        if self.counts is None and other.counts is None:
            return Histogram((*self.extremes, *other.extremes))
        if self.counts is None or other.counts is None:
            raise ValueError("only one of the two histograms counts numbers; collect both with counts")
        known = [part.exponent for part in (self, other) if part.exponent is not None]
        exponent = max(known, default=None)
        counts = sum(
            _merged(part.counts, exponent - part.exponent)
            for part in (self, other)
            if exponent is not None and part.counts is not None and part.exponent is not None
        )
        return Histogram(
            (*self.extremes, *other.extremes),
            counts if isinstance(counts, Tensor) else self.counts,
            exponent,
            self.zeros + other.zeros,
        )


def histogram(tensor: Tensor, *, counts: bool = True) -> Histogram:
    """The histogram of one batch of a tensor, of any shape and on any device.

    Args:
        tensor: not empty.
        counts: otherwise extremes only, which is several times faster.

    Raises:
        Unquantizable: a number that is not finite.
    """
    low, high = (float(extreme) for extreme in _in_order_of_memory(tensor).aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unquantizable(f"numbers from {low} to {high}, which are not finite")
    if not counts:
        return Histogram(((low, high),))
    largest = max(-low, high)
    if not largest:
        return Histogram(((low, high),), torch.zeros(2 * HALF, dtype=torch.int64), None, tensor.numel())
    exponent = max(math.frexp(largest)[1] - (HALF.bit_length() - 1), _FINEST)
    numbers = _in_order_of_memory(tensor).detach().flatten()
    found = torch.zeros(2 * HALF + 1, dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(numbers, _CHUNK if tensor.device.type == "cpu" else len(numbers)):
        # Multiplying by a power of two is exact, so that every number falls into its bin; positive ones move
        # up by one, and zeros have a bin between them and the negative ones.
        bins = chunk.float().mul(2.0**-exponent).floor_().add_(HALF).add_(chunk > 0).long()
        found += torch.bincount(bins, minlength=2 * HALF + 1)
    found = found.cpu()
    return Histogram(((low, high),), torch.cat((found[:HALF], found[HALF + 1 :])), exponent, int(found[HALF]))


@torch.no_grad()
def collect(
    graph: Graph, images: Iterable[Tensor], names: Collection[str], *, counts: bool = True
) -> Mapping[str, Histogram]:
    """Name -> histogram of the tensors called `names`, from one pass over `images`.

    Args:
        graph: the float network.
        images: batches (N, 3, R, R) on the device of its weights.
        names: of its tensors.
        counts: otherwise extremes only, which is all that the methods `minmax` and `moving` read.

    Raises:
        Unquantizable: a tensor that is not finite.
        ValueError: no images, or a name that the graph does not have.
    """
    wanted = set(names)
    unknown = wanted - graph.shapes.keys()
    if unknown:
        raise ValueError(f"no tensor {min(unknown)!r} in this graph")
    seen: dict[str, Histogram] = {}
    batches = 0

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in wanted:
            try:
                found = histogram(tensor, counts=counts)
            except Unquantizable as error:
                raise Unquantizable(
                    f"tensor {name} is not finite on the calibration images; was training complete?"
                ) from error
            seen[name] = seen[name] + found if name in seen else found
        return tensor

    for batch in images:
        if len(batch):
            graph.run(batch, after=look)
            batches += 1
    if not batches:
        raise ValueError("no calibration images; quantization needs at least one batch")
    return seen


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Histograms with the float network that they are of, so that they can be kept for its other policies.

    Which images they are of is for whoever keeps them to know.

    Attributes:
        graph: the network.
        histograms: tensor name -> histogram.
    """

    graph: Graph
    histograms: Mapping[str, Histogram]

    def lacking(self, graph: Graph, names: Collection[str], *, counts: bool = True) -> frozenset[str]:
        """Those of `names` that a pass over the images must still look at; none where these suffice.

        Args:
            graph: the float network; of another than this one's every name is lacking.
            names: of tensors, such as `observing.needed` gives for a policy.
            counts: whether the method reads more than extremes.
        """
        if not same_network(graph, self.graph):
            return frozenset(names)
        return frozenset(
            name
            for name in names
            if name not in self.histograms or (counts and self.histograms[name].counts is None)
        )


def statistics(
    graph: Graph,
    images: Iterable[Tensor],
    names: Collection[str],
    *,
    kept: Statistics | None = None,
    counts: bool = True,
) -> Statistics:
    """The statistics of `graph` with at least `names`: `kept`, and no image is read, where it suffices.

    A histogram is the same whether it was kept or is made now, so ranges do not depend on what came before.

    Args:
        graph: the float network.
        images: batches (N, 3, R, R), the same as those of `kept`.
        names: of its tensors.
        kept: what is known already; of another network it is not used.
        counts: see `collect`.

    Raises:
        ValueError: see `collect`.
    """
    if kept is None or not same_network(graph, kept.graph):
        kept = Statistics(graph, {})
    lacking = kept.lacking(graph, names, counts=counts)
    if not lacking:
        return kept
    more = collect(graph, images, lacking, counts=counts)
    return replace(kept, histograms={**kept.histograms, **more})


def same_network(one: Graph, other: Graph) -> bool:
    """Whether two graphs have the same operators, weights and resolution.

    Weights that two graphs share are not compared, so that it takes no time for policies of one network.
    """
    if one is other:
        return True
    return (
        (one.input, one.output, one.resolution) == (other.input, other.output, other.resolution)
        and len(one.operators) == len(other.operators)
        and all(_same(*pair) for pair in zip(one.operators, other.operators, strict=True))
    )


def _same(one: Operator, other: Operator) -> bool:
    return (
        (one.name, one.kind, one.inputs, one.attributes)
        == (other.name, other.kind, other.inputs, other.attributes)
        and _equal(one.weight, other.weight)
        and _equal(one.bias, other.bias)
    )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other or one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def _in_order_of_memory(tensor: Tensor) -> Tensor:
    """`tensor` with its axes in the order in which its numbers lie: read eight times as fast."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def _merged(counts: Tensor, times: int) -> Tensor:
    """`counts` in bins `2 ** times` as wide."""
    merged = min(times, HALF.bit_length() - 1)
    sums = counts.reshape(-1, 2**merged).sum(1)
    half = len(sums) // 2
    # Beyond one bin on either side of zero, wider bins hold the same numbers.
    result = torch.zeros_like(counts)
    result[HALF - half : HALF + half] = sums
    return result
