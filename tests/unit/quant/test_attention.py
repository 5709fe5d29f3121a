from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, insert_qdq, observe, simulate
from nestling.quant.attention import reparameterize

Compute = Callable[[onnx.ModelProto, Tensor], tuple[np.ndarray, dict[str, int]]]


class Tokens(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.norm = nn.LayerNorm(12)
        self.attention = Attention(12, num_heads=3, qkv_bias=bias)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens))
        result = self.head(tokens.mean(1))
        assert isinstance(result, Tensor)
        return result


def traced(*, bias: bool = True) -> Graph:
    torch.manual_seed(0)
    network = Tokens(bias=bias)
    for parameter in network.attention.parameters():  # large, so that attention has a say
        nn.init.normal_(parameter, std=0.7)
    return trace(network.eval(), resolution=12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_reparameterized_network_computes_the_same(bias: bool, images: Tensor) -> None:
    graph = traced(bias=bias)
    changed, factors = reparameterize(graph)
    expected = graph.run(images)
    assert len(factors) == 1
    assert (changed.run(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert {operator.name for operator in changed.operators} <= changed.shapes.keys()


def test_the_bias_of_queries_counts(images: Tensor) -> None:
    changed, (name, *_) = reparameterize(traced())
    without = tuple(
        type(o)(o.kind, o.name, o.inputs, o.layer, o.attributes, o.weight, None if o.name == name else o.bias)
        for o in changed.operators
    )
    other = Graph(without, changed.input, changed.output, changed.shapes, changed.resolution)
    assert (other.run(images) - changed.run(images)).abs().max() > 1e-3


def test_the_product_is_that_of_the_factors() -> None:
    changed, factors = reparameterize(traced())
    by_name = {operator.name: operator for operator in changed.operators}
    for name, of_layer in factors.items():
        assert torch.equal(by_name[name].constant(), of_layer.product())
        assert of_layer.query.shape == of_layer.key.shape == (3, 4, 12)


def test_shapes_are_those_of_the_tensors(images: Tensor) -> None:
    changed, _ = reparameterize(traced())
    seen = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tuple(tensor.shape)
        return tensor

    changed.run(images[:1], after=note)
    assert seen == {name: tuple(shape) for name, shape in changed.shapes.items()}


def test_the_file_computes_it_on_integers(images: Tensor, compute_file: Compute) -> None:
    changed, _ = reparameterize(traced())
    ranges = observe(changed, QuantPolicy((("", "w8a8"),)), [images])
    logits, used = compute_file(insert_qdq(to_onnx(changed), ranges), images[:1])
    expected = simulate(changed, ranges).run(images[:1])
    assert np.abs(logits - expected.numpy()).max() < 0.02 * float(expected.abs().max())
    assert used["MatMul"] == 0


def test_what_is_no_such_attention_stays(graph: Graph) -> None:
    assert reparameterize(graph) == (graph, {})
    with_one = traced()
    assert reparameterize(with_one, only=lambda layer: layer != "attention.qkv") == (with_one, {})
    assert reparameterize(with_one, only=lambda layer: layer == "attention.qkv") != (with_one, {})
