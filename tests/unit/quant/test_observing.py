from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, observe
from nestling.quant.calibration import METHODS, Method, WeightMethod
from nestling.quant.observing import needed, ranges
from nestling.quant.statistics import collect

ALL = QuantPolicy((("", "w8a8"),))


def test_minmax_spans_all_that_the_tensor_held(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, ALL, [images[:20], images[20:]])
    seen: dict[str, Tensor] = {}
    graph.run(images, after=lambda name, tensor: seen.setdefault(name, tensor))
    for name in ("images", "wide/Conv", "a.conv2/Conv"):
        low, high = min(0.0, float(seen[name].min())), max(0.0, float(seen[name].max()))
        assert float(ranges[name].scale) == pytest.approx((high - low) / 255)


def test_zero_is_exact_in_every_range(graph: Graph, images: Tensor) -> None:
    for name, found in observe(graph, ALL, [images]).items():
        zeros = torch.zeros(found.scale.shape)
        assert torch.equal(found.nearest(zeros), zeros), name


@pytest.mark.parametrize(
    ("offset", "zero_point"),
    [(100.0, 0), (-100.0, 255)],
)
def test_numbers_of_one_sign_have_zero_at_an_end(offset: float, zero_point: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2)).eval()
    found = observe(trace(network, resolution=2), ALL, [torch.rand(4, 3, 2, 2) + offset])["images"]
    assert int(found.zero_point) == zero_point


def test_moving_follows_batches_by_a_tenth() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2, 2)).eval()
    graph = trace(network, resolution=1)
    batches = [
        torch.tensor(ends).reshape(2, 1, 1, 1).expand(2, 3, 1, 1) for ends in ((-1.0, 1.0), (-21.0, 11.0))
    ]
    spans = {
        method: 255 * float(observe(graph, ALL, batches, method=method)["images"].scale)
        for method in ("minmax", "moving")
    }
    assert spans == pytest.approx({"minmax": 32.0, "moving": 5.0})


def test_what_moves_numbers_keeps_their_range() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    ranges = observe(trace(network, resolution=4), ALL, [torch.randn(8, 3, 4, 4)])
    source = ranges["0/Conv"]
    assert int(source.zero_point) > 0  # the largest of four numbers are seldom as low
    for moved in ("1/MaxPool", "2/MaxPool", "3/Flatten"):
        assert torch.equal(ranges[moved].scale, source.scale)
        assert torch.equal(ranges[moved].zero_point, source.zero_point)


def test_a_range_comes_after_the_rectifier_that_the_runtime_absorbs(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, ALL, [images])
    absent = {"stem/Conv", "a.conv1/Conv", "a/Add", "gate.conv/Conv.bias", "logits"} & ranges.keys()
    assert absent == {"gate.conv/Conv.bias"}
    assert {"act/Relu", "a.act1/Clip", "a.act2/Relu", "wide/Conv", "swish/HardSwish"} <= ranges.keys()
    assert int(ranges["a.act2/Relu"].zero_point) == 0


def test_layers_in_fp32_have_no_range(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, QuantPolicy((("b", "w8a8"), ("b.conv2", "fp32"))), [images])
    assert ranges.keys() == {
        "a.act2/Relu",
        "b.conv1/Conv.weight",
        "b.conv1/Conv.bias",
        "b.act1/Clip",
    }


def test_weights_fill_their_integers_channel_by_channel(graph: Graph, images: Tensor) -> None:
    for reduce_range, largest in ((False, 127), (True, 63)):
        ranges = observe(graph, ALL, [images], reduce_range=reduce_range)
        for operator in graph.operators:
            if operator.kind in ("Conv", "Gemm"):
                integers = ranges[f"{operator.name}.weight"].integers(operator.constant())
                assert torch.equal(
                    integers.flatten(1).abs().amax(1), torch.full((len(integers),), float(largest))
                )


@pytest.mark.parametrize("method", get_args(WeightMethod))
@pytest.mark.parametrize("precision", [name for name, p in PRECISIONS.items() if p.activation is not None])
def test_seven_bits_are_not_left_whatever_lies_outside(method: WeightMethod, precision: str) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 2, 20)
    with torch.no_grad():
        convolution.weight[0, 0, 0, :2] = torch.tensor([0.25, -0.25])  # others are below 0.03
    graph = trace(nn.Sequential(convolution, nn.Flatten()).eval(), resolution=20)
    policy = QuantPolicy((("", precision),))
    ranges = observe(graph, policy, [torch.rand(4, 3, 20, 20)], weights=method, reduce_range=True)
    integers = ranges["0/Conv.weight"].integers(convolution.weight.detach())
    assert integers.min() >= -64
    assert integers.max() <= 63
    assert ranges["0/Conv.weight"].stored == "int8"


def test_a_bias_has_the_scale_of_the_products_it_is_added_to(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, ALL, [images])
    bias, weight, read = (ranges[name] for name in ("stem/Conv.bias", "stem/Conv.weight", "images"))
    assert bias.dtype == "int32"
    assert torch.equal(bias.scale, weight.scale * read.scale)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_a_channel_without_weights_keeps_its_bias(size: float) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        convolution.weight[0] = size
        assert convolution.bias is not None
        convolution.bias[0] = 0.75
    graph = trace(nn.Sequential(convolution, nn.Flatten(), nn.Linear(8, 2)).eval(), resolution=2)
    ranges = observe(graph, ALL, [torch.rand(4, 3, 2, 2)])
    bias = graph.operators[0].bias
    assert bias is not None
    torch.testing.assert_close(ranges["0/Conv.bias"].nearest(bias), bias, rtol=1e-3, atol=1e-6)


def test_a_channel_without_weights_and_bias_is_zero() -> None:
    convolution = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        convolution.weight[0] = 0
    graph = trace(nn.Sequential(convolution, nn.Flatten(), nn.Linear(8, 2)).eval(), resolution=2)
    found = observe(graph, ALL, [torch.rand(4, 3, 2, 2)])["0/Conv.weight"]
    assert torch.equal(found.nearest(convolution.weight.detach())[0], torch.zeros(3, 1, 1))


def test_a_tensor_that_is_always_zero_has_a_range() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2)).eval()
    found = observe(trace(network, resolution=2), ALL, [torch.zeros(2, 3, 2, 2)])["images"]
    assert (float(found.scale), int(found.zero_point)) == (1.0, 0)


def test_nothing_is_run_where_nothing_is_quantized(graph: Graph) -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("no image is needed")
        yield torch.zeros(1)

    assert observe(graph, QuantPolicy(), never()) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: [images][:0], "no calibration images"),
        (lambda images: [images * float("nan")], "images is not finite"),
    ],
)
def test_images_that_tell_nothing_are_refused(
    graph: Graph, images: Tensor, change: Callable[[Tensor], list[Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        observe(graph, ALL, change(images))


@pytest.mark.parametrize("method", METHODS)
def test_kept_statistics_give_the_ranges_of_another_policy(
    graph: Graph, images: Tensor, method: Method
) -> None:
    statistics = collect(graph, images.tensor_split(4), needed(graph, ALL))
    policy = QuantPolicy((("b", "w8a8"),))
    kept = ranges(graph, policy, statistics, method=method)
    fresh = observe(graph, policy, images.tensor_split(4), method=method)
    assert kept.keys() == fresh.keys()
    for name, found in kept.items():
        assert torch.equal(found.scale, fresh[name].scale), name
        assert torch.equal(found.zero_point, fresh[name].zero_point), name


def test_statistics_that_lack_a_tensor_are_refused(graph: Graph, images: Tensor) -> None:
    with pytest.raises(ValueError, match="no statistics of tensor"):
        ranges(graph, ALL, collect(graph, [images], ["images"]))


def test_clipping_leaves_activations_a_smaller_error_than_their_extremes(
    graph: Graph, images: Tensor
) -> None:
    policy = QuantPolicy((("stem", "w8a8"),))
    outlying = images**3
    seen: dict[str, Tensor] = {}
    graph.run(outlying, after=lambda name, tensor: seen.setdefault(name, tensor))
    found = {method: observe(graph, policy, [outlying], method=method) for method in ("minmax", "mse")}

    def error(method: str, name: str) -> float:
        return float((found[method][name].nearest(seen[name]) - seen[name]).square().sum())

    for name in needed(graph, policy):
        assert error("mse", name) <= error("minmax", name), name
    assert error("mse", "images") < error("minmax", "images")


def test_clipped_weights_have_a_smaller_error() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3072, 2)
    with torch.no_grad():
        linear.weight.normal_().pow_(3)
    graph = trace(nn.Sequential(nn.Flatten(), linear, nn.ReLU(), nn.Linear(2, 2)).eval(), resolution=32)
    name = next(each.name for each in graph.operators if each.kind == "Gemm")
    widest, clipped = (
        observe(graph, ALL, [torch.rand(2, 3, 32, 32)], weights=weights)[f"{name}.weight"]
        for weights in ("minmax", "mse")
    )
    weight = linear.weight.detach()
    errors = [float((found.nearest(weight) - weight).square().sum()) for found in (clipped, widest)]
    assert errors[0] < errors[1]
