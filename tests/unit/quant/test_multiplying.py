"""Float convolutions as products of matrices, against ONNX Runtime: no bit may differ."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.models.operators import Operator
from nestling.quant import QuantPolicy, insert_qdq, observe
from nestling.quant.accumulating import is_blocked
from nestling.quant.fake import simulate
from nestling.quant.multiplying import is_multiplied, multiplied
from nestling.quant.ranges import Range

WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
on_wide = pytest.mark.skipif(not WIDE, reason="the order of sums is that of AVX512")


def traced(*layers: nn.Module, side: int) -> Graph:
    return trace(nn.Sequential(*layers).eval(), resolution=side)


def by_runtime(graph: Graph, ranges: dict[str, Range], images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    model = insert_qdq(to_onnx(graph, dynamic_batch=True), ranges)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


@on_wide
@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(160, 24, 1), 8),
        (nn.Conv2d(160, 24, 1, stride=2, bias=False), 8),
        (nn.Conv2d(40, 24, 3, padding=1), 16),  # 3 panels of the inner axis
        (nn.Conv2d(64, 24, 3, padding=1, stride=2), 8),  # one panel, longer than PyTorch's sums
        (nn.Conv2d(128, 200, 3, padding=1), 4),  # two such panels, more outputs than go on at a time
        (nn.Conv2d(640, 8, 3, padding=1), 7),
        (nn.Conv2d(40, 40, 5, padding=2, groups=40), 8),
        (nn.Conv2d(40, 40, 3, stride=2, padding=(0, 1), groups=40, dilation=2), 9),
        (nn.Conv2d(40, 40, (1, 7), groups=40), 8),  # four products, two, one
        (nn.Conv2d(64, 64, 3, padding=1, groups=2), 8),
        (nn.Conv2d(12, 1, 1), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_convolution_of_stored_integers_is_the_runtimes_to_the_last_bit(
    layer: nn.Conv2d, side: int, count: int
) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    graph = traced(nn.Conv2d(3, layer.in_channels, 3, padding=1), nn.Hardtanh(), layer, side=side)
    images = torch.rand(count, 3, side, side)
    last = graph.operators[-1]
    ranges = dict(observe(graph, QuantPolicy(((last.layer, "w8"),)), [images]))

    assert f"{last.name}.weight" in ranges
    assert not is_blocked(last, ranges)
    assert is_multiplied(last, graph.shapes[last.name])
    assert torch.equal(simulate(graph, ranges).run(images), by_runtime(graph, ranges, images))


@on_wide
def test_a_convolution_of_odd_channels_is_the_runtimes_to_the_last_bit() -> None:
    torch.manual_seed(0)
    graph = traced(nn.Conv2d(3, 18, 3, padding=1), nn.Hardtanh(), nn.Conv2d(18, 24, 3, padding=1), side=8)
    images = torch.rand(2, 3, 8, 8)

    assert not is_blocked(graph.operators[-1], ())
    assert torch.equal(simulate(graph, {}).run(images), by_runtime(graph, {}, images))


def test_sums_over_one_pixel_are_left_to_pytorch() -> None:
    graph = traced(nn.Conv2d(3, 8, 4), nn.Conv2d(8, 8, 1), side=4)

    assert not is_multiplied(graph.operators[-1], graph.shapes["logits"])


def long_sums(groups: int) -> tuple[Operator, tuple[int, ...]]:
    """A convolution of 576 terms a sum, more than PyTorch adds one after another; what it writes of 6 px."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64 * groups, 24 * groups, 3, groups=groups, bias=False)
    graph = traced(nn.Conv2d(3, 64 * groups, 1), layer, side=6)
    last = graph.operators[-1]
    return last, graph.shapes[last.name]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_sum_that_overflows_leaves_the_others_as_they_are(groups: int) -> None:
    layer, shape = long_sums(groups)
    layer.constant()[2, :8] = 3e38
    images = torch.rand(2, 64 * groups, 6, 6) + 0.5
    found = multiplied(layer, images, shape=shape)
    expected = torch.conv2d(images.double(), layer.constant().double(), groups=groups).float()

    assert (expected[:, 2] == torch.inf).all()
    assert torch.allclose(found, expected, atol=1e-4)


def test_products_of_matrices_stay_on_the_device_of_the_weights() -> None:
    layer, shape = long_sums(1)
    moved = replace(layer, weight=layer.constant().to("meta"))
    assert multiplied(moved, torch.empty(2, 64, 6, 6, device="meta"), shape=shape).shape == (2, *shape[1:])
