"""Weights rounded up or down by what it does to a layer's output, not each to its nearest integer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.moments import (
    as_matrix,
    from_matrix,
    output_errors,
    rows_read,
    second_moments,
)
from nestling.quant.ranges import Range, Unquantizable
from nestling.quant.walking import Reading, walk

DAMPING = 0.01
"""Added to the moments' diagonal, as a part of its mean: that of GPTQ."""
BLOCK = 128
"""Columns after which the errors that they made are passed on to all the others."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The numbers that a range holds, as each weight may take them: `step` times an integer.

    Attributes:
        step: shaped as the weight, like the others.
        low: the smallest integer, counted from the zero point.
        high: the largest one.
    """

    step: Tensor
    low: Tensor
    high: Tensor


def grid_of(found: Range, weight: Tensor) -> Grid:
    """The grid of `found` for `weight`."""
    ends = (found.nearest(torch.full_like(weight, end)) for end in (-torch.inf, torch.inf))
    bottom, top = ends
    integers = (found.integers(torch.full_like(weight, end)) for end in (-torch.inf, torch.inf))
    first, last = integers
    step = (top - bottom) / (last - first)
    return Grid(step, (bottom / step).round(), (top / step).round())


def round_by_moments(
    graph: Graph, ranges: Mapping[str, Range], images: Iterable[Tensor], *, seed: int = 0
) -> Graph:
    """`graph` with weights on the grids of their ranges, each layer's output near the float one's.

    Column by column, a layer's weights are rounded to the nearest, and those not yet rounded make up for the
    error, as far as the second moments of the layer's input tell (GPTQ, Frantar et al. 2022, arXiv
    2210.17323): the largest moments first, 1 % damping. The layer's input is that of the quantized network
    before it, and its weights begin at those that best give the float network's output from it, so that
    errors of the layers before are made up for too. An output channel for which this errs more than rounding
    to the nearest keeps the latter. Convolutions are taken as products with patches, group by group.

    It takes about the time of some passes over the images; no gradients.

    Args:
        graph: the float network.
        ranges: of its tensors and weights.
        images: batches (N, 3, R, R); some 256 images.
        seed: chooses the positions of large maps that are looked at.

    Raises:
        Unquantizable: what a layer reads is not finite.
        ValueError: see `walk`.
    """

    def on_grid(operator: Operator, reading: Reading) -> Operator:
        found = ranges[f"{operator.name}.weight"]
        weight = operator.constant()
        grid = grid_of(found, weight)
        read = rows_read(operator, reading.rounded, seed=seed)
        moments = second_moments(read)
        target = as_matrix(operator, weight)
        missing = rows_read(operator, reading.exact, seed=seed) - read
        inverse = _inverse(moments, layer=operator.layer)
        target = target + target @ second_moments(missing, read) @ inverse
        matrices = (as_matrix(operator, part) for part in (grid.step, grid.low, grid.high))
        step, low, high = (matrix.expand(target.shape) for matrix in matrices)
        best = _column_by_column(target, inverse, moments, step, low, high)
        nearest = as_matrix(operator, found.nearest(weight))
        better = output_errors(best - target, moments) < output_errors(nearest - target, moments)
        chosen = from_matrix(operator, torch.where(better[..., None], best, nearest))
        return replace(operator, weight=found.nearest(chosen))

    return walk(graph, ranges, images, on_grid)


def _inverse(moments: Tensor, *, layer: str) -> Tensor:
    """The inverse of the damped `moments` of `layer`; where a number is always zero, that of one alone."""
    size = moments.shape[-1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1, keepdim=True)
    damping = torch.where(damping > 0, damping, 1.0)
    unit = torch.eye(size, device=moments.device, dtype=moments.dtype)
    for _ in range(_ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(moments + damping[..., None] * unit)
        if not failed.any():
            return torch.cholesky_inverse(factor)
        damping = damping * 10
    raise Unquantizable(
        f"what layer {layer} reads is not finite on the calibration images; was training complete?"
    )


def _column_by_column(
    weights: Tensor, inverse: Tensor, moments: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """`weights` (groups, outputs, numbers) on their grid, later columns making up for earlier ones."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None, :].expand(weights.shape)
    left, step, low, high = (matrix.gather(2, columns) for matrix in (weights, step, low, high))
    size = weights.shape[2]
    inverse = inverse.gather(1, order[:, :, None].expand(inverse.shape))
    inverse = inverse.gather(2, order[:, None, :].expand(inverse.shape))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.empty_like(left)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        errors = torch.empty_like(left[:, :, start:end])
        for column in range(start, end):
            now = left[:, :, column]
            kept = (now / step[:, :, column]).round_()
            kept = torch.minimum(torch.maximum(kept, low[:, :, column]), high[:, :, column])
            kept = kept.mul_(step[:, :, column])
            error = (now - kept) / upper[:, None, column, column]
            left[:, :, column:end] -= error[..., None] * upper[:, None, column, column:end]
            errors[:, :, column - start] = error
            result[:, :, column] = kept
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(result).scatter_(2, columns, result)


_ATTEMPTS = 8
