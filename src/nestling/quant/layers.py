"""The layers of a network that have weights: what each costs, and in how many bits it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestling.models.graph import Graph, Operator
from nestling.quant.formats import Code, Format, Minifloat, Ternary
from nestling.quant.gates import split_gates
from nestling.quant.policy import Floats, Precision, QuantPolicy
from nestling.quant.regions import activation_formats, is_integer, is_layer

TERNARY_BITS = 1.6
"""Five of its numbers to a byte."""
_FLOAT_BITS: Mapping[Floats, float] = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: as in the network, such as `blocks.2.0.conv_pw`.
        kind: `Conv`, `depthwise Conv`, `grouped Conv`, `Gemm` or `MatMul`.
        precision: its name.
        weight_bits: of a weight, without scales.
        activation_bits: of what the layer reads, as it computes with it.
        macs: multiply-accumulates of one image.
        params: weights and biases.
    """

    name: str
    kind: str
    precision: str
    weight_bits: float
    activation_bits: float
    macs: int
    params: int


def layers(graph: Graph, policy: QuantPolicy) -> tuple[Layer, ...]:
    """The layers of the float network `graph` with weights, in order, in the precisions of `policy`.

    Uneven adaptive pooling, which is computed as products with constant matrices, counts as such.
    """
    found = []
    split = split_gates(graph, policy)  # as it is quantized
    integer = [operator for operator in split.operators if is_integer(operator, policy)]
    formats = activation_formats(split, integer, policy)
    for operator in graph.operators:
        if not is_layer(operator):
            continue
        precision = policy.precision(operator.layer)
        weight_bits, activation_bits = bits(precision)
        read = formats.get(operator.inputs[0])
        if precision.activation is not None and read is not None:  # another reader may want fewer bits
            activation_bits = float(read.bits)
        found.append(
            Layer(
                name=operator.layer,
                kind=kind_of(operator),
                precision=precision.name,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                macs=graph.macs(operator),
                params=operator.constant().numel() + (0 if operator.bias is None else operator.bias.numel()),
            )
        )
    return tuple(found)


def bit_operations(graph: Graph, policy: QuantPolicy) -> float:
    """The multiply-accumulates of all layers of `graph`, each times the bits of both its factors."""
    return sum(layer.macs * layer.weight_bits * layer.activation_bits for layer in layers(graph, policy))


def bits(precision: Precision) -> tuple[float, float]:
    """The bits of a weight, without scales, and those of an activation."""
    floats = _FLOAT_BITS[precision.floats]
    weight = floats if precision.weight is None else _code_bits(precision.weight)
    return weight, floats if precision.activation is None else float(precision.activation.bits)


def _code_bits(code: Format | Code) -> float:
    if isinstance(code, Ternary):
        return TERNARY_BITS
    if isinstance(code, Minifloat):
        return 1.0 + code.exponent + code.mantissa
    return float(code.bits)


def kind_of(operator: Operator) -> str:
    """The word for an operator: its ONNX type, of convolutions in groups the one of `convolution_kind`."""
    if operator.kind != "Conv" or operator.weight is None:
        return operator.kind
    return convolution_kind(groups=operator.integer("group"), inputs=operator.weight.shape[1])


def convolution_kind(*, groups: int, inputs: int) -> str:
    """`Conv`, `depthwise Conv` or `grouped Conv`: runtimes have kernels of their own for each.

    Args:
        groups: of its channels.
        inputs: the channels that each group reads.
    """
    if groups == 1:
        return "Conv"
    return "depthwise Conv" if inputs == 1 else "grouped Conv"
