"""The range of every quantized tensor of a graph, observed once on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant.constants import constant_ranges
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import Range, activation_range
from nestling.quant.regions import activation_formats, is_integer, sources_of

Bounds = tuple[float, float]
Method = Literal["minmax", "moving"]


@torch.no_grad()
def observe(
    graph: Graph,
    policy: QuantPolicy,
    images: Iterable[Tensor],
    *,
    method: Method = "minmax",
    reduce_range: bool = False,
) -> Mapping[str, Range]:
    """Name -> range, for every tensor, weight and bias that `policy` quantizes; empty where that is none.

    Tensors have the names of the graph; an operator's constants are called `<operator>.weight` and
    `<operator>.bias`, as in the ONNX file. A quantized operator has ranges for what it reads and, after a
    ReLU or clip that it alone feeds, for what it writes; the network's logits stay floats. What only moves
    numbers keeps the range of what it moves.

    Args:
        graph: the network.
        policy: which layers.
        images: batches (N, 3, R, R) on the device of the graph's weights; they set the ranges of activations.
        method: `minmax` spans all that was seen; `moving` follows each batch's extremes by a tenth, which
            one odd image widens less.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI: their products of unsigned and signed bytes
            are added in 16 bits that overflow, and the runtime silently computes something else.

    Raises:
        ValueError: no images, or activations that are not finite.
    """
    integer = [operator for operator in graph.operators if is_integer(operator, policy)]
    formats = activation_formats(graph, integer, policy)
    if not formats:
        return constant_ranges(graph, policy, {})
    sources = sources_of(graph, formats)
    bounds = _extremes(graph, set(sources.values()), images, method=METHODS[method])
    ranges = {name: activation_range(*bounds[source], formats[source]) for name, source in sources.items()}
    return ranges | constant_ranges(graph, policy, ranges, reduce_range=reduce_range)


def _widest(old: Bounds, new: Bounds) -> Bounds:
    return min(old[0], new[0]), max(old[1], new[1])


def _followed(old: Bounds, new: Bounds) -> Bounds:
    return 0.9 * old[0] + 0.1 * new[0], 0.9 * old[1] + 0.1 * new[1]


METHODS: Mapping[str, Callable[[Bounds, Bounds], Bounds]] = {"minmax": _widest, "moving": _followed}
"""How the extremes seen so far and those of one more batch make new ones."""


def _extremes(
    graph: Graph, names: set[str], images: Iterable[Tensor], *, method: Callable[[Bounds, Bounds], Bounds]
) -> dict[str, Bounds]:
    seen: dict[str, Bounds] = {}

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in names:
            low, high = (float(extreme) for extreme in tensor.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(
                    f"tensor {name} is not finite on the calibration images; was training complete?"
                )
            seen[name] = method(seen[name], (low, high)) if name in seen else (low, high)
        return tensor

    for batch in images:
        graph.run(batch, after=look)
    if not seen:
        raise ValueError("no calibration images; quantization needs at least one batch")
    return seen
