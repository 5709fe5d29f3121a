"""Which tensors of a graph are integers, so that the runtime computes on integers from one to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nestling.models.graph import Graph, Operator
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import Unquantizable

# Kinds that ONNX Runtime computes on integers.
_INTEGER_KINDS = {
    "Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Sigmoid", "HardSigmoid", "GlobalAveragePool",
    "AveragePool",
}  # fmt: skip
# Those that may give floats as well, at no cost: they sum integers anyway.
_FLOAT_OUTPUT_KINDS = {"Gemm", "MatMul"}
# Kinds that only move numbers, so that what they write has the range of what they read.
MOVING_KINDS = {
    "MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze", "Tile",
}  # fmt: skip
WEIGHT_AXES = {"Conv": 0, "Gemm": 0, "MatMul": 1}
"""The axis of output channels of the weight of each kind of layer.

These are worth being integers by themselves; others are integers only where what they read is."""


def is_layer(operator: Operator) -> bool:
    """Whether `operator` is what precisions are for: a convolution, or a product with one matrix.

    Products with a vector, or with several matrices at once, have no operator of few bits: their constants
    stay floats.
    """
    if operator.weight is None or operator.kind not in WEIGHT_AXES:
        return False
    return operator.kind != "MatMul" or operator.weight.ndim == 2


def is_integer(operator: Operator, policy: QuantPolicy) -> bool:
    """Whether the runtime computes `operator` on integers where `policy` asks for it."""
    if operator.kind not in _INTEGER_KINDS or policy.precision(operator.layer).activation is None:
        return False
    # A sum or product with a constant stays in float: the runtime has no integer kernel that gains from it.
    return operator.weight is None or is_layer(operator)


def activation_formats(graph: Graph, integer: list[Operator], policy: QuantPolicy) -> dict[str, Format]:
    """Tensor -> format, for every tensor that passes through integers.

    Those are what a convolution or a product of matrices reads, and what it writes. The product of matrices
    (which linear layers are) gives floats for nothing: its result is quantized only where an integer operator
    reads it, and so are residual sums of a ViT floats. Sums, products, gates and pooling are integers where
    all that they read is: of floats, they would cost more in rounding than they gain.

    Of several readers the one of fewest bits decides, also for what the tensor was moved from; where none
    reads it on integers, the operator that writes it.

    Raises:
        Unquantizable: an operator between signed and unsigned integers: ONNX Runtime's CPU provider has no
            kernel for it, and the simulation, which is made after that, no rule.
    """
    readers = graph.readers()
    followed = _runs_on_integers(graph, integer)
    read: dict[str, list[Format]] = {}
    written_in: dict[str, Format] = {}
    touched: dict[Operator, tuple[str, ...]] = {}
    for operator in followed:
        format = policy.precision(operator.layer).activation
        if format is None:
            continue
        written = absorbing(readers, graph, operator)[-1]
        floats_do = (
            operator.kind in _FLOAT_OUTPUT_KINDS
            and written is operator
            and not _is_read_by(followed, readers, written.name)
        )
        outputs = () if floats_do or written.name == graph.output else (written.name,)
        written_in |= dict.fromkeys(outputs, format)
        for name in operator.inputs:
            read.setdefault(name, []).append(format)
        touched[operator] = (*operator.inputs, *outputs)
    sources = sources_of(graph, read.keys() | written_in.keys())
    wanted: dict[str, list[Format]] = {}
    for name, found in read.items():
        wanted.setdefault(sources[name], []).extend(found)
    formats = {
        name: min(wanted.get(sources[name]) or [written_in[name]], key=lambda format: format.bits)
        for name in graph.shapes
        if name in read or name in written_in
    }
    _refuse_mixed_signs(touched, formats, policy)
    return formats


def _refuse_mixed_signs(
    touched: Mapping[Operator, tuple[str, ...]], formats: Mapping[str, Format], policy: QuantPolicy
) -> None:
    for operator, names in touched.items():
        signed, unsigned = (
            [name for name in names if formats[name].signed is wanted] for wanted in (True, False)
        )
        if signed and unsigned:
            raise Unquantizable(
                f"{operator.layer} ({policy.precision(operator.layer).name}) would be between signed "
                f"integers, {signed[0]}, and unsigned ones, {unsigned[0]}, for which ONNX Runtime's CPU "
                "provider, after which files are simulated, has no kernel; give its neighbours its "
                "precision, or one in floats"
            )


def _runs_on_integers(graph: Graph, integer: list[Operator]) -> dict[Operator, None]:
    """Those of `integer` that gain by it, in order."""
    readers, asked = graph.readers(), dict.fromkeys(integer)
    multiplying = [operator for operator in integer if operator.kind in WEIGHT_AXES]
    held = {name for operator in multiplying for name in operator.inputs}
    chosen: dict[Operator, None] = {}
    for operator in graph.operators:
        if operator in asked and (
            operator.kind in WEIGHT_AXES or all(name in held for name in operator.inputs)
        ):
            chosen[operator] = None
            if operator.kind not in _FLOAT_OUTPUT_KINDS:
                held.add(absorbing(readers, graph, operator)[-1].name)
        elif operator.kind in MOVING_KINDS and operator.inputs[0] in held:
            held.add(operator.name)
    return chosen


def _is_read_by(chosen: Mapping[Operator, None], readers: Mapping[str, list[Operator]], name: str) -> bool:
    """Whether one of `chosen` reads tensor `name`, itself or what is moved from it."""
    return any(
        reader in chosen or (reader.kind in MOVING_KINDS and _is_read_by(chosen, readers, reader.name))
        for reader in readers[name]
    )


def absorbing(
    readers: Mapping[str, list[Operator]], graph: Graph, operator: Operator
) -> tuple[Operator, ...]:
    """`operator`, and the rectifiers behind it that the runtime makes part of it; the last one writes."""
    found = [operator]
    while (only := _only_reader(readers, graph, found[-1])) is not None and _is_absorbed(only, by=found[-1]):
        found.append(only)
    return tuple(found)


def _only_reader(readers: Mapping[str, list[Operator]], graph: Graph, operator: Operator) -> Operator | None:
    found = readers[operator.name]
    return found[0] if len(found) == 1 and operator.name != graph.output else None


def _is_absorbed(operator: Operator, *, by: Operator) -> bool:
    """Whether the runtime computes `operator` as part of the one before it, `by`."""
    rectifies = operator.kind == "Relu" or (operator.kind == "Clip" and operator.number("min") == 0.0)
    return rectifies and by.kind in ("Conv", "Gemm", "MatMul", "Add", "Mul")


def sources_of(graph: Graph, formats: Collection[str]) -> dict[str, str]:
    """Tensor -> the tensor whose numbers set its range: itself, or what it was moved from.

    Where numbers are moved in several steps from one quantized tensor to another, it holds the steps between.
    """
    movers = {operator.name: operator for operator in graph.operators if operator.kind in MOVING_KINDS}
    sources = {name: name for name in formats}
    for name in formats:
        steps = [name]
        while steps[-1] in movers:
            steps.append(movers[steps[-1]].inputs[0])
            if steps[-1] in formats:
                sources |= dict.fromkeys(steps[:-1], sources[steps[-1]])
                break
    return sources
