from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, halve, insert_qdq, observe, simulate

Compute = Callable[[onnx.ModelProto, Tensor], tuple[NDArray[np.float32], Counter[str]]]


def casts(graph: Graph) -> list[tuple[str, str]]:
    return [(o.inputs[0], o.name) for o in graph.operators if o.kind == "Cast"]


@pytest.mark.parametrize(("name", "error"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_a_halved_network_is_near_the_whole_one(
    graph: Graph, images: Tensor, name: str, error: float
) -> None:
    exact = graph.run(images)
    halved = halve(graph, QuantPolicy((("", name),))).run(images)
    assert halved.dtype == torch.float32
    assert 1e-5 < float((halved - exact).abs().max() / exact.abs().max()) < error


def test_the_file_computes_what_the_halved_network_computes(
    graph: Graph, images: Tensor, compute_file: Compute
) -> None:
    halved = halve(graph, QuantPolicy((("", "fp16"),)))
    model = to_onnx(halved, dynamic_batch=True)
    got, _ = compute_file(model, images)
    expected = halved.run(images).numpy()
    assert got.dtype == np.float32
    # Where it has no kernel for halves the runtime computes in 32 bits, and rounds less often.
    assert np.abs(expected - got).max() < 5e-3 * np.abs(expected).max()
    assert model.ByteSize() < 0.65 * to_onnx(graph, dynamic_batch=True).ByteSize()


def test_casts_stand_at_the_borders_of_a_region_only(graph: Graph) -> None:
    assert casts(halve(graph, QuantPolicy((("", "fp16"),)))) == [
        ("images", "images.float16"),
        ("logits.float16", "logits"),
    ]
    # `pool` gives what both the block's convolution and its residual connection read.
    assert casts(halve(graph, QuantPolicy((("a", "fp16"),)))) == [
        ("pool/MaxPool", "pool/MaxPool.float16"),
        ("a.act2/Relu", "a.act2/Relu.float32"),
    ]


def test_a_graph_without_numbers_is_halved_too() -> None:
    with torch.device("meta"):
        network, image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), torch.empty(1, 3, 8, 8)
        graph = trace(network, resolution=8, image=image)
    halved = halve(graph, QuantPolicy((("0", "fp16"),)))
    assert [operator.constant().dtype for operator in halved.operators if operator.weight is not None] == [
        torch.float16
    ]
    assert len(casts(halved)) == 2


def test_two_kinds_of_halves_may_meet(graph: Graph, images: Tensor) -> None:
    halved = halve(graph, QuantPolicy((("a", "fp16"), ("b", "bf16"))))
    assert ("a.act2/Relu", "a.act2/Relu.bfloat16") in casts(halved)
    assert halved.run(images).dtype == torch.float32


def test_halves_and_integers_share_a_file(graph: Graph, images: Tensor, compute_file: Compute) -> None:
    policy = QuantPolicy(
        (("a", "w8a8"), ("b", "fp16"), ("gate", "fp16"), ("head", "w8a8"), ("classifier", "w4"))
    )
    halved = halve(graph, policy)
    ranges = observe(halved, policy, [images], reduce_range=True)
    got, kinds = compute_file(insert_qdq(to_onnx(halved, dynamic_batch=True), ranges), images)
    expected = simulate(halved, ranges).run(images).numpy()
    difference = np.abs(expected - got) / np.abs(expected).max()
    assert np.median(difference) < 5e-3
    assert (kinds["QLinearConv"], kinds["MatMulNBits"]) == (3, 1)


def test_a_network_without_halves_stays_what_it_is(graph: Graph) -> None:
    assert halve(graph, QuantPolicy((("", "w8a8"),))) is graph


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_numbers_in_attributes_get_the_type_of_what_they_meet(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU6(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    graph = halve(trace(network.eval(), resolution=5), QuantPolicy((("", name),)))
    onnx.checker.check_model(to_onnx(graph), full_check=True)


def test_padding_stays_padding_in_halves(compute_file: Compute) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 2), nn.Flatten()
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(-parameter.abs())  # only padding is as large as zero
    graph = halve(trace(network, resolution=3), QuantPolicy((("", "fp16"),)))
    images = torch.rand(2, 3, 3, 3)
    got, _ = compute_file(to_onnx(graph, dynamic_batch=True), images)
    assert np.abs(graph.run(images).numpy() - got).max() < 1e-3


def test_a_constant_that_halves_cannot_hold_is_refused() -> None:
    layer = nn.Linear(12, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    graph = trace(nn.Sequential(nn.Flatten(), layer).eval(), resolution=2)
    with pytest.raises(ValueError, match=r"logits has a constant of 1e\+05, which float16 cannot hold"):
        halve(graph, QuantPolicy((("", "fp16"),)))
    assert casts(halve(graph, QuantPolicy((("", "bf16"),))))


def test_the_cpu_provider_refuses_convolutions_in_bfloat16(
    graph: Graph, images: Tensor, compute_file: Compute
) -> None:
    model = to_onnx(halve(graph, QuantPolicy((("", "bf16"),))), dynamic_batch=True)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match="Conv"):
        compute_file(model, images)
