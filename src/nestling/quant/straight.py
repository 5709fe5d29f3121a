"""Rounding that is differentiated as if it were not there, for quantization-aware training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestling.quant.ranges import Range, in_blocks, rows


def nearest(tensor: Tensor, found: Range, *, slope: float) -> Tensor:
    """What `found` makes of `tensor`, bit for bit, with LSQ's gradients.

    To a number within the range, its ends included, the gradient passes unchanged, to one beyond it not at
    all. That of the scale
    is the sum over its numbers of the distance to the nearest integer, or of the integer at which they are
    cut off, times `slope` (LSQ, Esser et al. 2020, arXiv 1902.08153).

    Args:
        tensor: numbers.
        found: how; its scale may be one that learns.
        slope: see `slope_of`.
    """
    return _rounded(tensor, found, slope=slope, cut=True, margin=None)


def nearest_by_statistics(tensor: Tensor, found: Range, *, margin: float | None = None) -> Tensor:
    """What `found` makes of `tensor`, bit for bit; the gradient passes to all numbers, or to a few.

    Those that are cut off have it too: a statistical scale cuts off many, which must be able to return.

    Args:
        tensor: numbers.
        found: how.
        margin: only numbers that lie no further than this part of a step from the middle between two
            integers get a gradient: the others are sure of theirs (OFQ's confidence-guided annealing, Liu et
            al. 2023, arXiv 2302.02210).
    """
    return _rounded(tensor, found, slope=0.0, cut=False, margin=margin)


def instead(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `tensor` unchanged."""
    return _Instead.apply(tensor, value)  # type: ignore[no-any-return]


def slope_of(found: Range, numbers: int) -> float:
    """LSQ's factor for the gradient of a scale that `numbers` numbers share: 1 / sqrt(numbers * integers).

    `integers` is how many lie on the longer side of zero.
    """
    low, high = found.limits
    zero_points = found.zero_point.float()
    integers = torch.maximum(high - zero_points, zero_points - low).mean()
    return 1 / math.sqrt(max(numbers, 1) * float(integers))


def statistical_scale(weight: Tensor, found: Range) -> Tensor:
    """OFQ's scale of each channel: twice the mean magnitude is the end of the integers (arXiv 2302.02210).

    For b bits that is `2 * mean(|w|) / 2 ** (b - 1)`, shaped as the scale of `found`; where all weights of a
    channel are zeros it is 1. In the paper the numbers lie halfway between the multiples of the scale; here
    they are its multiples, as a runtime's integers are, and zero is one of them.
    """
    numbers = weight.detach().float()
    if found.axis is None:
        numbers = numbers.reshape(1, -1)
    elif found.block is None:
        numbers = rows(numbers, found.axis)
    else:
        raise ValueError("statistical scales are for a scale a channel, not for groups of weights")
    _, high = found.limits
    scale = 2 * numbers.abs().mean(1) / (high + 1)
    return torch.where(scale > 0, scale, 1.0).reshape(found.scale.shape)


def _rounded(tensor: Tensor, found: Range, *, slope: float, cut: bool, margin: float | None) -> Tensor:
    scale, zero_point = found.scale.to(tensor.device), found.zero_point.to(tensor.device)
    aligned = tensor
    if found.axis is not None and found.block is not None:
        aligned = in_blocks(rows(tensor, found.axis), found.block)
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    elif found.axis is not None:
        shape = [-1 if axis == found.axis else 1 for axis in range(tensor.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    settings = (*found.limits, found.dtype == "int32", slope, cut, margin)
    result: Tensor = _Nearest.apply(aligned, scale, zero_point, settings)
    if found.axis is not None and found.block is not None:
        moved = tensor.movedim(found.axis, 0)
        numbers = result.flatten(1)[:, : moved[0].numel()]
        return numbers.reshape(moved.shape).movedim(0, found.axis)
    return result


_AT_THE_END = 1e-3
"""In steps, how far beyond an end of a range a number lies that set this end: division rounds."""


class _Nearest(torch.autograd.Function):
    """The arithmetic of `Range.nearest`, operation by operation."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        settings: tuple[int, int, bool, float, bool, float | None],
    ) -> Tensor:
        low, high, wide, *_ = settings
        ctx.save_for_backward(tensor, scale, zero_point)
        ctx.settings = settings
        if wide:  # a float32 cannot hold these
            integers = tensor.double().div(scale).round_().clamp_(low, high)
        else:
            integers = tensor.div(scale).round_().add_(zero_point).clamp_(low, high)
        return integers.sub_(zero_point).mul_(scale).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tensor, scale, zero_point = ctx.saved_tensors
        low, high, _, slope, cut, margin = ctx.settings
        (grad,) = grads
        steps = tensor.div(scale)
        ends = steps.clamp(low - zero_point - _AT_THE_END, high - zero_point + _AT_THE_END)
        inside = ends == steps
        of_tensor = of_scale = None
        if ctx.needs_input_grad[0]:
            of_tensor = grad * inside if cut else grad
            if margin is not None:
                of_tensor = of_tensor * ((steps - steps.floor() - 0.5).abs() <= margin)
        if ctx.needs_input_grad[1]:
            # within: how far to the nearest integer; beyond: the integer at the end
            moved = ends.round().sub_(ends.mul_(inside)).mul_(grad)
            of_scale = moved.sum_to_size(scale.shape).mul_(slope).to(scale.dtype)
        return of_tensor, of_scale, None, None


class _Instead(torch.autograd.Function):
    """One tensor's value with another's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004 the signature
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 the signature
        return grads[0], None
