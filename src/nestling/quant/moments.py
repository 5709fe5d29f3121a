"""A layer as one product of matrices for each group: its weight, and the second moments of what it reads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.models.graph import Operator
from nestling.quant.scaling import group_count

LEAST_SAMPLES = 2048
"""Rows of a layer's input that its moments are made of, or four times as many as a row is long."""


def as_matrix(operator: Operator, weight: Tensor) -> Tensor:
    """`weight`, shaped as that of `operator`, as (groups, outputs of each, numbers that each reads)."""
    if operator.kind == "MatMul":
        return weight.T[None]
    return weight.reshape(group_count(operator), -1, weight[0].numel())


def from_matrix(operator: Operator, matrix: Tensor) -> Tensor:
    """A matrix made by `as_matrix` in the shape of the weight of `operator`."""
    if operator.kind == "MatMul":
        return matrix[0].T.contiguous()
    return matrix.reshape(operator.constant().shape)


def rows_read(operator: Operator, tensors: tuple[Tensor, ...], *, seed: int) -> Tensor:
    """What `operator`, with `as_matrix`, multiplies: (groups, samples, numbers that each output reads).

    Of a convolution's positions, and of a linear layer's rows, a random part makes the samples, the same for
    the same sizes and `seed`: `LEAST_SAMPLES`, or four for each number read, where there are so many.

    Args:
        operator: a layer, see `nestling.quant.regions.is_layer`.
        tensors: batches that it reads.
        seed: chooses the samples.
    """
    length = as_matrix(operator, operator.constant()).shape[2]
    wanted = max(LEAST_SAMPLES, 4 * length)
    generator = torch.Generator().manual_seed(seed)
    images = sum(len(tensor) for tensor in tensors)
    read = _patches if operator.kind == "Conv" else _flat
    return torch.cat([read(operator, tensor, wanted / images, generator) for tensor in tensors], dim=1)


def second_moments(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """The mean over samples of the products of any two numbers: (groups, numbers, numbers).

    Args:
        rows: (groups, samples, numbers).
        others: the second factors, shaped as `rows`, which stand in where they are not given.
    """
    return rows.mT @ (rows if others is None else others) / rows.shape[1]


def output_errors(difference: Tensor, moments: Tensor) -> Tensor:
    """The mean squared error of each output (groups, outputs), from that of its weights.

    Args:
        difference: of the weights, (groups, outputs, numbers).
        moments: (groups, numbers, numbers).
    """
    return ((difference @ moments) * difference).sum(2)


def _flat(operator: Operator, tensor: Tensor, per_image: float, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    rows = tensor.reshape(-1, tensor.shape[-1])
    wanted = math.ceil(per_image * len(tensor))
    if wanted < len(rows):
        rows = rows[torch.randperm(len(rows), generator=generator)[:wanted].to(rows.device)]
    return rows[None]


def _patches(operator: Operator, maps: Tensor, per_image: float, generator: torch.Generator) -> Tensor:
    pads, kernel = operator.integers("pads"), operator.constant().shape[2:]
    rank = len(kernel)
    sides = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    windows = F.pad(maps, sides) if any(sides) else maps
    options = zip(kernel, operator.integers("strides"), operator.integers("dilations"), strict=True)
    for axis, (taps, stride, dilation) in enumerate(options, start=2):
        # The window comes as a new last axis; views only, nothing is copied yet.
        windows = windows.unfold(axis, (taps - 1) * dilation + 1, stride)[..., ::dilation]
    sizes = windows.shape[2 : 2 + rank]
    count = math.prod(sizes)
    chosen = torch.randperm(count, generator=generator)[: math.ceil(per_image)].to(maps.device)
    places: list[Tensor] = []
    for size in reversed(sizes):  # `torch.unravel_index` would import seconds' worth of modules
        places.insert(0, chosen % size)
        chosen = chosen // size
    index: tuple[slice | Tensor, ...] = (slice(None), slice(None), *places)
    windows = windows[index]
    # (images, groups, inputs of each, positions, taps...) -> (groups, images x positions, inputs x taps)
    group = group_count(operator)
    parts = windows.reshape(len(maps), group, -1, len(chosen), math.prod(kernel))
    return parts.permute(1, 0, 3, 2, 4).reshape(group, len(maps) * len(chosen), -1)
