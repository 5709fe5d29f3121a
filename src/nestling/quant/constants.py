"""The ranges of weights and biases, which need no images beyond the ranges of what they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant.calibration import WeightMethod, largest_of_rows
from nestling.quant.formats import Format
from nestling.quant.mixed import TYPES
from nestling.quant.policy import Precision, QuantPolicy
from nestling.quant.ranges import SMALLEST_SCALE, Range, in_blocks, rows
from nestling.quant.regions import WEIGHT_AXES, is_layer


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
        if not is_layer(operator):
            continue
        found = stored_range(
            operator.constant().cpu(),
            precision,
            axis=WEIGHT_AXES[operator.kind],
            weights=weights,
            reduce_range=reduce_range,
        )
        if found is None:
            continue
        if operator.bias is not None and precision.activation is not None:
            read = activations[operator.inputs[0]]
            found = with_room_for(operator.bias, found, read)
            scale = found.scale * read.scale
            ranges[f"{operator.name}.bias"] = Range(
                scale, found.zero_point, "int32", None if found.axis is None else 0
            )
        ranges[f"{operator.name}.weight"] = found
    return ranges


def stored_range(
    weight: Tensor,
    precision: Precision,
    *,
    axis: int,
    weights: WeightMethod = "minmax",
    reduce_range: bool = False,
) -> Range | None:
    """The range of a layer's weight in `precision`; None where it stays floats, or has codes of its own.

    Of layers that compute on floats the weights are in groups, each of which spans its numbers.

    Args:
        weight: placed (`place`) where the precision has codes.
        precision: of its layer.
        axis: of its output channels, see `WEIGHT_AXES`.
        weights: see `weight_range`; groups know no other way.
        reduce_range: see `ranges` of `nestling.quant.observing`.

    Raises:
        ValueError: a precision of weights alone whose format has no groups.
    """
    format = precision.integers
    if format is None:
        return None
    if precision.activation is not None:
        return weight_range(weight, format, axis=axis, weights=weights, reduce_range=reduce_range)
    return grouped_range(weight, format, axis=axis)


def stored_weight(
    weight: Tensor,
    precision: Precision,
    *,
    axis: int,
    weights: WeightMethod = "minmax",
    reduce_range: bool = False,
) -> Tensor:
    """A layer's `weight` as `precision` holds it, in floats: on its codes, its integers, or 16-bit floats.

    Args:
        weight: not placed yet.
        precision, axis, weights, reduce_range: see `stored_range`.

    Raises:
        ValueError: see `stored_range`.
    """
    if precision.floats != "float32":
        return weight.to(TYPES[precision.floats]).to(weight.dtype)
    code = precision.weight
    if code is not None and not isinstance(code, Format):
        return code.nearest(weight, axis=axis)
    found = stored_range(weight, precision, axis=axis, weights=weights, reduce_range=reduce_range)
    return weight if found is None else found.nearest(weight)


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

    Eight bits of a reduced range are `int7`: a scale of the least error leaves out large weights, which must
    be cut off there, not at 8 bits.
    """
    numbers = rows(weight.detach(), axis).float()
    if not format.per_channel:
        numbers = numbers.reshape(1, -1)
    held = replace(format, bits=7) if reduce_range and format.bits == 8 else format
    method: WeightMethod = "mse" if format.bits < 8 else weights
    scale = largest_of_rows(numbers, (held.low, held.high), method=method) / held.high
    scale = scale.clamp(min=SMALLEST_SCALE)
    if not format.per_channel:
        scale = scale[0]
    zeros = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
    return Range(scale, zeros, held.dtype, axis if format.per_channel else None)


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
