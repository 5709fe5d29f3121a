"""The ranges of weights and biases, which need no images beyond the ranges of what they meet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant.calibration import WeightMethod, largest_of_rows
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import SMALLEST_SCALE, Range, in_blocks, rows
from nestling.quant.regions import WEIGHT_AXES


def constant_ranges(
    graph: Graph,
    policy: QuantPolicy,
    activations: Mapping[str, Range],
    *,
    weights: WeightMethod = "minmax",
    reduce_range: bool = False,
) -> dict[str, Range]:
    """`<operator>.weight` and `<operator>.bias` -> range, for every layer that `policy` keeps in integers.

    Weights of layers that compute on floats are cut into groups; their biases stay floats. Otherwise the
    bias, in 32 bits, has the scale of the products that it is added to.

    Args:
        graph: the network, its weights placed (`place`).
        policy: which layers.
        activations: name -> range, of every tensor that a layer on integers reads.
        weights: see `ranges` of `nestling.quant.observing`.
        reduce_range: 7-bit weights in place of 8-bit ones, see there.
    """
    ranges = {}
    for operator in graph.operators:
        precision = policy.precision(operator.layer)
        format, weight = precision.integers, operator.weight
        if format is None or weight is None or operator.kind not in WEIGHT_AXES:
            continue
        axis = WEIGHT_AXES[operator.kind]
        if precision.activation is None:
            if operator.kind != "MatMul" or weight.ndim == 2:
                ranges[f"{operator.name}.weight"] = grouped_range(weight, format, axis=axis)
            continue
        read = activations[operator.inputs[0]]
        found = weight_range(weight.cpu(), format, axis=axis, weights=weights, reduce_range=reduce_range)
        if operator.bias is not None:
            found = with_room_for(operator.bias, found, read)
            scale = found.scale * read.scale
            ranges[f"{operator.name}.bias"] = Range(
                scale, found.zero_point, "int32", None if found.axis is None else 0
            )
        ranges[f"{operator.name}.weight"] = found
    return ranges


def weight_range(
    weight: Tensor,
    format: Format,
    *,
    axis: int,
    weights: WeightMethod = "minmax",
    reduce_range: bool = False,
) -> Range:
    """The range of a weight that is computed on integers: symmetric, a scale for each channel or one for all.

    With less than 8 bits its scale has the least squared error, whatever `weights` says: single large weights
    would leave next to no integers to the rest. A channel of zeros has `SMALLEST_SCALE`. The range is on the
    device of the weight.
    """
    numbers = rows(weight.detach(), axis).float()
    if not format.per_channel:
        numbers = numbers.reshape(1, -1)
    levels = min(format.high, 63) if reduce_range else format.high
    scale = largest_of_rows(numbers, levels, method="mse" if format.bits < 8 else weights) / levels
    scale = scale.clamp(min=SMALLEST_SCALE)
    if not format.per_channel:
        scale = scale[0]
    zeros = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
    return Range(scale, zeros, format.dtype, axis if format.per_channel else None)


def grouped_range(weight: Tensor, format: Format, *, axis: int) -> Range:
    """The range of a weight that is stored in groups and computed in floats; each group spans its numbers.

    Raises:
        ValueError: a format without groups.
    """
    if format.group is None:
        raise ValueError(f"weights of {format.bits} bits that are computed in floats need groups")
    groups = in_blocks(rows(weight.detach(), axis).float().cpu(), format.group)
    if format.symmetric:
        scale = groups.abs().amax(2) / format.high
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = torch.zeros(scale.shape)
    else:
        low, high = groups.amin(2).clamp_(max=0.0), groups.amax(2).clamp_(min=0.0)
        scale = (high - low) / (format.high - format.low)
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = (format.low - low / scale).round_().clamp_(format.low, format.high)
    return Range(scale, zero_point.int(), format.dtype, axis, format.group)


def with_room_for(bias: Tensor, found: Range, read: Range) -> Range:
    """`found`, a weight's, with scales so wide that `bias` keeps to 32 bits in the products' scale.

    Of a channel of zeros the bias is all that there is: its scale is made for that, with 20 bits, so that
    sums stay among the whole numbers that a float32 holds.

    Args:
        bias: of the layer.
        found: the range of its weight.
        read: the range of what it reads.
    """
    most = torch.where(found.scale > SMALLEST_SCALE, 2.0**30, 2.0**20).to(read.scale.device)
    needed = bias.detach().abs().float().to(read.scale.device) / (read.scale.detach() * most)
    if found.axis is None:
        needed = needed.amax()
    return Range(torch.maximum(found.scale, needed), found.zero_point, found.dtype, found.axis)
