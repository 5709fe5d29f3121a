"""What a latency depends on, read from a network's graph and its precisions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from nestling.models.graph import Graph, Operator
from nestling.profile import Step
from nestling.quant import Precision, QuantPolicy
from nestling.quant.layers import bits, kind_of


def steps(graph: Graph, policy: QuantPolicy) -> tuple[Step, ...]:
    """The operators of `graph` in the precisions of `policy`; the graph may be one without numbers."""
    written = {graph.input: "float32"}
    found = []
    for operator in graph.operators:
        precision = policy.precision(operator.layer)
        weight_bits, activation_bits = bits(precision)
        computes_in = _type(precision)
        written[operator.name] = computes_in
        read = sum(math.prod(graph.shapes[name]) for name in operator.inputs)
        foreign = (name for name in operator.inputs if written[name] != computes_in)
        converted = 4 * sum(math.prod(graph.shapes[name]) for name in foreign)
        signature = _signature([operator], graph, policy)
        numbers = 0 if operator.weight is None else operator.weight.numel()
        biases = 0 if operator.bias is None else operator.bias.numel()
        found.append(
            Step(
                kind=_kind(operator),
                # a block's has no such part: the lookup table's are measured reading floats
                signature=f"{signature} converts {converted}" if converted else signature,
                precision=precision.name,
                macs=float(graph.macs(operator)),
                activation_bytes=(read + math.prod(graph.shapes[operator.name])) * activation_bits / 8,
                weight_bytes=numbers * weight_bits / 8 + 4 * biases,
                converted_bytes=float(converted),
            )
        )
    return tuple(found)


def block_signature(graph: Graph, policy: QuantPolicy) -> str:
    """Sixteen hexadecimal digits that blocks share which do the same work: operators, shapes, precisions."""
    return hashlib.sha256(_signature(graph.operators, graph, policy).encode()).hexdigest()[:16]


def _signature(operators: Sequence[Operator], graph: Graph, policy: QuantPolicy) -> str:
    places = {operator.name: place for place, operator in enumerate(operators)}
    parts = []
    for operator in operators:
        reads = [(places.get(name), graph.shapes[name]) for name in operator.inputs]
        weight = None if operator.weight is None else tuple(operator.weight.shape)
        attributes = sorted(operator.attributes.items())
        precision = policy.precision(operator.layer).name
        parts.append(f"{operator.kind}{reads}{weight}{operator.bias is not None}{attributes}{precision}")
    return ";".join(parts)


def _kind(operator: Operator) -> str:
    kind = kind_of(operator)
    if operator.weight is None or operator.kind not in ("Conv", "ConvTranspose"):
        return kind
    return f"{kind} {'x'.join(map(str, operator.weight.shape[2:]))}"


def _type(precision: Precision) -> str:
    return precision.floats if precision.activation is None else f"integers{precision.activation.bits}"
