"""Quantized arithmetic in PyTorch: what the quantized ONNX file computes, without a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
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
    known = set(graph.shapes)
    for operator in graph.operators:
        known.update(name for name, constant in _constants(operator) if constant is not None)
    unknown = ranges.keys() - known
    if unknown:
        raise ValueError(f"a range for {min(unknown)!r}, which this graph does not have; observe this graph")
    operators = tuple(rounded(operator, ranges) for operator in graph.operators)
    return Simulation(replace(graph, operators=operators), ranges)


def rounded(operator: Operator, ranges: Mapping[str, Range]) -> Operator:
    """`operator` with its constants as their ranges hold them."""
    weight, bias = (
        ranges[name].nearest(constant) if constant is not None and name in ranges else constant
        for name, constant in _constants(operator)
    )
    return replace(operator, weight=weight, bias=bias)


def _constants(operator: Operator) -> tuple[tuple[str, Tensor | None], tuple[str, Tensor | None]]:
    """The operator's constants by the names of their ranges."""
    return (f"{operator.name}.weight", operator.weight), (f"{operator.name}.bias", operator.bias)
