from __future__ import annotations

import pytest
import torch
from torch import nn

from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, weight_bits


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
        ("w4", 4 * WEIGHTS + 36 * (7 * 2 + 5) + 32 * REST),
        ("w4-g64", 4 * WEIGHTS + 36 * CHANNELS + 32 * REST),
        ("w8", 8 * WEIGHTS + 40 * CHANNELS + 32 * REST),
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


def test_layers_count_at_their_own_precision(layers: Graph) -> None:
    mixed = weight_bits(layers, QuantPolicy((("conv", "w4"),)))
    assert mixed == 32 * (5 * 28 + REST) + 4 * 7 * 45 + 36 * 7 * 2


@pytest.mark.parametrize("name", PRECISIONS)
def test_few_bits_are_fewer(layers: Graph, name: str) -> None:
    whole = weight_bits(layers, QuantPolicy())
    assert (weight_bits(layers, QuantPolicy((("", name),))) < whole) == (name != "fp32")
