"""A graph changed layer by layer, each seeing what the quantized layers before it leave of its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.models.operators import compute
from nestling.quant.fake import rounded
from nestling.quant.ranges import Range

Batches = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a layer reads and should write, batch by batch of the calibration images.

    Attributes:
        exact: its input in the float network.
        rounded: its input in the quantized network.
        wanted: its output in the float network.
        images: how many images these are; a linear layer may read several rows of each.
    """

    exact: Batches
    rounded: Batches
    wanted: Batches
    images: int


Change = Callable[[Operator, Reading], Operator]
"""Gives the operator that takes a layer's place; the layers behind it see what that one writes, quantized."""


@torch.no_grad()
def walk(
    graph: Graph,
    ranges: Mapping[str, Range],
    images: Iterable[Tensor],
    change: Change,
    *,
    exact: Graph | None = None,
) -> Graph:
    """`graph` with each layer that has a range for its weight replaced by what `change` makes of it.

    In the order of the graph, the float and the quantized network run side by side, once. Every tensor of
    every image is held until its last reader has run: some 256 images at a time.

    Args:
        graph: the network.
        ranges: of its tensors and weights.
        images: batches (N, 3, R, R) on the device of the weights.
        change: is given the layers of `graph`, with their biases and weights as they are.
        exact: the float network, of the same operators; `graph` itself where it is not given.

    Raises:
        ValueError: no images, images of another shape, or an `exact` with other operators.
    """
    operators = (exact or graph).operators
    if [operator.name for operator in operators] != [operator.name for operator in graph.operators]:
        raise ValueError("the exact graph has other operators than the one to change; give one's own origin")
    batches = tuple(images)
    if not batches:
        raise ValueError("no calibration images; at least one batch is needed")
    wanted = (3, graph.resolution, graph.resolution)
    odd = [tuple(batch.shape) for batch in batches if tuple(batch.shape[1:]) != wanted]
    if odd:
        raise ValueError(f"this graph takes images (N, {', '.join(map(str, wanted))}), not {odd[0]}")
    count = sum(map(len, batches))
    unread = Counter(name for operator in graph.operators for name in operator.inputs)
    floats = {graph.input: batches}
    integers = {graph.input: _nearest(graph.input, batches, ranges)}
    changed = []
    for operator, original in zip(graph.operators, operators, strict=True):
        floats[operator.name] = _computed(original, floats)
        if operator.weight is not None and f"{operator.name}.weight" in ranges:
            read = operator.inputs[0]
            reading = Reading(floats[read], integers[read], floats[operator.name], count)
            operator = change(operator, reading)
        changed.append(operator)
        written = _computed(rounded(operator, ranges), integers)
        integers[operator.name] = _nearest(operator.name, written, ranges)
        for name in operator.inputs:
            unread[name] -= 1
            if not unread[name]:
                del floats[name], integers[name]
    return replace(graph, operators=tuple(changed))


def _computed(operator: Operator, tensors: Mapping[str, Batches]) -> Batches:
    inputs = [tensors[name] for name in operator.inputs]
    return tuple(compute(operator, *batch) for batch in zip(*inputs, strict=True))


def _nearest(name: str, batches: Batches, ranges: Mapping[str, Range]) -> Batches:
    found = ranges.get(name)
    return batches if found is None else tuple(found.nearest(batch) for batch in batches)
