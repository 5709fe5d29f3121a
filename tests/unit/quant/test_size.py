from __future__ import annotations

import pytest
import torch
from torch import nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, insert_qdq, quantize, weight_bits, with_integers


@pytest.fixture(scope="module")
def layers() -> Graph:
    """7 x 45 weights and 5 x 28, with a bias each, and a table of 28 numbers."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 7, 3)
            self.table = nn.Parameter(torch.randn(1, 28))
            self.linear = nn.Linear(28, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.conv(torch.cat([images, images[:, :2]], 1))
            logits = self.linear(maps.flatten(1).relu() + self.table)
            assert isinstance(logits, torch.Tensor)
            return logits

    return trace(Network().eval(), resolution=4)


WEIGHTS, CHANNELS, REST = 7 * 45 + 5 * 28, 7 + 5, 7 + 5 + 28


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32 * (WEIGHTS + REST)),
        ("fp16", 16 * (WEIGHTS + REST)),
        ("bf16", 16 * (WEIGHTS + REST)),
        ("w8a8", 8 * WEIGHTS + 32 * CHANNELS + 32 * REST),
        ("w8a8-tensor", 8 * WEIGHTS + 32 * 2 + 32 * REST),
        # of the linear layer, groups are filled up and zero points are whole bytes
        ("w4", 4 * 7 * 45 + 36 * 7 * 2 + 5 * (4 * 32 + 32 + 8) + 32 * REST),
        ("w4-g64", 4 * 7 * 45 + 36 * 7 + 5 * (4 * 64 + 32 + 8) + 32 * REST),
        ("w8", 8 * 7 * 45 + 40 * 7 + 5 * (8 * 128 + 32 + 8) + 32 * REST),
        ("w3a3", 3 * WEIGHTS + 32 * CHANNELS + 32 * REST),
        ("ternary", 8 * (63 + 28) + 32 * 2 + 32 * REST),
        ("nupes4", 4 * WEIGHTS + 32 * CHANNELS + 32 * 2 + 32 * REST),
        ("codebook4", 4 * WEIGHTS + 32 * CHANNELS + 32 * 16 * 2 + 32 * REST),
        ("fp8", 8 * WEIGHTS + 32 * CHANNELS + 32 * REST),
        ("fp4", 4 * WEIGHTS + 32 * CHANNELS + 32 * REST),
    ],
)
def test_every_bit_is_counted(layers: Graph, name: str, bits: int) -> None:
    assert weight_bits(layers, QuantPolicy((("", name),))) == bits


@pytest.mark.parametrize("name", ["fp32", "w8a8", "w8a8-tensor", "w8", "w4", "w4-g64", "w4-g128"])
def test_as_many_bits_are_in_the_file(name: str, layers: Graph) -> None:
    policy = QuantPolicy((("", name),))
    quantized = quantize(layers, policy, [torch.randn(2, 3, 4, 4)])
    graph = with_integers(quantized.graph, quantized.ranges)
    model = insert_qdq(to_onnx(graph), quantized.ranges)
    parts = ("", ".quantized", ".scale", ".zero_point")
    names = {f"{o.name}.weight{part}" for o in layers.operators for part in parts}
    names |= {f"{o.name}.bias{part}" for o in layers.operators for part in parts[:2]}
    held = sum(len(constant.raw_data) for constant in model.graph.initializer if constant.name in names)
    # of each constant the last byte may be half full
    assert held == pytest.approx(weight_bits(layers, policy) / 8, abs=3)


def test_a_stack_of_matrices_counts_as_the_floats_that_it_stays() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(3, 4, 40))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images @ self.matrices).mean((1, 2))

    graph = trace(Stack().eval(), resolution=4)
    assert weight_bits(graph, QuantPolicy((("", "w4"),))) == weight_bits(graph, QuantPolicy()) >= 32 * 480


def test_layers_count_at_their_own_precision(layers: Graph) -> None:
    mixed = weight_bits(layers, QuantPolicy((("conv", "w4"),)))
    assert mixed == 32 * (5 * 28 + REST) + 4 * 7 * 45 + 36 * 7 * 2


@pytest.mark.parametrize("name", PRECISIONS)
def test_few_bits_are_fewer(layers: Graph, name: str) -> None:
    whole = weight_bits(layers, QuantPolicy())
    assert (weight_bits(layers, QuantPolicy((("", name),))) < whole) == (name != "fp32")
