"""Float convolutions against ONNX Runtime: no bit may differ where it computes by blocks of 16 channels."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.models.operators import Operator, compute
from nestling.quant.accumulating import accumulated, is_blocked, joined_sums
from nestling.quant.fake import simulate

WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
on_wide = pytest.mark.skipif(not WIDE, reason="blocks of 16 channels need AVX512")


def traced(*layers: nn.Module, side: int = 8) -> Graph:
    return trace(nn.Sequential(*layers).eval(), resolution=side)


def by_runtime(graph: Graph, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        to_onnx(graph, dynamic_batch=True).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def stem(channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, channels, 3, stride=2, padding=1)


@on_wide
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(160, 24, 1),
        nn.Conv2d(160, 24, 1, stride=2, bias=False),
        nn.Conv2d(40, 24, 3, padding=1),
        nn.Conv2d(40, 40, 5, padding=2, groups=40),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 20, 3, padding=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_float_convolution_is_the_runtimes_to_the_last_bit(layer: nn.Conv2d, count: int) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    graph = traced(stem(layer.in_channels), nn.Hardtanh(), layer)
    images = torch.rand(count, 3, 8, 8)

    assert is_blocked(graph.operators[-1], ())
    assert torch.equal(simulate(graph, {}).run(images), by_runtime(graph, images))


@on_wide
def test_weights_in_channels_last_change_no_bit(images: Tensor) -> None:
    graph = traced(stem(16).to(memory_format=torch.channels_last))

    assert torch.equal(simulate(graph, {}).run(images), by_runtime(graph, images))


@on_wide
class Residual(nn.Module):
    """A block whose sum a runtime can begin with; `rectified` tells whether what it adds is in blocks."""

    def __init__(self, *, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.between = nn.Conv2d(3, 48, 3, padding=1), between
        self.conv = nn.Conv2d(48, 48, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.between(self.stem(images))
        return torch.relu(self.conv(maps) + maps)


@on_wide
@pytest.mark.parametrize(
    ("between", "joins"),
    [(nn.ReLU(), True), (nn.MaxPool2d(2), True), (nn.GELU(), False), (nn.ZeroPad2d(1), False)],
    ids=["relu", "pool", "gelu", "pad"],
)
def test_a_sum_joins_its_convolution_where_both_its_numbers_are_in_blocks(
    images: Tensor, between: nn.Module, joins: bool
) -> None:
    graph = trace(Residual(between=between).eval(), resolution=8)

    assert (len(joined_sums(graph, ())) == 1) is joins
    if not isinstance(between, nn.GELU):  # whose own bits differ
        assert torch.equal(simulate(graph, {}).run(images), by_runtime(graph, images))


def test_a_sum_of_a_tensor_in_integers_joins_no_convolution() -> None:
    graph = trace(Residual(between=nn.ReLU()).eval(), resolution=8)
    (joined,) = joined_sums(graph, ())
    rectified = next(name for name in graph.shapes if "between" in name)

    assert not joined_sums(graph, (rectified,))
    assert joined in graph.shapes


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(18, 32, 3), nn.Conv2d(18, 18, 3, groups=18), nn.Conv2d(64, 64, 3, groups=8)],
    ids=str,
)
def test_channels_that_fill_no_blocks_are_not_in_blocks(layer: nn.Conv2d) -> None:
    graph = traced(stem(layer.in_channels), layer)

    assert not is_blocked(graph.operators[-1], ())


def test_a_weight_in_integers_is_in_no_blocks() -> None:
    (operator,) = traced(stem(16)).operators

    assert is_blocked(operator, ())
    assert not is_blocked(operator, (f"{operator.name}.weight",))


def test_other_orders_differ_in_no_more_than_last_bits(images: Tensor) -> None:
    (operator,) = traced(stem(16)).operators
    added = torch.rand(3, 16, 4, 4)

    expected = compute(operator, images) + added
    torch.testing.assert_close(accumulated(operator, images, added), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(operator, Operator)
