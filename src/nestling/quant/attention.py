"""Attention whose queries and keys are one product, so that their rounding errors do not meet.

OFQ's query-key reparameterization, Liu et al. 2023, arXiv 2302.02210.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The two matrices of each head whose product is a layer's weight.

    Attributes:
        query: (heads, head channels, channels), times the scale of attention.
        key: as `query`, without the scale.
    """

    query: Tensor
    key: Tensor

    def product(self) -> Tensor:
        """The weight (heads * channels, channels): head by head `key` transposed, times `query`."""
        return (self.key.transpose(1, 2) @ self.query).flatten(0, 1)


@torch.no_grad()
def reparameterize(
    graph: Graph, *, only: Callable[[str], bool] = lambda _: True
) -> tuple[Graph, dict[str, Factors]]:
    """`graph` with queries and keys as one product wherever a fused projection makes them, and its factors.

    An attention is `softmax((q * scale) k')` of one linear layer's thirds, with nothing in between; what
    computes otherwise stays as it is, and a graph without any is returned itself.

    The product of query `Wq x + q` and key `Wk z + k` is, up to what is the same for all keys and vanishes
    in the softmax, that of `Wk' (Wq x + q)` and `z`: so one layer with the weight `Wk' Wq` of each head takes
    the place of both, and attention is with the inputs themselves. The network stays the same. The paper
    leaves the biases out, which are exact here: only the queries' counts.

    It takes more multiplications: for H heads of D channels in C, `H C C` a token in place of `2 H D C`.

    Args:
        graph: of floats.
        only: whether the layer of this name, a fused projection, is to be rewritten.

    Returns:
        The graph; and operator -> the factors of its weight, for every attention that was found.
    """
    found = [place for operator in graph.operators if (place := _find(graph, operator)) is not None]
    factors: dict[str, Factors] = {}
    for place in found:
        if only(place.projection.layer):
            graph = _rewritten(graph, place, factors)
    return graph, factors


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """One attention, its operators in the order in which numbers flow."""

    flatten: Operator
    projection: Operator
    rows: Operator
    heads: Operator
    parts: Operator
    query: Operator
    scale: Operator | None
    key: Operator
    key_transposed: Operator
    product: Operator
    value: Operator


def _find(graph: Graph, product: Operator) -> _Attention | None:
    """The attention whose queries and keys `product` multiplies."""
    by_name = {operator.name: operator for operator in graph.operators}
    readers = graph.readers()

    def before(operator: Operator | None, kind: str, side: int = 0) -> Operator | None:
        found = None if operator is None else by_name.get(operator.inputs[side])
        return found if found is not None and found.kind == kind and len(readers[found.name]) == 1 else None

    if product.kind != "MatMul" or len(product.inputs) != 2:
        return None
    scale = before(product, "Mul")
    if scale is not None and (scale.weight is None or scale.weight.numel() != 1):
        return None
    query = before(scale or product, "Gather")
    key_transposed = before(product, "Transpose", side=1)
    key = before(key_transposed, "Gather")
    if query is None or key is None or key_transposed is None or query.inputs != key.inputs:
        return None
    parts = by_name.get(query.inputs[0])
    if parts is None or parts.kind != "Transpose" or parts.integers("perm") != (2, 0, 3, 1, 4):
        return None
    heads = before(parts, "Reshape")
    rows = before(heads, "Reshape")
    projection = before(rows, "Gemm")
    flatten = before(projection, "Reshape")
    value = [reader for reader in readers[parts.name] if reader not in (query, key)]
    if heads is None or rows is None or projection is None or flatten is None or len(value) != 1:
        return None
    taken = [(o.integer("axis"), o.attributes["indices"]) for o in (query, key, value[0])]
    shape = heads.integers("shape")
    fits = (
        taken == [(0, 0), (0, 1), (0, 2)]
        and key_transposed.integers("perm") == (0, 1, 3, 2)
        and len(shape) == 5
        and shape[2] == 3
        and all(reader.kind == "Softmax" for reader in readers[product.name])
    )
    if not fits:
        return None
    return _Attention(
        flatten, projection, rows, heads, parts, query, scale, key, key_transposed, product, value[0]
    )


def _rewritten(graph: Graph, place: _Attention, factors: dict[str, Factors]) -> Graph:
    """`graph` with one attention reparameterized; its factors are added to `factors`."""
    _, tokens, _, heads, width = place.heads.integers("shape")
    weight, bias = place.projection.constant(), place.projection.bias
    channels = weight.shape[1]
    query, key, value = weight.reshape(3, heads, width, channels)
    scale = 1.0 if place.scale is None else place.scale.constant().reshape(()).to(weight.dtype)
    of_layer = Factors(query * scale, key)
    both_bias = value_bias = None
    if bias is not None:
        query_bias, _, value_bias = bias.reshape(3, heads, width)
        both_bias = torch.einsum("hdc,hd->hc", key, query_bias * scale).flatten()
        value_bias = value_bias.flatten()
    gemm, shapes = place.projection, dict(graph.shapes)
    rows = place.flatten.name

    def operator(
        kind: str, name: str, source: str, size: tuple[int, ...], **attributes: tuple[int, ...]
    ) -> Operator:
        shapes[name] = size
        return Operator(kind, name, (source,), place.heads.layer, attributes)

    both = f"{gemm.name}.qk"
    stem = place.heads.name
    made = {
        # values keep the projection's name and place
        gemm.name: [replace(gemm, weight=value.flatten(0, 1), bias=value_bias)],
        place.rows.name: [],
        place.heads.name: [
            operator(
                "Reshape",
                place.heads.name,
                gemm.name,
                (1, tokens, heads, width),
                shape=(-1, tokens, heads, width),
            )
        ],
        place.parts.name: [],
        place.value.name: [
            operator(
                "Transpose",
                place.value.name,
                place.heads.name,
                (1, heads, tokens, width),
                perm=(0, 2, 1, 3),
            )
        ],
        place.query.name: [
            replace(gemm, name=both, inputs=(rows,), weight=of_layer.product(), bias=both_bias),
            operator(
                "Reshape",
                f"{stem}.qk",
                both,
                (1, tokens, heads, channels),
                shape=(-1, tokens, heads, channels),
            ),
            operator(
                "Transpose",
                place.query.name,
                f"{stem}.qk",
                (1, heads, tokens, channels),
                perm=(0, 2, 1, 3),
            ),
        ],
        place.key.name: [
            operator(
                "Reshape",
                place.key.name,
                rows,
                (1, 1, tokens, channels),
                shape=(-1, 1, tokens, channels),
            )
        ],
        place.key_transposed.name: [
            operator(
                "Transpose",
                place.key_transposed.name,
                place.key.name,
                (1, 1, channels, tokens),
                perm=(0, 1, 3, 2),
            )
        ],
        place.product.name: [
            replace(place.product, inputs=(place.query.name, place.key_transposed.name)),
        ],
    }
    if place.scale is not None:
        made[place.scale.name] = []
    shapes[both] = (shapes[gemm.name][0], heads * channels)
    shapes[gemm.name] = (shapes[gemm.name][0], heads * width)
    operators = tuple(new for old in graph.operators for new in made.get(old.name, [old]))
    gone = {name for name, new in made.items() if all(each.name != name for each in new)}
    factors[both] = of_layer
    return replace(
        graph, operators=operators, shapes={name: s for name, s in shapes.items() if name not in gone}
    )
