"""Quantized arithmetic in ONNX: integer constants, and Quantize and Dequantize nodes around the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from nestling.models.graph import Graph
from nestling.quant.blocks import DOMAIN, blocked_layer
from nestling.quant.gates import sum_gates
from nestling.quant.protos import INTEGER_TYPES, renamed, tensor, zeros
from nestling.quant.protos import constant as constant_of
from nestling.quant.ranges import Range

_TORCH_TYPES = {"int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32}


def insert_qdq(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """A new model that computes `model` with the arithmetic of `ranges`; `model` itself where there are none.

    A constant is stored as integers behind a DequantizeLinear; one in blocks as `blocked_layer` says. Any
    other tensor passes a QuantizeLinear and a DequantizeLinear, one pair however many read it; a runtime
    fuses these with the operators between them. Where a tensor has less than 8 bits, a Clip between the two
    cuts its bytes off, so that any runtime computes what such a precision would give.

    Args:
        model: of 32-bit floats, with opset 21 or later; its constants may be the integers of their ranges
            already, see `with_integers`.
        ranges: by the model's names of tensors and initializers.

    Raises:
        ValueError: a range for a name that the model does not have, or for its output, which stays float.
    """
    if not ranges:
        return model
    graph = model.graph
    constants = {constant.name for constant in graph.initializer}
    inputs = [value.name for value in graph.input]
    computed = {*inputs, *(name for node in graph.node for name in node.output)}
    unknown = ranges.keys() - constants - computed
    if unknown:
        raise ValueError(f"a range for {min(unknown)!r}, which the model does not have")
    outputs = {value.name for value in graph.output} & ranges.keys()
    if outputs:
        raise ValueError(f"a range for {min(outputs)!r}, the model's output, which stays float")

    stored: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    blocked: dict[str, torch.Tensor] = {}
    for constant in graph.initializer:
        if constant.name not in ranges:
            stored[constant.name] = constant
            continue
        found = ranges[constant.name]
        if found.block is not None:
            blocked[constant.name] = tensor(constant)
            continue
        held = _store(_integers(constant, found), stored)
        nodes.append(_dequantize(constant.name, held, found, stored, stem=constant.name))
    read_as = {name: f"{name}.dequantized" for name in ranges.keys() & computed}
    for name in inputs:
        nodes += _pair(name, ranges, stored)
    for node in graph.node:
        reading = node
        if any(name in read_as for name in node.input):
            reading = onnx.NodeProto()
            reading.CopyFrom(node)
            reading.input[:] = [read_as.get(name, name) for name in node.input]
        weight = next((name for name in node.input if name in blocked), None)
        if weight is None:
            nodes.append(reading)
        else:
            in_its_place, constants_of_it = blocked_layer(reading, blocked[weight], ranges[weight])
            nodes += in_its_place
            for part in constants_of_it:
                _store(part, stored)
        for name in node.output:
            nodes += _pair(name, ranges, stored)

    nodes, constants_of_gates = sum_gates(nodes, stored)
    kept = [*(stored | constants_of_gates).values()]
    quantized = helper.make_graph(nodes, graph.name, list(graph.input), list(graph.output), kept)
    opsets = list(model.opset_import)
    if any(node.domain == DOMAIN for node in nodes):
        opsets.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_model(
        quantized,
        opset_imports=opsets,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )


def with_integers(graph: Graph, ranges: Mapping[str, Range]) -> Graph:
    """`graph` with the integers of `ranges` in place of its constants, but for those in blocks.

    Its model is for `insert_qdq` alone, which then gives the same file in two thirds of the time: floats are
    four times as many bytes to write down, copy and read.
    """

    def stored(name: str, constant: Tensor | None) -> Tensor | None:
        found = ranges.get(name)
        if constant is None or found is None or found.block is not None:
            return constant
        return found.integers(constant).to(_TORCH_TYPES[found.stored])

    return replace(
        graph,
        operators=tuple(
            replace(
                operator,
                weight=stored(f"{operator.name}.weight", operator.weight),
                bias=stored(f"{operator.name}.bias", operator.bias),
            )
            for operator in graph.operators
        ),
    )


def _integers(constant: onnx.TensorProto, found: Range) -> onnx.TensorProto:
    """The integers of `constant`, which may be they already."""
    name = f"{constant.name}.quantized"
    if constant.data_type in INTEGER_TYPES:
        return renamed(constant, name)
    return constant_of(name, found.integers(tensor(constant)).numpy().astype(found.stored))


def _pair(
    name: str, ranges: Mapping[str, Range], stored: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """The nodes that take tensor `name` through the integers of its range; none where it has no range."""
    if name not in ranges:
        return []
    found = ranges[name]
    integers = f"{name}.quantized"
    kept = integers if found.stored == found.dtype else f"{name}.clipped"
    dequantize = _dequantize(f"{name}.dequantized", kept, found, stored, stem=name)
    operands = [name, *dequantize.input[1:]]
    nodes = [helper.make_node("QuantizeLinear", operands, [integers], name=integers), dequantize]
    if kept != integers:
        limits = [f"{name}.lowest", f"{name}.highest"]
        for limit, value in zip(limits, found.limits, strict=True):
            _store(constant_of(limit, np.array(value, dtype=found.stored)), stored)
        nodes.insert(1, helper.make_node("Clip", [integers, *limits], [kept], name=kept))
    return nodes


def _dequantize(
    output: str, integers: str, found: Range, stored: dict[str, onnx.TensorProto], *, stem: str
) -> onnx.NodeProto:
    """The node that writes `output`; its scale and zero point, called after `stem`, are added to `stored`."""
    scale = _store(constant_of(f"{stem}.scale", found.scale.numpy().astype(np.float32)), stored)
    zero_points = found.zero_point.numpy().astype(found.stored)
    # Only what is always zero is shared: of layers on integers, the file's size depends on shapes alone.
    symmetric = found.axis is not None and not found.dtype.startswith("u")
    held = zeros(zero_points) if symmetric else constant_of(f"{stem}.zero_point", zero_points)
    operands = [integers, scale, _store(held, stored)]
    node = helper.make_node("DequantizeLinear", operands, [output], name=f"{stem}.dequantized")
    if found.axis is not None:
        node.attribute.append(helper.make_attribute("axis", found.axis))
    return node


def _store(held: onnx.TensorProto, stored: dict[str, onnx.TensorProto]) -> str:
    """The name of `held`, which is in `stored` from now on."""
    stored[held.name] = held
    return held.name
