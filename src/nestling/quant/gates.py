"""Hard sigmoids and hard swishes out of the operators that a runtime has integer kernels for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nestling.models.graph import Graph, Operator
from nestling.quant.policy import QuantPolicy
from nestling.quant.protos import constant, zeros

ALPHA = 1 / 6
BETA = 0.5 * (1 - 2**-12)
"""A hard swish is `x * clip(x / 6 + 1 / 2, 0, 1)`. With a half to the last bit, the gate of zero would lie
halfway between two integers, and whoever adds otherwise than ONNX Runtime, whose sums the simulation follows,
would round it to the other one: for every zero."""


def split_gates(graph: Graph, policy: QuantPolicy) -> Graph:
    """`graph` with every HardSwish of a layer that `policy` quantizes as a HardSigmoid and a Mul.

    The runtime has no integer kernel for the whole: between two quantized layers it would be four passes over
    floats, which took 2 to 4 times as long as the two over bytes (AVX512-VNNI, ONNX Runtime 1.31). The half
    in these HardSigmoids, and in those that were there, is made a little less: by the 32nd part of a step.
    """
    operators: list[Operator] = []
    shapes = dict(graph.shapes)
    attributes = {"alpha": ALPHA, "beta": BETA}
    for operator in graph.operators:
        quantized = policy.precision(operator.layer).activation is not None
        if quantized and operator.kind == "HardSigmoid" and operator.number("beta") == 0.5:
            operators.append(replace(operator, attributes={**operator.attributes, "beta": BETA}))
        elif quantized and operator.kind == "HardSwish":
            name = f"{operator.name}.gate"
            gate = replace(operator, kind="HardSigmoid", name=name, attributes=attributes)
            operators += [gate, replace(operator, kind="Mul", inputs=(*operator.inputs, name))]
            shapes[name] = shapes[operator.name]
        else:
            operators.append(operator)
    if operators == list(graph.operators):
        return graph
    return replace(graph, operators=tuple(operators), shapes=shapes)


EVERYWHERE = QuantPolicy((("", "w8a8"),))
"""With all gates split, whichever a policy splits, a graph has all tensors that any policy rounds."""


def sum_gates(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """`nodes` with each HardSigmoid between integers as a sum that is cut off at 0 and 1, and its constants.

    `alpha * x + beta` is the sum of a constant and of x's own integers, read with another scale; the runtime
    has an integer kernel for sums, and cuts off as it rounds.

    Args:
        nodes: of a model, in order.
        constants: its initializers by name.
    """
    writers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    changed: list[onnx.NodeProto] = []
    stored: dict[str, onnx.TensorProto] = {}
    for node in nodes:
        read = writers.get(node.input[0]) if node.op_type == "HardSigmoid" else None
        if (
            read is None
            or read.op_type != "DequantizeLinear"
            or not all(_keeps_bytes(reader, readers) for reader in readers[node.output[0]])
        ):
            changed.append(node)
            continue
        summed, more = _sum(node, read, constants)
        changed += summed
        stored.update((held.name, held) for held in more)
    wanted = {name for node in changed for name in node.input}
    return [
        node for node in changed if node.op_type != "DequantizeLinear" or node.output[0] in wanted
    ], stored


def _keeps_bytes(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> bool:
    """Whether `node` makes integers of 8 bits; of fewer, no sum could be fused with their Clip."""
    return node.op_type == "QuantizeLinear" and all(
        reader.op_type != "Clip" for reader in readers[node.output[0]]
    )


def _sum(
    gate: onnx.NodeProto, read: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes that stand for `gate`, which reads what `read` dequantizes, and their constants."""
    alpha, beta = (
        next((np.float32(a.f) for a in gate.attribute if a.name == key), np.float32(default))
        for key, default in (("alpha", 0.2), ("beta", 0.5))
    )
    integers, scale, zero_point = read.input
    dtype = numpy_helper.to_array(constants[zero_point]).dtype
    most = 255 if dtype == np.uint8 else 127
    name = gate.name
    shared = f"hard_sigmoid.{dtype}.{beta}"
    values = {
        f"{name}.steep.scale": np.float32(numpy_helper.to_array(constants[scale])) * alpha,
        f"{shared}.quantized": np.asarray(most, dtype),
        f"{shared}.scale": beta / np.float32(most),
        "hard_sigmoid.low": np.asarray(0, np.float32),
        "hard_sigmoid.high": np.asarray(1, np.float32),
    }
    none = zeros(np.asarray(0, dtype))
    stored = [*(constant(key, np.asarray(value)) for key, value in values.items()), none]
    steep, added, summed = f"{name}.steep", f"{name}.beta", f"{name}.sum"
    beta_names = [f"{shared}.quantized", f"{shared}.scale", none.name]
    clipped = [summed, "hard_sigmoid.low", "hard_sigmoid.high"]
    nodes = [
        helper.make_node("DequantizeLinear", [integers, f"{steep}.scale", zero_point], [steep], name=steep),
        helper.make_node("DequantizeLinear", beta_names, [added], name=added),
        helper.make_node("Add", [steep, added], [summed], name=name),
        helper.make_node("Clip", clipped, [gate.output[0]], name=f"{name}.clip"),
    ]
    return nodes, stored
