from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, Range, insert_qdq, observe, place, simulate

Compute = Callable[[onnx.ModelProto, Tensor], tuple[NDArray[np.float32], Counter[str]]]
IN_INTEGERS = [name for name, precision in PRECISIONS.items() if precision.activation is not None]
OTHER_CODES = [
    name for name, precision in PRECISIONS.items() if precision.simulated and precision.activation is None
]


def quantized(graph: Graph, name: str, images: Tensor) -> tuple[Graph, Mapping[str, Range], onnx.ModelProto]:
    policy = QuantPolicy((("", name),))
    placed = place(graph, policy)
    ranges = observe(placed, policy, [images], reduce_range=True)
    return placed, ranges, insert_qdq(to_onnx(placed, dynamic_batch=True), ranges)


@pytest.mark.parametrize("name", IN_INTEGERS)
def test_a_file_in_integers_computes_what_its_simulation_computes(
    graph: Graph, images: Tensor, name: str, compute_file: Compute
) -> None:
    placed, ranges, model = quantized(graph, name, images)
    got, kinds = compute_file(model, images)
    expected = simulate(placed, ranges).run(images).numpy()
    difference = np.abs(expected - got) / np.abs(expected).max()
    assert np.median(difference) < 1e-5
    # Layers are computed on integers, whatever bits of their bytes are used; but ReLU6 is one with rounding
    # only where the bytes end where it does.
    activation = PRECISIONS[name].activation
    assert activation is not None
    in_float = 2 if activation.bits < 8 else 0
    assert (kinds["QLinearConv"], kinds["QGemm"]) == (8 - in_float, 1)
    assert kinds["Conv"] + kinds["FusedConv"] == in_float
    assert not {"Gemm", "FusedGemm", "Add", "MaxPool", "GlobalAveragePool"} & kinds.keys()
    exact = graph.run(images).numpy()
    assert np.median(np.abs(exact - got)) > 1e-4  # it is quantized


@pytest.mark.parametrize("name", ["w4a4", "w3a3", "w2a2"])
def test_activations_of_few_bits_take_as_many_values(graph: Graph, images: Tensor, name: str) -> None:
    placed, ranges, _ = quantized(graph, name, images)
    bits = int(name[-1])
    values = {
        name: len(set(ranges[name].nearest(torch.randn(4000) * 9).tolist()))
        for name in graph.shapes
        if name in ranges
    }
    assert values
    assert max(values.values()) <= 2**bits
    weights = [
        ranges[f"{o.name}.weight"].nearest(o.constant())[0]
        for o in placed.operators
        if f"{o.name}.weight" in ranges
    ]
    assert max(len(set(weight.flatten().tolist())) for weight in weights) in range(2, 2**bits + 1)


@pytest.mark.parametrize("name", ["ternary", "ternary-median"])
def test_integers_of_placed_ternary_weights_are_the_weights(graph: Graph, images: Tensor, name: str) -> None:
    placed, ranges, _ = quantized(graph, name, images)
    for operator in placed.operators:
        if f"{operator.name}.weight" in ranges:
            weight = operator.constant()
            assert torch.equal(ranges[f"{operator.name}.weight"].nearest(weight), weight)
            assert len(set(weight.flatten().tolist())) == 3


@pytest.mark.parametrize("name", OTHER_CODES)
def test_any_runtime_computes_what_placed_weights_give(
    graph: Graph, images: Tensor, name: str, compute_file: Compute
) -> None:
    placed, ranges, model = quantized(graph, name, images)
    assert not ranges
    got, _ = compute_file(model, images)
    expected = placed.run(images).numpy()
    assert np.abs(expected - got).max() < 1e-5 * np.abs(expected).max()
    exact = graph.run(images).numpy()
    assert 1e-3 < np.abs(exact - got).max() / np.abs(exact).max() < 0.5


def test_nothing_is_placed_where_no_layer_has_a_code(graph: Graph) -> None:
    assert place(graph, QuantPolicy((("", "w4a4"), ("b", "w4")))) is graph


def test_only_the_layers_of_the_policy_are_placed(graph: Graph) -> None:
    placed = place(graph, QuantPolicy((("b", "ternary"), ("b.conv2", "fp32"))))
    changed = {
        after.name
        for before, after in zip(graph.operators, placed.operators, strict=True)
        if before is not after
    }
    assert changed == {"b.conv1/Conv"}


def test_one_scale_for_a_tensor_spans_its_largest_channel() -> None:
    layer = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([0.1, -1.27]).reshape(2, 1, 1, 1)
    graph = trace(nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 2)).eval(), resolution=2)
    ranges = observe(graph, QuantPolicy((("", "w8a8-tensor"),)), [torch.rand(4, 3, 2, 2)])
    found = ranges["0/Conv.weight"]
    assert (found.scale.ndim, found.axis) == (0, None)
    assert torch.equal(found.integers(layer.weight.detach())[:, 0, 0, 0], torch.tensor([10.0, -127.0]))


def test_signed_activations_use_all_their_integers(graph: Graph, images: Tensor) -> None:
    policy = QuantPolicy((("", "w8a8-signed"),))
    found = observe(graph, policy, [images])["act/Relu"]
    assert (found.dtype, int(found.zero_point)) == ("int8", -128)


def test_signed_activations_stand_for_the_same_numbers_as_unsigned_ones(graph: Graph, images: Tensor) -> None:
    signed, unsigned = (
        simulate(graph, observe(graph, QuantPolicy((("", name),)), [images])).run(images)
        for name in ("w8a8-signed", "w8a8")
    )
    assert torch.equal(signed, unsigned)


def test_few_bits_leave_large_weights_out_for_the_sake_of_the_rest() -> None:
    layer = nn.Conv2d(16, 1, 3)
    with torch.no_grad():
        layer.weight[:] = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(0))
        layer.weight[0, 0, 0, 0] = 9.0
    weight = layer.weight.detach()
    graph = trace(nn.Sequential(nn.Conv2d(3, 16, 1), layer, nn.Flatten()).eval(), resolution=3)
    found = observe(graph, QuantPolicy((("1", "w3a8"),)), [torch.rand(4, 3, 3, 3)])["1/Conv.weight"]
    widest = 9.0 / 3
    error = (found.nearest(weight) - weight).square().sum()
    assert error < 0.7 * ((weight / widest).round() * widest - weight).square().sum()


@pytest.mark.parametrize(
    ("rules", "simulated"),
    [
        ((("", "w8a8"), ("a", "w4"), ("b", "fp16"), ("c", "w8"), ("d", "w4-g128")), ()),
        ((("", "w4a8"), ("a", "fp8"), ("b", "w8a8"), ("c", "w4a8")), ("w4a8", "fp8")),
    ],
)
def test_a_policy_tells_what_no_runtime_computes(
    rules: tuple[tuple[str, str], ...], simulated: tuple[str, ...]
) -> None:
    assert QuantPolicy(rules).simulated == simulated


def test_the_precisions_that_run_are_these() -> None:
    assert {name for name, precision in PRECISIONS.items() if not precision.simulated} == {
        "fp32", "fp16", "bf16", "w8a8", "w8a8-signed", "w8a8-tensor", "w8a8-signed-tensor", "w8", "w4",
        "w4-g64", "w4-g128",
    }  # fmt: skip
