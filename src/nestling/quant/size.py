"""How many bits the constants of a network need, each at its layer's precision."""

from __future__ import annotations

from nestling.models.graph import Graph
from nestling.quant.policy import QuantPolicy
from nestling.quant.regions import WEIGHT_AXES


def weight_bits(graph: Graph, policy: QuantPolicy) -> int:
    """The bits of all weights and biases of `graph` in the precisions of `policy`, with their scales.

    Weights of convolutions and linear layers count as their format packs them, with scales, zero points and
    lists of codes. Biases have 32 bits, in 16-bit layers 16; so have the constants of all other operators.
    That is without the file's nodes and names. The size that a search weighs, and a report tells, is the
    file's, its weights packed as here.
    """
    total = 0
    for operator in graph.operators:
        precision = policy.precision(operator.layer)
        width = 32 if precision.floats == "float32" else 16
        if operator.bias is not None:
            total += operator.bias.numel() * width
        if operator.weight is None:
            continue
        if operator.kind in WEIGHT_AXES and precision.weight is not None:
            channels = operator.weight.shape[WEIGHT_AXES[operator.kind]]
            per_channel = operator.weight.numel() // channels
            total += precision.weight.size_bits(channels=channels, per_channel=per_channel)
        else:
            total += operator.weight.numel() * width
    return total
