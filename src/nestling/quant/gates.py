"""Hard sigmoids and hard swishes out of the operators that a runtime has integer kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nestling.models.graph import Graph, Operator
from nestling.quant.policy import QuantPolicy

ALPHA, BETA = 1 / 6, 0.5
"""A hard swish is `x * clip(x / 6 + 1 / 2, 0, 1)`."""


def split_gates(graph: Graph, policy: QuantPolicy) -> Graph:
    """`graph` with every HardSwish of a layer that `policy` quantizes as a HardSigmoid and a Mul.

    The runtime has no integer kernel for the whole: between two quantized layers it would be four passes over
    floats, which took 2 to 4 times as long as the two over bytes (AVX512-VNNI, ONNX Runtime 1.31). It
    computes the same. `graph` itself where there is none.
    """
    operators: list[Operator] = []
    shapes = dict(graph.shapes)
    for operator in graph.operators:
        if operator.kind != "HardSwish" or policy.precision(operator.layer).activation is None:
            operators.append(operator)
            continue
        gate = replace(
            operator,
            kind="HardSigmoid",
            name=f"{operator.name}.gate",
            attributes={"alpha": ALPHA, "beta": BETA},
        )
        operators += [gate, replace(operator, kind="Mul", inputs=(*operator.inputs, gate.name))]
        shapes[gate.name] = shapes[operator.name]
    if len(operators) == len(graph.operators):
        return graph
    return replace(graph, operators=tuple(operators), shapes=shapes)


def sum_gates(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, changed in place: each HardSigmoid between integers is a sum that is cut off at 0 and 1.

    `alpha * x + beta` is the sum of a constant and of x's own integers, read with another scale; the runtime
    has an integer kernel for sums, and cuts off as it rounds.
    """
    constants = {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}
    writers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        read = writers.get(node.input[0]) if node.op_type == "HardSigmoid" else None
        if (
            read is None
            or read.op_type != "DequantizeLinear"
            or readers[node.output[0]] != {"QuantizeLinear"}
        ):
            nodes.append(node)
            continue
        summed, stored = _sum(node, read, constants)
        nodes += summed
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    wanted = {name for node in nodes for name in node.input}
    del model.graph.node[:]
    model.graph.node.extend(
        node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in wanted
    )
    return model


def _sum(
    gate: onnx.NodeProto, read: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]
) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """The nodes that stand for `gate`, which reads what `read` dequantizes, and their constants by name."""
    alpha, beta = (
        next((np.float32(a.f) for a in gate.attribute if a.name == key), np.float32(default))
        for key, default in (("alpha", 0.2), ("beta", 0.5))
    )
    integers, scale, zero_point = read.input
    dtype = constants[zero_point].dtype
    most = np.iinfo(dtype).max
    name = gate.name
    stored = {
        f"{name}.steep.scale": np.asarray(constants[scale] * alpha, np.float32),
        f"{name}.beta.quantized": np.asarray(most, dtype),
        # A hair more: a half of 255 steps lies between two of them, and the runtime's errors would choose.
        f"{name}.beta.scale": np.asarray(beta / np.float32(most) * (1 + 2.0**-20), np.float32),
        f"{name}.beta.zero_point": np.asarray(0, dtype),
        f"{name}.low": np.asarray(0, np.float32),
        f"{name}.high": np.asarray(1, np.float32),
    }
    steep, added, summed = f"{name}.steep", f"{name}.beta", f"{name}.sum"
    beta_names = [f"{added}.{part}" for part in ("quantized", "scale", "zero_point")]
    clipped = [summed, f"{name}.low", f"{name}.high"]
    nodes = [
        helper.make_node("DequantizeLinear", [integers, f"{steep}.scale", zero_point], [steep], name=steep),
        helper.make_node("DequantizeLinear", beta_names, [added], name=added),
        helper.make_node("Add", [steep, added], [summed], name=name),
        helper.make_node("Clip", clipped, [gate.output[0]], name=f"{name}.clip"),
    ]
    return nodes, stored
