"""How many bits the constants of a network need, each at its layer's precision."""

from __future__ import annotations

from nestling.models.graph import Graph, Operator
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.regions import WEIGHT_AXES, is_layer


def weight_bits(graph: Graph, policy: QuantPolicy) -> int:
    """The bits of all weights and biases of `graph` in the precisions of `policy`, with the weights' scales.

    Weights of convolutions and linear layers count as their format packs them, with scales, zero points and
    lists of codes; groups of linear layers are filled up, as ONNX Runtime's MatMulNBits reads them. Biases
    have 32 bits, in 16-bit layers 16; so have the constants of all other operators. That is without the
    scales of biases and activations, the nodes and the names of the file. The size that a search weighs, and
    a report tells, is the file's, its weights packed as here.
    """
    total = 0
    for operator in graph.operators:
        precision = policy.precision(operator.layer)
        width = 32 if precision.floats == "float32" else 16
        if operator.bias is not None:
            total += operator.bias.numel() * width
        if operator.weight is None:
            continue
        code = precision.weight if is_layer(operator) else None
        if isinstance(code, Format) and code.group is not None and operator.kind != "Conv":
            total += code.filled_bits(**_shape(operator))
        elif code is not None:
            total += code.size_bits(**_shape(operator))
        else:
            total += operator.weight.numel() * width
    return total


def _shape(operator: Operator) -> dict[str, int]:
    channels = operator.constant().shape[WEIGHT_AXES[operator.kind]]
    return {"channels": channels, "per_channel": operator.constant().numel() // channels}
