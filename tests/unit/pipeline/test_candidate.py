from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nestling.export import ExportMismatch
from nestling.models.graph import trace
from nestling.pipeline.candidate import check_precisions
from nestling.pipeline.workbench import even_batch
from nestling.profile import OptimizedOp
from nestling.quant import Quantized, QuantPolicy, quantize


class Optimizing:
    """Stands for a device whose runtime makes `ops` of every file."""

    def __init__(self, ops: list[tuple[str, str]]) -> None:
        self.ops = tuple(OptimizedOp(name, op) for name, op in ops)

    def optimized_ops(self, _: Path) -> tuple[OptimizedOp, ...]:
        return self.ops


@pytest.fixture(scope="module")
def two_layers() -> tuple[Quantized, QuantPolicy]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten()).eval()
    policy = QuantPolicy((("0", "w8a8"),))
    return quantize(trace(network, resolution=8), policy, [torch.rand(2, 3, 8, 8)]), policy


def _check(two_layers: tuple[Quantized, QuantPolicy], first: str, second: str) -> None:
    quantized, policy = two_layers
    names = [operator.name for operator in quantized.graph.operators if operator.kind == "Conv"]
    device: Any = Optimizing([(names[0], first), (names[1], second), ("x", "QuantizeLinear")])
    check_precisions(device, Path("model.onnx"), quantized, policy)


def test_a_file_that_keeps_to_its_policy_passes(two_layers: tuple[Quantized, QuantPolicy]) -> None:
    _check(two_layers, "com.microsoft.QLinearConv", "Conv")


def test_a_layer_quantized_against_the_policy_is_named(two_layers: tuple[Quantized, QuantPolicy]) -> None:
    with pytest.raises(ExportMismatch, match="2 is computed on integers"):
        _check(two_layers, "com.microsoft.QLinearConv", "com.microsoft.QLinearConv")


def test_a_layer_left_in_float_against_the_policy_is_named(
    two_layers: tuple[Quantized, QuantPolicy],
) -> None:
    with pytest.raises(ExportMismatch, match="0 is computed in float"):
        _check(two_layers, "com.microsoft.nchwc.Conv", "Conv")


@pytest.mark.parametrize(("count", "size"), [(257, 129), (256, 256), (1, 1), (512, 256), (513, 171)])
def test_images_are_cut_into_batches_of_nearly_the_same_size(count: int, size: int) -> None:
    assert even_batch(count, at_most=256) == size
