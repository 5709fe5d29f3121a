"""Float islands: what a runtime computes in floats between integers, so that numbers are converted twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.models.graph import Operator
from nestling.profile import Device, OptimizedOp
from nestling.quant import Quantized, Range

_QUANTIZING = {"QuantizeLinear", "DynamicQuantizeLinear"}
_FLOAT_RESULTS = {"DequantizeLinear", "MatMulIntegerToFloat"}
"""Operators that read integers and write floats; so does a QGemm without a scale for its result."""
_QGEMM_SCALE = 7
_SUFFIXES = ("_nchwc", "_pre_q", "_post_dq", "_q_to_dq", "_dq", "_q", ".quantized", ".dequantized")
"""What the runtime, and before it the file, append to the name of an operator."""


@dataclass(frozen=True, slots=True)
class FloatNode:
    """A node that the runtime left in floats between integers.

    Attributes:
        name: the node's in the optimized graph; that of what it writes where it has none.
        op: its operator.
        layer: the layer that it comes from; "" where it belongs to no layer, or is not known.
        why: why it is in floats, as far as it is known.
    """

    name: str
    op: str
    layer: str
    why: str


def float_islands(device: Device, path: Path, quantized: Quantized) -> tuple[FloatNode, ...] | None:
    """The nodes of the file at `path` that compute in floats on what was, and what will be, integers.

    None where the runtime does not tell what it made of the file.

    Args:
        device: its runtime's optimized graph is read.
        path: the file of `quantized`.
        quantized: tells which layer a node comes from, and what the file itself leaves in floats.

    Raises:
        DeviceError: the runtime refuses the file.
    """
    ranges = quantized.ranges
    if not ranges:
        return ()
    nodes = device.optimized_ops(path)
    if nodes is None:
        return None
    between = _after_integers(nodes) & _before_integers(nodes)
    operators = {operator.name: operator for operator in quantized.graph.operators}
    layers: dict[str, str] = {}
    """Tensor -> the layer of the node that reads it, for what the runtime takes apart."""
    told = []
    for index in range(len(nodes) - 1, -1, -1):
        node = nodes[index]
        operator = next((operators[n] for n in map(_stem, (node.name, *node.writes)) if n in operators), None)
        layer = layers.get(node.writes[0], "") if operator is None else operator.layer
        layers |= dict.fromkeys(node.reads, layer)
        if index in between:
            why = "made by the runtime" if operator is None else _why(operator, ranges)
            told.append(FloatNode(node.name or node.writes[0], node.op, layer, why))
    return tuple(told[::-1])


def _after_integers(nodes: Sequence[OptimizedOp]) -> set[int]:
    """The float nodes that read, at some remove, what an integer node computed."""
    integers: set[str] = set()
    floats: set[str] = set()
    """Of what was integers before. Constants, which are never written, are in neither."""
    found = set()
    for index, node in enumerate(nodes):
        op = node.op.rpartition(".")[2]
        if op in _QUANTIZING:
            integers.update(node.writes)
        elif any(name in integers for name in node.reads):
            scaled = any(node.reads[_QGEMM_SCALE:])
            to_float = op in _FLOAT_RESULTS or (op == "QGemm" and not scaled)
            (floats if to_float else integers).update(node.writes)
        elif any(name in floats for name in node.reads):
            floats.update(node.writes)
            found.add(index)
    return found


def _before_integers(nodes: Sequence[OptimizedOp]) -> set[int]:
    """The nodes of which, at some remove, the result is made integers."""
    wanted: set[str] = set()
    found = set()
    for index in range(len(nodes) - 1, -1, -1):
        node = nodes[index]
        if node.op.rpartition(".")[2] in _QUANTIZING or any(name in wanted for name in node.writes):
            wanted.update(node.reads)
            found.add(index)
    return found


def _why(operator: Operator, ranges: Mapping[str, Range]) -> str:
    if operator.weight is not None and f"{operator.name}.weight" not in ranges:
        return "its weight is not quantized in the file"
    if {*operator.inputs, operator.name} <= ranges.keys():
        return "quantized in the file, but the runtime did not fuse it"
    return "what it reads or writes is not quantized in the file"


def _stem(name: str) -> str:
    """The name of the operator from which that of a node or tensor was made."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
