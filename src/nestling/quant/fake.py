"""Quantized arithmetic in PyTorch: what the quantized ONNX file computes, without a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant.ranges import Range


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """A graph whose constants are rounded to their ranges, and whose tensors are as they come.

    Attributes:
        graph: with rounded weights and biases.
        ranges: of its tensors.
    """

    graph: Graph
    ranges: Mapping[str, Range]

    @torch.no_grad()
    def run(self, images: Tensor) -> Tensor:
        """The logits (N, classes) of `images` (N, 3, R, R) as the quantized file computes them.

        Rounding is the runtime's; where it sums integers and this sums floats, a number that lies halfway
        between two integers may fall to either.
        """
        return self.graph.run(images, after=self._round)

    def _round(self, name: str, tensor: Tensor) -> Tensor:
        found = self.ranges.get(name)
        return tensor if found is None else found.nearest(tensor)


def simulate(graph: Graph, ranges: Mapping[str, Range]) -> Simulation:
    """`graph` with the arithmetic of `ranges`, to be run like a graph.

    Raises:
        ValueError: a range for a tensor or constant that `graph` does not have.
    """
    rounded = []
    known = set(graph.shapes)
    for operator in graph.operators:
        names = f"{operator.name}.weight", f"{operator.name}.bias"
        weight, bias = (
            ranges[name].nearest(constant) if constant is not None and name in ranges else constant
            for name, constant in zip(names, (operator.weight, operator.bias), strict=True)
        )
        known.update(
            name for name, constant in zip(names, (weight, bias), strict=True) if constant is not None
        )
        rounded.append(replace(operator, weight=weight, bias=bias))
    unknown = ranges.keys() - known
    if unknown:
        raise ValueError(f"a range for {min(unknown)!r}, which this graph does not have; observe this graph")
    return Simulation(replace(graph, operators=tuple(rounded)), ranges)
