from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, Recipe, observe, quantize
from nestling.quant.gates import split_gates
from nestling.quant.sharing import with_shared_bounds

ALL = QuantPolicy((("", "w8a8"),))


def same(one: Range, other: Range) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def test_sums_along_a_residual_stream_share_their_range(graph: Graph, images: Tensor) -> None:
    stream = ("pool/MaxPool", "a.conv2/Conv", "a.act2/Relu", "b.conv2/Conv", "b.act2/Relu")
    free = observe(graph, ALL, [images])
    shared = observe(graph, ALL, [images], shared=["Add"])
    assert not any(same(free[stream[0]], free[name]) for name in stream[1:])
    assert all(same(shared[stream[0]], shared[name]) for name in stream)
    assert float(shared[stream[0]].scale) >= max(float(free[name].scale) for name in stream)
    alone = ("a.act1/Clip", "wide/Conv")
    assert all(same(free[name], shared[name]) for name in alone)


def test_a_recipe_may_ask_for_shared_ranges(graph: Graph, images: Tensor) -> None:
    found = quantize(graph, ALL, [images], recipe=Recipe(shared=("Add",))).ranges
    shared = observe(split_gates(graph, ALL), ALL, [images], shared=["Add"])
    assert found.keys() == shared.keys()
    assert all(same(found[name], shared[name]) for name in ("pool/MaxPool", "b.act2/Relu", "wide/Conv"))


def test_only_the_kinds_that_are_named_share(graph: Graph, images: Tensor) -> None:
    free, other = observe(graph, ALL, [images]), observe(graph, ALL, [images], shared=["Concat"])
    assert all(same(free[name], other[name]) for name in free)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        joined = torch.cat((self.first(images), 3 * self.second(images)), 1)
        result = self.last(joined).flatten(1)
        assert isinstance(result, Tensor)
        return result


def test_concatenated_tensors_share_where_asked() -> None:
    torch.manual_seed(0)
    graph = trace(Joined().eval(), resolution=2)
    (joined,) = (operator for operator in graph.operators if operator.kind == "Concat")
    names = (*joined.inputs, joined.name)
    pictures = [torch.randn(4, 3, 2, 2)]
    for shared, ranges in ((["Concat"], 1), ([], 3)):
        found = observe(graph, ALL, pictures, shared=shared)
        assert len({float(found[name].scale) for name in names}) <= ranges
        assert (len({float(found[name].scale) for name in names}) == 1) == bool(shared)


def test_shared_bounds_span_the_group() -> None:
    bounds = {"a": (-1.0, 2.0), "b": (-3.0, 1.0), "c": (0.0, 9.0)}
    assert with_shared_bounds(bounds, [{"a", "b"}]) == {"a": (-3.0, 2.0), "b": (-3.0, 2.0), "c": (0.0, 9.0)}
