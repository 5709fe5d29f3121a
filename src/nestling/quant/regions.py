"""Which tensors of a graph are integers, so that the runtime computes on integers from one to the next."""

from __future__ import annotations

from collections.abc import Mapping

from nestling.models.graph import Graph, Operator
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy

# Kinds that ONNX Runtime computes on integers.
_INTEGER_KINDS = {
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "Concat",
    "Sigmoid",
    "GlobalAveragePool",
    "AveragePool",
}
# Kinds that only move numbers, so that what they write has the range of what they read.
_MOVING_KINDS = {
    "MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze", "Tile",
}  # fmt: skip
WEIGHT_AXES = {"Conv": 0, "Gemm": 0, "MatMul": 1}
"""The axis of output channels of the weight of each kind of layer."""


def is_integer(operator: Operator, policy: QuantPolicy) -> bool:
    """Whether the runtime computes `operator` on integers where `policy` asks for it."""
    if operator.kind not in _INTEGER_KINDS or policy.precision(operator.layer).activation is None:
        return False
    # A sum or product with a constant stays in float: the runtime has no integer kernel that gains from it.
    return operator.weight is None or operator.kind in WEIGHT_AXES


def activation_formats(graph: Graph, integer: list[Operator], policy: QuantPolicy) -> dict[str, Format]:
    """Tensor -> format, for every tensor that an integer operator reads or writes."""
    readers = graph.readers()
    formats: dict[str, Format] = {}
    for operator in integer:
        format = policy.precision(operator.layer).activation
        if format is None:
            continue
        written = operator
        while (only := _only_reader(readers, graph, written)) is not None and _is_absorbed(only, by=written):
            written = only
        # The runtime gives the product of two matrices as floats and adds a constant to those. Softmax
        # should read floats too: in attention, ONNX Runtime 1.31's QLinearSoftmax was off by the whole range.
        float_sum = written is not operator and written.kind == "Add"
        float_softmax = only is not None and only.kind == "Softmax"
        outputs = () if float_sum or float_softmax or written.name == graph.output else (written.name,)
        for name in (*operator.inputs, *outputs):
            formats[name] = format
    return {name: formats[name] for name in graph.shapes if name in formats}


def _only_reader(readers: Mapping[str, list[Operator]], graph: Graph, operator: Operator) -> Operator | None:
    found = readers[operator.name]
    return found[0] if len(found) == 1 and operator.name != graph.output else None


def _is_absorbed(operator: Operator, *, by: Operator) -> bool:
    """Whether the runtime computes `operator` as part of the one before it, `by`."""
    rectifies = operator.kind == "Relu" or (operator.kind == "Clip" and operator.number("min") == 0.0)
    return rectifies and by.kind in ("Conv", "Gemm", "MatMul", "Add", "Mul")


def sources_of(graph: Graph, formats: Mapping[str, Format]) -> dict[str, str]:
    """Tensor -> the tensor whose numbers set its range: itself, or what it was moved from.

    Where numbers are moved in several steps from one quantized tensor to another, it holds the steps between.
    """
    movers = {operator.name: operator for operator in graph.operators if operator.kind in _MOVING_KINDS}
    sources = {name: name for name in formats}
    for name in formats:
        steps = [name]
        while steps[-1] in movers:
            steps.append(movers[steps[-1]].inputs[0])
            if steps[-1] in formats:
                sources |= dict.fromkeys(steps[:-1], sources[steps[-1]])
                break
    return sources
