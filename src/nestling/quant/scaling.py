"""Channels whose size is free: one layer may write them smaller where all readers take them larger.

`relu(s * x)` is `s * relu(x)` for every `s > 0`. So where only such steps lie between two layers, a scale for
each channel moves from the rows of the one to the columns of the other, and the network computes the same
(Nagel et al. 2019, arXiv 1906.04721).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from nestling.models.graph import Graph, Operator


@dataclass(frozen=True, slots=True)
class Joint:
    """The channels that a layer writes, all of whose readers multiply them by weights.

    Attributes:
        writer: name of the operator that writes them, along the first axis of its weight.
        readers: names of the operators that read them, each once.
        repeats: how many neighbouring inputs of each reader one channel has become, as by flattening a map.
        steps: kinds of the operators between, in no order.
    """

    writer: str
    readers: tuple[str, ...]
    repeats: tuple[int, ...]
    steps: tuple[str, ...]


def joints(graph: Graph, *, writers: Collection[str] = ("Conv", "Gemm")) -> tuple[Joint, ...]:
    """Every joint of `graph`, in the order of the writers.

    Readers are convolutions, grouped and depthwise ones too, and linear layers. Channels of which anything
    else learns the size (a sum, a gate, a clip, a norm, the logits) make no joint.

    Args:
        graph: the network.
        writers: kinds of operators that may write: of `Conv`, `Gemm`, and `LayerNormalization` (of the last
            axis).
    """
    readers = graph.readers()
    found = []
    for operator in graph.operators:
        axis = _written_axis(operator, graph) if operator.kind in writers else None
        if axis is None:
            continue
        joint = _follow(operator, axis, graph, readers)
        if joint is not None:
            found.append(joint)
    return tuple(found)


def rescaled(operators: Mapping[str, Operator], joint: Joint, scale: Tensor) -> dict[str, Operator]:
    """The operators of `joint`, by name, its channels made `scale` times smaller; they compute the same.

    Args:
        operators: the graph's, by name.
        joint: of the same graph.
        scale: (channels,), positive.
    """
    changed = {joint.writer: with_smaller_outputs(operators[joint.writer], scale)}
    for name, repeats in zip(joint.readers, joint.repeats, strict=True):
        reader = changed.get(name, operators[name])
        changed[name] = with_larger_weights(reader, scale.repeat_interleave(repeats))
    return changed


def with_smaller_outputs(operator: Operator, scale: Tensor) -> Operator:
    """`operator` with each output channel divided by its `scale` (channels,)."""
    weight = operator.constant()
    scale = scale.to(weight.device, weight.dtype)
    rows = scale.reshape(-1, *(1 for _ in range(weight.ndim - 1)))
    return replace(
        operator, weight=weight / rows, bias=None if operator.bias is None else operator.bias / scale
    )


def with_larger_weights(operator: Operator, scale: Tensor) -> Operator:
    """`operator` with the weights of each of its input channels multiplied by their `scale` (inputs,)."""
    weight = operator.constant()
    group = group_count(operator)
    # (groups, outputs of each, inputs of each, taps)
    parts = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    columns = scale.to(weight.device, weight.dtype).reshape(group, 1, weight.shape[1], 1)
    return replace(operator, weight=(parts * columns).reshape(weight.shape))


def by_input(operator: Operator) -> Tensor:
    """The weights of each input channel of `operator`, a Conv or Gemm: (inputs, weights of each)."""
    weight = operator.constant()
    group = group_count(operator)
    parts = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    return parts.transpose(1, 2).reshape(group * weight.shape[1], -1)


def group_count(operator: Operator) -> int:
    """The groups of a convolution; 1 for other layers."""
    return operator.integer("group") if operator.kind == "Conv" else 1


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor has the channels: along `axis`, each as `repeats` neighbours."""

    axis: int
    repeats: int = 1


def _written_axis(operator: Operator, graph: Graph) -> int | None:
    shape = graph.shapes[operator.name]
    if operator.weight is None:
        return None
    if operator.kind == "LayerNormalization":
        return len(shape) - 1 if operator.weight.ndim == 1 else None
    return 1


def _follow(writer: Operator, axis: int, graph: Graph, readers: Mapping[str, list[Operator]]) -> Joint | None:
    waiting = [(writer.name, _Place(axis))]
    found: dict[str, int] = {}
    steps: list[str] = []
    while waiting:
        name, place = waiting.pop()
        if name == graph.output or not readers[name]:
            return None
        for reader in readers[name]:
            if reader.kind in ("Conv", "Gemm"):
                if place.axis != 1 or (reader.kind == "Conv" and place.repeats != 1):
                    return None
                found[reader.name] = place.repeats
                continue
            there = _after(reader, place, graph)
            if there is None:
                return None
            steps.append(reader.kind)
            waiting.append((reader.name, there))
    return Joint(writer.name, tuple(found), tuple(found.values()), tuple(steps))


def _after(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    """Where the channels are behind `operator`; None where a scale does not survive it."""
    if len(operator.inputs) != 1:
        return None
    if operator.kind in _HOMOGENEOUS:
        return place
    if operator.kind in _OF_MAPS:
        return place if place.axis == 1 else None
    rule = _MOVING.get(operator.kind)
    return None if rule is None else rule(operator, place, graph)


_HOMOGENEOUS = {"Relu", "LeakyRelu", "PRelu", "Abs"}
_OF_MAPS = {"MaxPool", "AveragePool", "GlobalAveragePool", "Resize"}


def _through_product(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    return place if graph.shapes[operator.name] == graph.shapes[operator.inputs[0]] else None


def _through_pad(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    pads = operator.integers("pads")
    rank = len(graph.shapes[operator.inputs[0]])
    zeros = operator.attributes.get("mode", "constant") != "constant" or not operator.attributes.get("value")
    return place if zeros and not pads[place.axis] and not pads[place.axis + rank] else None


def _through_reduction(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    rank = len(graph.shapes[operator.inputs[0]])
    axes = {axis % rank for axis in operator.integers("axes")}
    if place.axis in axes:
        return None
    gone = 0 if operator.integer("keepdims") else sum(axis < place.axis for axis in axes)
    return replace(place, axis=place.axis - gone)


def _through_transpose(operator: Operator, place: _Place, graph: Graph) -> _Place | None:  # noqa: ARG001
    return replace(place, axis=operator.integers("perm").index(place.axis))


def _through_reshape(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    before, after = graph.shapes[operator.inputs[0]], graph.shapes[operator.name]
    outer, channels, inner = math.prod(before[: place.axis]), before[place.axis], before[place.axis + 1 :]
    for axis in range(1, len(after)):
        if math.prod(after[:axis]) != outer:
            continue
        if after[axis] == channels:
            return replace(place, axis=axis)
        if after[axis] == channels * math.prod(inner):
            return _Place(axis, place.repeats * math.prod(inner))
    return None


def _through_choice(operator: Operator, place: _Place, graph: Graph) -> _Place | None:
    rank = len(graph.shapes[operator.inputs[0]])
    axes = operator.integers("axes") if operator.kind == "Slice" else (operator.integer("axis"),)
    axis = axes[0] % rank
    if len(axes) != 1 or axis == place.axis:
        return None
    gone = len(graph.shapes[operator.name]) < rank and axis < place.axis
    return replace(place, axis=place.axis - 1) if gone else place


_MOVING: Mapping[str, Callable[[Operator, _Place, Graph], _Place | None]] = {
    "Mul": _through_product,
    "Div": _through_product,
    "Pad": _through_pad,
    "ReduceMean": _through_reduction,
    "ReduceSum": _through_reduction,
    "ReduceMax": _through_reduction,
    "Transpose": _through_transpose,
    "Reshape": _through_reshape,
    "Flatten": _through_reshape,
    "Squeeze": _through_reshape,
    "Unsqueeze": _through_reshape,
    "Slice": _through_choice,
    "Gather": _through_choice,
}
