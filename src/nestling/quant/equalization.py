"""Channels made alike in size, so that one scale suits them.

Cross-layer equalization of data-free quantization, Nagel et al. 2019, arXiv 1906.04721.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.scaling import Joint, by_input, joints, rescaled

SWEEPS = 100
"""The most often that all joints are balanced; chains through depthwise convolutions take some ten sweeps."""
SETTLED = 1e-3
"""How far from 1 a scale may be in a sweep that is the last one."""


@torch.no_grad()
def equalize(graph: Graph) -> Graph:
    """A graph that computes the same, in which what writes a channel and what reads it have equal weights.

    At each joint of two layers, channel `i` is divided by `sqrt(r1[i] / r2[i])`, where `r1` is the largest
    weight of the rows that write it and `r2` that of the columns that read it; over and over, until nothing
    changes. A channel without weights on one side keeps its size. No bias grows beyond its layer's largest,
    as it would in a channel with next to no weights, whose activations would then need a range of their own.

    Equalize before ranges are observed: activations change their size too.
    """
    operators = {operator.name: _in_64_bits(operator) for operator in graph.operators}
    found = joints(graph)
    limits = {joint.writer: _largest_bias(operators[joint.writer]) for joint in found}
    for _ in range(SWEEPS):
        furthest = 0.0
        for joint in found:
            scale = _balance(operators, joint, largest_bias=limits[joint.writer])
            operators |= rescaled(operators, joint, scale)
            furthest = max(furthest, float((scale - 1).abs().max()))
        if furthest < SETTLED:
            break
    changed = {name for joint in found for name in (joint.writer, *joint.readers)}
    return replace(
        graph,
        operators=tuple(
            _like(operators[operator.name], operator) if operator.name in changed else operator
            for operator in graph.operators
        ),
    )


def _balance(operators: Mapping[str, Operator], joint: Joint, *, largest_bias: float) -> Tensor:
    """By what each channel of `joint` is divided."""
    writer = operators[joint.writer]
    written = writer.constant().flatten(1).abs().amax(1)
    read = torch.zeros_like(written)
    for name, repeats in zip(joint.readers, joint.repeats, strict=True):
        columns = by_input(operators[name]).abs().amax(1)
        read = torch.maximum(read, columns.reshape(-1, repeats).amax(1))
    scale = torch.where((written > 0) & (read > 0), (written / read).sqrt(), 1.0)
    if writer.bias is not None and largest_bias:
        scale = torch.maximum(scale, writer.bias.abs() / largest_bias)
    return torch.where((written > 0) & (read > 0), scale, 1.0)


def _largest_bias(operator: Operator) -> float:
    return 0.0 if operator.bias is None else float(operator.bias.abs().max())


def _in_64_bits(operator: Operator) -> Operator:
    return replace(
        operator,
        weight=None if operator.weight is None else operator.weight.double(),
        bias=None if operator.bias is None else operator.bias.double(),
    )


def _like(operator: Operator, original: Operator) -> Operator:
    """`operator` with constants of the types of those of `original`."""
    bias = operator.bias
    if bias is not None and original.bias is not None:
        bias = bias.to(original.bias.dtype)
    return replace(operator, weight=operator.constant().to(original.constant().dtype), bias=bias)
