"""Quantization-aware training: a graph whose weights and scales learn, and which is written as it stands.

Batch normalization is folded, and every tensor is rounded where the file rounds it: what is trained is what
is simulated, and written, but for ties of sums that are floats here and integers there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, Operator
from nestling.quant.attention import Factors
from nestling.quant.calibration import WeightMethod
from nestling.quant.constants import stored_range, with_room_for
from nestling.quant.formats import Code, Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.quantizing import Quantized
from nestling.quant.ranges import Range
from nestling.quant.regions import MOVING_KINDS, WEIGHT_AXES, is_layer
from nestling.quant.straight import instead, nearest, nearest_by_statistics, slope_of, statistical_scale

Scales = Literal["learned", "statistical"]

_SMALLEST_SCALE = 2.0**-10
"""Of what it was at first; a scale that learns does not get below."""
_WITH_WEIGHTS = {
    "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "InstanceNormalization", "PRelu", "Expand",
}  # fmt: skip
_WITH_TABLES = {"Add", "Mul"}
"""Kinds whose constant learns where it has several numbers: positions, scales of layers."""


@dataclass(frozen=True, slots=True, eq=False)
class Learning:
    """How a graph learns in few bits.

    Attributes:
        policy: which layer computes in which precision.
        scales: those of weights are `learned` (LSQ, arXiv 1902.08153), or follow from the weights in every
            step (`statistical`, OFQ, arXiv 2302.02210: `statistical_scale` below 8 bits; with 8 bits as
            `weights` says; those of groups span them). Those of activations are learned in any case.
        weights: see `ranges` of `nestling.quant.observing`.
        margin: for statistical scales, see `nearest_by_statistics`; None: all weights learn.
        reduce_range: 7-bit weights in place of 8-bit ones, see `nestling.quant.observing.ranges`.
        factors: by operator, the two matrices whose product is its weight, see `nestling.quant.attention`.

    Raises:
        ValueError: a margin with learned scales, or none of a step.
    """

    policy: QuantPolicy
    scales: Scales = "learned"
    weights: WeightMethod = "minmax"
    margin: float | None = None
    reduce_range: bool = False
    factors: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.margin is not None and self.scales == "learned":
            raise ValueError("a margin goes with statistical scales: learned ones would move the margins")
        if self.margin is not None and not 0 < self.margin <= 0.5:
            raise ValueError(f"margin is {self.margin}; it is a part of a step, above 0 and at most 0.5")


class LearnedGraph(nn.Module):
    """A graph as a network whose constants and scales are parameters.

    It computes what `simulate` computes of what `settled` gives, in floats. Weights, biases and tables learn;
    of other constants, such as the scale of attention's products, no parameter is made. A zero point stays as
    it was observed. Tensors that an operator moves or adds within one range go on sharing it.

    Args:
        graph: with weights in floats, not placed on codes (`place`): these learn.
        ranges: of its tensors and constants, as observed.
        how: what learns.
    """

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], how: Learning) -> None:
        super().__init__()
        self._graph, self._ranges, self._how = graph, ranges, how
        self._smallest: dict[str, Tensor] = {}
        self._tied = _tied(graph, ranges)
        # what is moved within a range is rounded already
        self._moved = {
            operator.name
            for operator in graph.operators
            if operator.kind in MOVING_KINDS
            and operator.name in self._tied
            and self._tied[operator.name] == self._tied.get(operator.inputs[0])
        }
        for operator in graph.operators:
            factors = how.factors.get(operator.name)
            if factors is not None:
                self._parameter(f"{operator.name}.query", factors.query)
                self._parameter(f"{operator.name}.key", factors.key)
            for part, constant in (("weight", operator.weight), ("bias", operator.bias)):
                if constant is not None and _learns(operator, constant) and (part == "bias" or not factors):
                    self._parameter(f"{operator.name}.{part}", constant.float())
            found = ranges.get(f"{operator.name}.weight")
            if found is not None and how.scales == "learned" and self._code(operator) is None:
                self._scale(f"{operator.name}.weight", found)
        for name in dict.fromkeys(self._tied.values()):
            self._scale(name, ranges[name])

    def forward(self, images: Tensor) -> Tensor:
        """The logits (N, classes) of `images` (N, 3, R, R), in few bits.

        Raises:
            ValueError: images of another size than the graph's.
        """
        operators = tuple(self._rounded(operator) for operator in self._graph.operators)
        return replace(self._graph, operators=operators).run(images, after=self._round)

    @torch.no_grad()
    def settled(self) -> Quantized:
        """What was learned, on the CPU: what `simulate` and a file take."""
        operators, ranges = [], {}
        for operator in self._graph.operators:
            now = self._latent(operator)
            found = self._weight_range(now)
            if found is not None:
                ranges[f"{operator.name}.weight"] = _on_cpu(found)
                bias = self._bias_range(operator, found)
                if bias is not None:
                    ranges[f"{operator.name}.bias"] = _on_cpu(bias)
            weight, bias_now = (None if c is None else c.detach().cpu() for c in (now.weight, now.bias))
            operators.append(replace(now, weight=weight, bias=bias_now))
        activations = {name: _on_cpu(self._range(name)) for name in self._tied}
        return Quantized(replace(self._graph, operators=tuple(operators)), activations | ranges)

    def _parameter(self, name: str, value: Tensor) -> None:
        self.register_parameter(_key(name), nn.Parameter(value.detach().clone()))

    def _scale(self, name: str, found: Range) -> None:
        # flat, so that weight decay takes it for no weight
        self._parameter(f"{name}.scale", found.scale if found.scale.ndim == 0 else found.scale.flatten())
        self._smallest[name] = found.scale * _SMALLEST_SCALE

    def _learned(self, name: str) -> Tensor | None:
        return self._parameters.get(_key(name))

    def _range(self, name: str) -> Range:
        """The range of a tensor, or of a weight whose scale is learned; its scale has gradients."""
        found = self._ranges[name]
        owner = self._tied.get(name, name)
        scale = self._learned(f"{owner}.scale")
        assert scale is not None
        scale = scale.reshape(found.scale.shape)
        return replace(
            found, scale=instead(scale, torch.maximum(scale.detach(), self._smallest[owner].to(scale.device)))
        )

    def _round(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._tied or name in self._moved:
            return tensor
        slope = slope_of(self._ranges[name], math.prod(self._graph.shapes[name]))
        return nearest(tensor, self._range(name), slope=slope)

    def _latent(self, operator: Operator) -> Operator:
        """`operator` with its constants as they are now: floats, or on the codes of a research precision."""
        constants: dict[str, Tensor | None] = {}
        place = next(self.parameters()).device
        for part, constant in (("weight", operator.weight), ("bias", operator.bias)):
            learned = self._learned(f"{operator.name}.{part}")
            if constant is not None:
                constant = constant.to(place) if learned is None else learned.to(constant.dtype)
            constants[part] = constant
        weight = constants["weight"]
        query, key = (self._learned(f"{operator.name}.{part}") for part in ("query", "key"))
        if weight is not None and query is not None and key is not None:
            weight = Factors(query, key).product().to(weight.dtype)
        code = self._code(operator)
        if code is not None and weight is not None:
            weight = instead(weight, code.nearest(weight.detach(), axis=WEIGHT_AXES[operator.kind]))
        return replace(operator, weight=weight, bias=constants["bias"])

    def _rounded(self, operator: Operator) -> Operator:
        """`operator` with its constants as they are rounded."""
        now = self._latent(operator)
        found = self._weight_range(now)
        if found is None:
            return now
        weight = now.constant()
        if self._code(operator) is None:  # codes are where they belong already
            if self._how.scales == "learned":
                shared_by = weight.numel() // found.scale.numel()
                weight = nearest(weight, found, slope=slope_of(found, shared_by))
            else:
                weight = nearest_by_statistics(weight, found, margin=self._how.margin)
        bias, of_bias = now.bias, self._bias_range(operator, found)
        if bias is not None and of_bias is not None:
            bias = instead(bias, of_bias.nearest(bias.detach()))
        return replace(now, weight=weight, bias=bias)

    def _weight_range(self, operator: Operator) -> Range | None:
        """The range of the weight of `operator`, as it is now; None where that is floats."""
        name = f"{operator.name}.weight"
        found = self._ranges.get(name)
        if found is None:
            return None
        weight, bias = operator.constant().detach(), operator.bias
        precision = self._how.policy.precision(operator.layer)
        if self._code(operator) is not None:
            largest = weight.abs().amax()
            found = replace(found, scale=torch.where(largest > 0, largest, 1.0).reshape(found.scale.shape))
        elif self._how.scales == "learned":
            found = self._range(name)
        elif precision.integers is not None and found.block is None and precision.integers.bits < 8:
            found = replace(found, scale=statistical_scale(weight, found))
        else:
            now = stored_range(
                weight.cpu(),
                precision,
                axis=WEIGHT_AXES[operator.kind],
                weights=self._how.weights,
                reduce_range=self._how.reduce_range,
            )
            assert now is not None  # it had a range
            found = now
        found = replace(found, scale=found.scale.to(weight.device))
        if bias is not None and self._on_integers(operator):
            wide = with_room_for(bias, replace(found, scale=found.scale.detach()), self._read(operator))
            found = replace(found, scale=instead(found.scale, wide.scale))
        return found

    def _bias_range(self, operator: Operator, of_weight: Range) -> Range | None:
        """The range of the bias of `operator`: of 32 bits, in the scale of the products."""
        if f"{operator.name}.bias" not in self._ranges:
            return None
        scale = of_weight.scale.detach()
        return Range(
            scale * self._read(operator).scale.to(scale.device),
            torch.zeros(scale.shape, dtype=torch.int32, device=scale.device),
            "int32",
            None if of_weight.axis is None else 0,
        )

    def _read(self, operator: Operator) -> Range:
        """The range of what `operator` reads, without gradients."""
        found = self._range(operator.inputs[0])
        return replace(found, scale=found.scale.detach())

    def _on_integers(self, operator: Operator) -> bool:
        """Whether `operator` computes on integers, and not only reads a tensor that others have rounded."""
        return self._how.policy.precision(operator.layer).activation is not None

    def _code(self, operator: Operator) -> Code | None:
        code = self._how.policy.precision(operator.layer).weight
        return None if code is None or isinstance(code, Format) or not is_layer(operator) else code


def _learns(operator: Operator, constant: Tensor) -> bool:
    if not constant.is_floating_point() or not bool(constant.isfinite().all()):
        return False
    return operator.kind in _WITH_WEIGHTS or (operator.kind in _WITH_TABLES and constant.numel() > 1)


def _tied(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, str]:
    """Tensor -> the first of those that share its range, of all tensors with one.

    They are those of one range that are read and written by one operator without weights: what moves numbers,
    or adds such as are to have one scale.
    """
    tied: dict[str, str] = {graph.input: graph.input} if graph.input in ranges else {}
    for operator in graph.operators:
        if operator.name in ranges:
            tied[operator.name] = operator.name
        if operator.kind in WEIGHT_AXES:
            continue
        group = [name for name in (*operator.inputs, operator.name) if name in tied]
        for one, other in combinations(group, 2):
            if ranges[one].equals(ranges[other]):
                kept, joined = tied[one], tied[other]
                tied |= {name: kept for name, owner in tied.items() if owner == joined}
    return tied


def _on_cpu(found: Range) -> Range:
    return replace(found, scale=found.scale.detach().cpu().clone(), zero_point=found.zero_point.cpu())


def _key(name: str) -> str:
    """`name` as a parameter may be called."""
    return name.replace(".", ":")
