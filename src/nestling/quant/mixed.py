"""Regions of a graph in 16-bit floats, with casts at their borders only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.models.operators import CAST_TO, Operator
from nestling.quant.policy import Floats, QuantPolicy
from nestling.quant.ranges import Unquantizable


@torch.no_grad()
def halve(graph: Graph, policy: QuantPolicy) -> Graph:
    """`graph` with the layers in `fp16` and `bf16` computed in those; `graph` itself where there are none.

    Their constants have 16 bits. Between a region and its surroundings there is one cast for each tensor and
    type that is read, called `<tensor>.<type>`; images and logits stay 32-bit floats. What is run, observed
    and written is this one graph.

    ONNX Runtime runs such a file everywhere for float16: on CPUs without half arithmetic it puts casts back
    to 32 bits around what it has no kernels for. Of bfloat16 its CPU provider has next to no kernels, and
    refuses most files.

    Raises:
        Unquantizable: a constant that is too large for 16 bits.
    """
    wanted: dict[str, Floats] = {o.name: policy.precision(o.layer).floats for o in graph.operators}
    if all(floats == "float32" for floats in wanted.values()):
        return graph
    held: dict[str, Floats] = {graph.input: "float32"}
    shapes = dict(graph.shapes)
    called = {name: name for name in graph.shapes}
    operators: list[Operator] = []

    def cast(name: str, floats: Floats, *, layer: str, to: str) -> None:
        operators.append(Operator("Cast", to, (name,), layer, {"to": CAST_TO[floats]}))
        held[to], shapes[to] = floats, shapes[name]

    for operator in graph.operators:
        floats = wanted[operator.name]
        inputs = []
        for name in operator.inputs:
            source = called[name]
            if held[source] != floats:
                source = f"{name}.{floats}"
                if source not in held:
                    cast(called[name], floats, layer=operator.layer, to=source)
            inputs.append(source)
        name = operator.name
        if name == graph.output and floats != "float32":
            name = called[name] = f"{name}.{floats}"
            shapes[name] = shapes[graph.output]
        held[name] = floats
        operators.append(
            replace(
                operator,
                name=name,
                inputs=tuple(inputs),
                weight=_held_in(floats, operator.weight, of=operator),
                bias=_held_in(floats, operator.bias, of=operator),
            )
        )
        if name != operator.name:
            cast(name, "float32", layer=operator.layer, to=graph.output)
    return replace(graph, operators=tuple(operators), shapes=shapes)


def _held_in(floats: Floats, constant: Tensor | None, *, of: Operator) -> Tensor | None:
    if constant is None or floats == "float32":
        return constant
    converted = constant.detach().to(TYPES[floats])
    if converted.is_meta:  # of a graph without numbers
        return converted
    if not converted.isfinite().all() and constant.isfinite().all():
        largest = float(constant.abs().max())
        raise Unquantizable(
            f"{of.name} has a constant of {largest:.3g}, which {floats} cannot hold; keep layer {of.layer!r} "
            "in fp32 or bf16"
        )
    return converted


TYPES: dict[Floats, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""The floats that are no 32-bit ones."""
