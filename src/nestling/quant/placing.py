"""Weights on the codes of research precisions, before anything is observed or written."""

from __future__ import annotations

from dataclasses import replace

import torch

from nestling.models.graph import Graph
from nestling.quant.formats import Format
from nestling.quant.policy import QuantPolicy
from nestling.quant.regions import WEIGHT_AXES, is_layer


@torch.no_grad()
def place(graph: Graph, policy: QuantPolicy) -> Graph:
    """`graph` with its weights in ternary, powers, codebooks or small floats on their nearest codes.

    They are floats still, so that any runtime computes what the precision would give. Weights in uniform
    integers get theirs from their ranges, and stay as they are here. `graph` itself where nothing changes.
    """
    placed, changed = [], False
    for operator in graph.operators:
        code = policy.precision(operator.layer).weight
        if code is None or isinstance(code, Format) or not is_layer(operator):
            placed.append(operator)
        else:
            weight = code.nearest(operator.constant().detach(), axis=WEIGHT_AXES[operator.kind])
            placed.append(replace(operator, weight=weight))
            changed = True
    return replace(graph, operators=tuple(placed)) if changed else graph
