"""The range of every quantized tensor of a graph, observed once on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import Range
from nestling.quant.regions import WEIGHT_AXES, activation_formats, is_integer, sources_of

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
        return {}
    sources = sources_of(graph, formats)
    bounds = _extremes(graph, set(sources.values()), images, method=METHODS[method])
    ranges = {name: _activation_range(*bounds[source], formats[source]) for name, source in sources.items()}
    for operator in integer:
        format = policy.precision(operator.layer).weight
        if operator.weight is not None and format is not None:
            ranges |= _constant_ranges(
                operator, format, ranges[operator.inputs[0]], reduce_range=reduce_range
            )
    return ranges


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


def _activation_range(low: float, high: float, format: Format) -> Range:
    # Zero must be exact: padding is made of it, and a ReLU ends on it.
    low, high = min(low, 0.0), max(high, 0.0)
    steps = format.high - format.low
    scale = torch.tensor((high - low) / steps if high > low else 1.0, dtype=torch.float32)
    zero_point = min(max(format.low + round(-low / float(scale)), format.low), format.high)
    return Range(scale, torch.tensor(zero_point, dtype=torch.int32), format.dtype, None)


def _constant_ranges(
    operator: Operator, format: Format, images: Range, *, reduce_range: bool
) -> dict[str, Range]:
    """The ranges of an operator's weight, and of its bias, whose scale is the product of the other two."""
    weight, axis = operator.constant(), WEIGHT_AXES[operator.kind]
    largest = weight.abs().amax([other for other in range(weight.ndim) if other != axis]).float().cpu()
    levels = format.high // 2 if reduce_range else format.high
    scale = largest / levels
    if operator.bias is not None:
        # A channel with next to no weights would have a bias beyond 32 bits.
        scale = torch.maximum(scale, operator.bias.abs().float().cpu() / (images.scale * 2.0**30))
    scale = torch.where(scale > 0, scale, torch.ones(()))
    zeros = torch.zeros(scale.shape, dtype=torch.int32)
    ranges = {f"{operator.name}.weight": Range(scale, zeros, format.dtype, axis)}
    if operator.bias is not None:
        ranges[f"{operator.name}.bias"] = Range(scale * images.scale, zeros, "int32", 0)
    return ranges
