from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, Format, QuantPolicy, Range, insert_qdq, observe, simulate
from nestling.quant.constants import grouped_range
from nestling.quant.ranges import in_blocks, rows

Compute = Callable[[onnx.ModelProto, Tensor], tuple[NDArray[np.float32], Counter[str]]]
WEIGHT_ONLY = ["w8", "w4", "w4-g64", "w4-g128"]


class Product(nn.Module):
    """Two linear layers of odd sizes, one product with a constant, and convolutions of few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.depthwise = nn.Conv2d(7, 7, 3, groups=7, bias=False)
        self.first = nn.Linear(7 * 4, 37)
        self.table = nn.Parameter(torch.randn(37, 70))
        self.last = nn.Linear(70, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.depthwise(self.conv(images).relu())
        numbers = self.first(maps.flatten(1)).relu() @ self.table
        logits = self.last(numbers)
        assert isinstance(logits, Tensor)
        return logits


@pytest.fixture(scope="module")
def odd() -> Graph:
    torch.manual_seed(0)
    network = Product().eval()
    with torch.no_grad():
        network.conv.weight[3] = 0
        network.first.weight[5] = 0
        network.last.weight[2] = network.last.weight[2].abs() + 1  # zero is at the end of its integers
    return trace(network, resolution=4)


def weight_only(graph: Graph, name: str) -> tuple[Mapping[str, Range], onnx.ModelProto]:
    ranges = observe(graph, QuantPolicy((("", name),)), [])
    return ranges, insert_qdq(to_onnx(graph, dynamic_batch=True), ranges)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_a_file_with_weights_in_blocks_computes_what_its_simulation_computes(
    odd: Graph, name: str, compute_file: Compute
) -> None:
    images = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    ranges, model = weight_only(odd, name)
    got, kinds = compute_file(model, images)
    expected = simulate(odd, ranges).run(images).numpy()
    assert np.abs(expected - got).max() < 2e-6 * np.abs(expected).max()
    assert kinds["MatMulNBits"] == 3
    assert not {"Gemm", "MatMul"} & kinds.keys()
    exact = odd.run(images).numpy()
    assert np.abs(exact - got).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_the_standards_reference_computes_the_same_convolutions(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3), nn.Flatten()).eval()
    graph = trace(network, resolution=5)
    ranges, model = weight_only(graph, name)
    images = torch.randn(2, 3, 5, 5)
    (got,) = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    expected = simulate(graph, ranges).run(images).numpy()
    assert isinstance(got, np.ndarray)
    assert np.abs(expected - got).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w8", 8 + 32 / 128), ("w4", 4 + 36 / 32), ("w4-g64", 4 + 36 / 64), ("w4-g128", 4 + 36 / 128)],
)
def test_the_file_holds_as_many_bits(name: str, bits: float) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 128, 1), nn.Conv2d(128, 64, 1), nn.Flatten(), nn.Linear(64, 512)
    ).eval()
    graph = trace(network, resolution=1)
    policy = QuantPolicy((("1", name), ("3", name)))
    model = to_onnx(graph)
    numbers = 64 * 128 + 64 * 512
    saved = model.ByteSize() - insert_qdq(model, observe(graph, policy, [])).ByteSize()
    group = PRECISIONS[name].weight
    assert isinstance(group, Format)
    # The linear layer's 64 weights fill half of a block of 128.
    filled = 64 * 512 * (2 if group.group == 128 else 1) - 64 * 512
    wanted = numbers * (32 - bits) / 8 - filled * bits / 8
    assert saved == pytest.approx(wanted, abs=1300)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 37), (5, 1, 3, 3), (2, 64), (1, 1)])
def test_no_integer_of_a_group_is_further_than_half_a_step(shape: tuple[int, ...], signed: bool) -> None:
    format = Format(bits=4, signed=signed, symmetric=signed, per_channel=True, group=32)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = grouped_range(weight, format, axis=0)
    groups = -(-weight[0].numel() // 32)
    assert found.scale.shape == found.zero_point.shape == (shape[0], groups)
    error = in_blocks(rows(found.nearest(weight) - weight, 0), 32).abs()
    # Where zero lies between two integers, the ends of a group move by less than half a step.
    assert (error <= found.scale[..., None] * (0.5 if signed else 1) + 1e-6).all()
    assert error.mean() < 0.3 * found.scale.mean()


def test_weights_along_another_axis_are_the_same_weights_turned() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    format = Format(bits=4, signed=False, symmetric=False, per_channel=True, group=16)
    turned = weight.T.contiguous()
    straight = grouped_range(weight, format, axis=0).nearest(weight)
    assert torch.equal(grouped_range(turned, format, axis=1).nearest(turned).T, straight)


def test_groups_are_nearer_than_a_scale_for_each_channel() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for group in (16, 64, 256):
        format = Format(bits=4, signed=False, symmetric=False, per_channel=True, group=group)
        errors.append(float((grouped_range(weight, format, axis=0).nearest(weight) - weight).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 0.6 * errors[-1]


def test_weights_in_floats_need_groups() -> None:
    with pytest.raises(ValueError, match="need groups"):
        grouped_range(torch.ones(2, 2), Format(4, signed=True, symmetric=True, per_channel=True), axis=0)


def test_integer_and_float_layers_may_stand_side_by_side(
    graph: Graph, images: Tensor, compute_file: Compute
) -> None:
    policy = QuantPolicy((("", "w4"), ("a", "w8a8"), ("classifier", "w8"), ("wide", "fp32")))
    ranges = observe(graph, policy, [images], reduce_range=True)
    got, kinds = compute_file(insert_qdq(to_onnx(graph, dynamic_batch=True), ranges), images)
    expected = simulate(graph, ranges).run(images).numpy()
    assert np.median(np.abs(expected - got)) < 1e-5 * np.abs(expected).max()
    assert (kinds["MatMulNBits"], kinds["QLinearConv"]) == (1, 2)
