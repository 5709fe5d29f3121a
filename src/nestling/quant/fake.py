"""Quantized arithmetic in PyTorch: what the quantized ONNX file computes, without a runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.models.operators import compute
from nestling.quant.accumulating import accumulated, is_blocked, joined_sums
from nestling.quant.activations import ACTIVATIONS
from nestling.quant.arithmetic import Rule, integer_rule
from nestling.quant.multiplying import is_multiplied, multiplied
from nestling.quant.ranges import Range
from nestling.quant.regions import MOVING_KINDS, absorbing


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """One operator of the file, with the rectifier that the runtime makes part of it.

    Attributes:
        inputs: names of what it reads.
        output: name of what it writes.
        rule: takes and gives tensors as they are held: those with a range in steps, the others as floats.
        rounds_floats: whether it makes integers of floats that it or one before it computed, of which the
            runtime's may differ in the last bit.
    """

    inputs: tuple[str, ...]
    output: str
    rule: Rule
    rounds_floats: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """A graph as the runtime computes it: on integers where it has a kernel for them.

    Attributes:
        graph: with its constants in floats.
        ranges: of its tensors and constants.
        actions: in their order.
    """

    graph: Graph
    ranges: Mapping[str, Range]
    actions: tuple[Action, ...]

    @property
    def rounds_floats(self) -> bool:
        """Whether integers are made of floats that were computed: there the runtime's may be others."""
        return any(action.rounds_floats for action in self.actions)

    @torch.no_grad()
    def run(self, images: Tensor) -> Tensor:
        """The logits (N, classes) of `images` (N, 3, R, R) as the quantized file computes them.

        Integers are the runtime's to the last bit, see `nestling.quant.arithmetic`, and so are most
        convolutions and activations of floats, see `nestling.quant.accumulating`,
        `nestling.quant.multiplying` and `nestling.quant.activations`. What else it computes in floats may
        differ in the last bit, and where such a number is rounded to an integer, by a step.

        Raises:
            ValueError: images of another shape.
        """
        return self.held(images, frozenset())[self.graph.output]

    @torch.no_grad()
    def held(self, images: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        """The logits, and the tensors called `names`, by name: those with a range in steps, others as floats.

        A rectifier's input is not among them where the runtime computes both at once. Any other tensor is let
        go as soon as its last reader has run.

        Raises:
            ValueError: images of another shape.
        """
        side = self.graph.resolution
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"this graph takes images (N, 3, {side}, {side}), not {tuple(images.shape)}")
        unread = Counter(name for action in self.actions for name in action.inputs)
        unread.update((self.graph.output, *names))
        images = images.contiguous(memory_format=torch.channels_last)
        found = self.ranges.get(self.graph.input)
        tensors = {self.graph.input: images if found is None else found.steps(images)}
        for action in self.actions:
            tensors[action.output] = action.rule(*(tensors[name] for name in action.inputs))
            for name in action.inputs:
                unread[name] -= 1
                if not unread[name]:
                    del tensors[name]
        return tensors


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
    return Simulation(graph, ranges, tuple(_actions(graph, ranges)))


def rounded(operator: Operator, ranges: Mapping[str, Range]) -> Operator:
    """`operator` with its constants as their ranges hold them."""
    weight, bias = (
        ranges[name].nearest(constant) if constant is not None and name in ranges else constant
        for name, constant in _constants(operator)
    )
    return replace(operator, weight=weight, bias=bias)


def _actions(graph: Graph, ranges: Mapping[str, Range]) -> Iterator[Action]:
    readers = graph.readers()
    joined = joined_sums(graph, ranges)
    absorbed = {convolution.name for convolution in joined.values()}
    for operator in graph.operators:
        if operator.name in absorbed:
            continue
        if operator.name in joined:
            yield _joined_sum(operator, joined[operator.name], ranges)
            continue
        chain = absorbing(readers, graph, operator)
        last = chain[-1]
        whole = operator.name not in ranges and vanish(chain[1:], ranges.get(last.name))
        written = last if whole else operator
        rule = integer_rule(operator, ranges, ranges.get(written.name))
        if rule is None:
            rounds = operator.name in ranges and not _is_exact(operator, ranges)
            rule = _float_rule(operator, ranges, graph.shapes[operator.name])
            yield Action(operator.inputs, operator.name, rule, rounds)
            continue
        absorbed.update(part.name for part in chain if whole)
        yield Action(operator.inputs, written.name, rule)


def _is_exact(operator: Operator, ranges: Mapping[str, Range]) -> bool:
    """Whether the runtime's floats between the integers that `operator` reads and writes are ours."""
    return operator.kind in (*MOVING_KINDS, "Sigmoid") and all(name in ranges for name in operator.inputs)


def _joined_sum(operator: Operator, convolution: Operator, ranges: Mapping[str, Range]) -> Action:
    """The sum `operator` with its `convolution`, all of floats but what they read first and write last."""
    (image,) = convolution.inputs
    other = next(name for name in operator.inputs if name != convolution.name)
    read, added, written = (ranges.get(name) for name in (image, other, operator.name))
    convolution = rounded(convolution, ranges)

    def apply(images: Tensor, others: Tensor) -> Tensor:
        images = images if read is None else read.numbers(images)
        result = accumulated(convolution, images, others if added is None else added.numbers(others))
        return result if written is None else written.steps(result)

    return Action((image, other), operator.name, apply, written is not None)


def vanish(rectifiers: tuple[Operator, ...], written: Range | None) -> bool:
    """Whether the bytes of `written` end where `rectifiers` do, so that the runtime drops them.

    A range of fewer than 8 bits ends before its bytes; there the runtime computes the layer in floats.
    """
    if written is None:
        return False
    zero = int(written.zero_point)
    low, high = (0, 255) if written.stored == "uint8" else (-128, 127)

    def byte(bound: float) -> float:
        return float(np.rint(np.float32(bound) / np.float32(written.scale))) + zero

    return all(
        zero == low
        if operator.kind == "Relu"
        else byte(operator.number("min")) <= low and byte(operator.number("max")) >= high
        for operator in rectifiers
    )


def _float_rule(operator: Operator, ranges: Mapping[str, Range], shape: tuple[int, ...]) -> Rule:
    """`operator` on floats, between the integers that it reads and writes, of `shape`."""
    written = ranges.get(operator.name)
    read = [ranges.get(name) for name in operator.inputs]
    if operator.kind in MOVING_KINDS and written is not None:
        (moved,) = read
        if moved is not None and moved.equals(written):
            return partial(compute, operator)
    operator = rounded(operator, ranges)
    blocked = is_blocked(operator, ranges)
    as_matrices = not blocked and is_multiplied(operator, shape)

    def apply(*tensors: Tensor) -> Tensor:
        numbers = [t if r is None else r.numbers(t) for t, r in zip(tensors, read, strict=True)]
        if blocked:
            result = accumulated(operator, *numbers)
        elif as_matrices:
            result = multiplied(operator, *numbers, shape=shape)
        elif operator.kind in ACTIVATIONS and numbers[0].dtype == torch.float32:
            result = ACTIVATIONS[operator.kind](operator, *numbers)
        else:
            result = compute(operator, *numbers)
        return result if written is None else written.steps(result)

    return apply


def _constants(operator: Operator) -> tuple[tuple[str, Tensor | None], tuple[str, Tensor | None]]:
    """The operator's constants by the names of their ranges."""
    return (f"{operator.name}.weight", operator.weight), (f"{operator.name}.bias", operator.bias)
