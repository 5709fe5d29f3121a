from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, observe

ALL = QuantPolicy((("", "w8a8"),))


def range_of(scale: float, zero_point: int, *, dtype: str = "uint8") -> Range:
    return Range(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), dtype, None)


@pytest.mark.parametrize(
    ("dtype", "integer_type", "zero_point"),
    [("uint8", TensorProto.UINT8, 3), ("uint8", TensorProto.UINT8, 0), ("int8", TensorProto.INT8, 0)],
)
def test_rounding_is_that_of_quantize_linear(dtype: str, integer_type: int, zero_point: int) -> None:
    found = range_of(0.3, zero_point, dtype=dtype)
    halves = torch.arange(-300, 300, dtype=torch.float32) / 2  # every tie, and numbers beyond both ends
    tensor = torch.cat([halves * found.scale, torch.randn(1000) * 20])
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    model = helper.make_model(
        helper.make_graph(
            [node],
            "quantize",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("y", integer_type, [None])],
            [
                onnx.numpy_helper.from_array(found.scale.numpy(), "scale"),
                onnx.numpy_helper.from_array(np.array(zero_point, dtype=dtype), "zero"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"x": tensor.numpy()})
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(found.integers(tensor).numpy(), expected.astype(np.float32))


def test_rounding_leaves_its_operand_as_it_was() -> None:
    tensor = torch.tensor([0.1, 0.2])
    range_of(1.0, 0).nearest(tensor)
    assert torch.equal(tensor, torch.tensor([0.1, 0.2]))


def test_channels_are_rounded_by_their_own_scales() -> None:
    found = Range(torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int32), "int8", 1)
    assert torch.equal(found.nearest(torch.tensor([[0.7, 0.7]])), torch.tensor([[1.0, 0.5]]))


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
        "b.conv2/Conv",
        "b.act2/Relu",
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


def test_a_bias_has_the_scale_of_the_products_it_is_added_to(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, ALL, [images])
    bias, weight, read = (ranges[name] for name in ("stem/Conv.bias", "stem/Conv.weight", "images"))
    assert bias.dtype == "int32"
    assert torch.equal(bias.scale, weight.scale * read.scale)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_a_channel_without_weights_keeps_its_bias(size: float) -> None:
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
