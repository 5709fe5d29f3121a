from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.models.cost import cost
from nestling.models.graph import trace
from nestling.quant import PRECISIONS, QuantPolicy, quantize
from nestling.quant.layers import bit_operations, bits, layers

POLICY = QuantPolicy((("0", "w8a8"), ("2", "w4"), ("7", "bf16")))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(2),
        nn.Linear(4, 6),
        nn.Linear(6, 5, bias=False),
        nn.Flatten(),
    ).eval()


def test_the_layers_cost_what_the_network_costs(network: nn.Module) -> None:
    found = layers(trace(network, resolution=14), POLICY)
    whole = cost(network, 14)
    assert sum(layer.macs for layer in found) == whole.macs
    assert sum(layer.params for layer in found) == whole.params
    assert [layer.name for layer in found] == ["0", "2", "3", "6", "7"]
    assert [layer.kind for layer in found[:3]] == ["Conv", "depthwise Conv", "grouped Conv"]


def test_each_layer_has_the_bits_of_its_precision(network: nn.Module) -> None:
    graph = trace(network, resolution=14)
    found = layers(graph, POLICY)
    pairs = [(layer.weight_bits, layer.activation_bits) for layer in found]
    assert pairs == [(8, 8), (4, 32), (32, 32), (32, 32), (16, 16)]
    operations = sum(layer.macs * w * a for layer, (w, a) in zip(found, pairs, strict=True))
    assert bit_operations(graph, POLICY) == operations


class Gated(nn.Module):
    """A sum of two hard swishes, of which a convolution reads the first too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(n, 8, 1), nn.Hardswish()) for n in (3, 8))
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        logits: Tensor = self.last(self.second(first) + first).mean((2, 3))
        return logits


def test_a_layer_reads_the_bits_that_are_left_where_hard_swishes_are_split() -> None:
    graph = trace(Gated().eval(), resolution=4)
    policy = QuantPolicy((("", "w4a4"), *((name, "w8a8") for name in ("first", "second", "last"))))
    of_sum = next(operator.layer for operator in graph.operators if operator.kind == "Add")
    assert policy.precision(of_sum).name == "w4a4"
    written = quantize(graph, policy, [torch.randn(2, 3, 4, 4)])
    read = {
        operator.layer: written.ranges[operator.inputs[0]].dtype
        for operator in written.graph.operators
        if operator.kind == "Conv"
    }
    assert read["second.0"] == "uint4"
    for layer in layers(graph, policy):
        assert f"uint{layer.activation_bits:g}" == read[layer.name]


def test_the_bits_of_a_precision_are_those_in_its_name() -> None:
    told = {name: bits(PRECISIONS[name]) for name in ("fp4", "fp8-e5m2", "codebook4", "ternary", "w2a8")}
    assert told == {
        "fp4": (4, 32), "fp8-e5m2": (8, 32), "codebook4": (4, 32), "ternary": (1.6, 8), "w2a8": (2, 8),
    }  # fmt: skip
