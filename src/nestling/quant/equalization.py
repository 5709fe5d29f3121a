"""Channels made alike in size, so that one scale suits them; and large biases moved on.

Cross-layer equalization and bias absorption of data-free quantization, Nagel et al. 2019, arXiv 1906.04721.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.scaling import Joint, by_input, group_count, joints, rescaled

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


@torch.no_grad()
def absorb_biases(graph: Graph, images: Iterable[Tensor]) -> Graph:
    """A graph whose ReLUs read smaller numbers: what a channel never falls below moves into the next bias.

    A channel whose inputs to the ReLU lie above `c = mean - 3 * deviation > 0` is lowered by `c`, and the
    next layer's bias takes in what its weights make of `c`. Only an input below `c` changes what is computed.
    The paper takes mean and deviation from batch normalization, which is folded here, so they are measured.

    It is done where a ReLU alone lies between two layers and the next one does not pad its input, since the
    zeros of padding are not lowered.

    Args:
        graph: the network, best an equalized one.
        images: batches (N, 3, R, R).

    Raises:
        ValueError: no images.
    """
    operators = {operator.name: operator for operator in graph.operators}
    found = [
        joint
        for joint in joints(graph)
        if joint.steps == ("Relu",)
        and operators[joint.writer].bias is not None
        and not any(_pads(operators[name]) for name in joint.readers)
    ]
    lowest = _mean_less_three_deviations(graph, {joint.writer for joint in found}, images)
    for joint in found:
        writer = operators[joint.writer]
        assert writer.bias is not None
        excess = lowest[joint.writer].clamp(min=0)
        operators[joint.writer] = replace(writer, bias=(writer.bias.double() - excess).to(writer.bias.dtype))
        for name in joint.readers:
            reader = operators[name]
            weight = reader.constant()
            groups = excess.reshape(group_count(reader), 1, weight.shape[1], 1)
            parts = weight.double().reshape(len(groups), -1, weight.shape[1], weight[0, 0].numel())
            more = (parts * groups).sum((2, 3)).flatten()
            old = 0 if reader.bias is None else reader.bias.double()
            operators[name] = replace(reader, bias=(old + more).to(weight.dtype))
    return replace(graph, operators=tuple(operators.values()))


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


def _pads(operator: Operator) -> bool:
    return operator.kind == "Conv" and any(operator.integers("pads"))


def _mean_less_three_deviations(graph: Graph, names: set[str], images: Iterable[Tensor]) -> dict[str, Tensor]:
    """For each of `names`, the least that nearly all its numbers have, channel by channel (channels,)."""
    counts: dict[str, int] = {}
    sums: dict[str, Tensor] = {}

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in names:
            channels = tensor.double().movedim(1, 0).flatten(1)
            both = torch.stack([channels.sum(1), channels.square().sum(1)])
            sums[name] = sums[name] + both if name in sums else both
            counts[name] = counts.get(name, 0) + channels.shape[1]
        return tensor

    seen = False
    for batch in images:
        graph.run(batch, after=look)
        seen = True
    if not seen:
        raise ValueError("no images; biases are absorbed by what is seen on some")
    found = {}
    for name, both in sums.items():
        mean, square = both / counts[name]
        found[name] = mean - 3 * (square - mean.square()).clamp(min=0).sqrt()
    return found
