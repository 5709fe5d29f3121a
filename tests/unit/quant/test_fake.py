from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.models.operators import Attribute, Operator
from nestling.quant import QuantPolicy, Range, insert_qdq, observe, quantize, simulate

Compute = Callable[[onnx.ModelProto, Tensor], tuple[NDArray[np.float32], Counter[str]]]
ALL = QuantPolicy((("", "w8a8"),))


def test_a_convolution_is_simulated_as_integers_compute_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()).eval()
    graph = trace(network, resolution=5)
    images = torch.randn(8, 3, 5, 5)
    ranges = observe(graph, ALL, [images])
    got = simulate(graph, ranges).held(images, frozenset({"1/Relu"}))["1/Relu"].numpy()

    def stored(name: str, tensor: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        assert tensor is not None
        found = ranges[name]
        return found.integers(tensor).numpy().astype(np.int64)

    convolution = graph.operators[0]
    read, written = ranges["images"], ranges["1/Relu"]
    pixels = stored("images", images) - int(read.zero_point)
    kernel = stored("0/Conv.weight", convolution.weight)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, kernel)
    sums += stored("0/Conv.bias", convolution.bias)[None, :, None, None]
    factor = (ranges["0/Conv.weight"].scale * read.scale / written.scale).numpy()[None, :, None, None]
    expected = np.clip(np.rint(sums.astype(np.float32) * factor), 0, 255)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "precision",
    ["w8a8", "w8a8-signed", "w8a8-tensor", "w8a8-signed-tensor", "w4a8", "w4a4", "w3a3", "ternary"],
)
def test_a_network_is_simulated_to_the_last_bit(
    graph: Graph, images: Tensor, precision: str, compute_file: Compute
) -> None:
    policy = QuantPolicy((("", precision),))
    quantized = quantize(graph, policy, [images], reduce_range=True)
    model = insert_qdq(to_onnx(quantized.graph, dynamic_batch=True), quantized.ranges)
    got, kinds = compute_file(model, images)
    expected = simulate(quantized.graph, quantized.ranges).run(images)
    wrong = (torch.from_numpy(got) != expected).any(1)
    if kinds["Conv"] + kinds["FusedConv"] + kinds["HardSigmoid"]:  # floats between integers, see below
        assert wrong.float().mean() <= 0.05
    else:
        assert not wrong.any()


def test_floats_between_integers_are_simulated_but_for_their_last_bit(
    graph: Graph, images: Tensor, compute_file: Compute
) -> None:
    """Where rounding to integers follows, one of a million numbers takes a step with its last bit."""
    policy = QuantPolicy((("", "w8a8"), ("a.conv2", "fp32"), ("wide", "w8"), ("gate", "fp32")))
    quantized = quantize(graph, policy, [images], reduce_range=True)
    model = insert_qdq(to_onnx(quantized.graph, dynamic_batch=True), quantized.ranges)
    got, _ = compute_file(model, images)
    expected = simulate(quantized.graph, quantized.ranges).run(images).numpy()
    assert (np.abs(got - expected) > 1e-6 * np.abs(expected).max()).any(1).mean() <= 0.05


@pytest.mark.parametrize("kind", ["Sigmoid", "LeakyRelu", "MaxPool", "Concat"])
@pytest.mark.parametrize("scale", [0.02, 0.0625])
def test_operators_of_one_byte_are_simulated_to_the_last_bit(
    kind: str, scale: float, compute_file: Compute
) -> None:
    """Every byte through the runtime's tables: floats, divided by the scale."""
    settings: dict[str, dict[str, Attribute]] = {
        "LeakyRelu": {"alpha": 0.1},
        "MaxPool": {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1,) * 4, "ceil_mode": 0},
        "Concat": {"axis": 1},
    }
    shapes: dict[str, tuple[int, ...]] = {"images": (1, 3, 10, 10)}
    operators = []
    inputs: tuple[str, ...] = ("images",)
    if kind == "Concat":
        operators.append(Operator("Relu", "relu", inputs, ""))
        shapes["relu"] = shapes["images"]
        inputs = ("images", "relu")
    operators.append(Operator(kind, "y", inputs, "", settings.get(kind, {})))
    operators.append(Operator("Flatten", "logits", ("y",), "", {"axis": 1}))
    shapes |= {"y": (1, 3 * len(inputs), 10, 10), "logits": (1, 300 * len(inputs))}
    graph = Graph(tuple(operators), "images", "logits", shapes, 10)
    zeros = torch.tensor(100, dtype=torch.int32), torch.tensor(3, dtype=torch.int32)
    read = Range(torch.tensor(0.0625), zeros[0], "uint8", None)
    written = read if kind == "MaxPool" else Range(torch.tensor(scale), zeros[1], "uint8", None)
    ranges = {name: read for name in shapes if name != "logits"} | {"y": written}
    images = read.numbers(torch.arange(300).remainder(256).float().reshape(1, 3, 10, 10) - 100)
    got, _ = compute_file(insert_qdq(to_onnx(graph), ranges), images)
    assert np.array_equal(simulate(graph, ranges).run(images).numpy(), got)


@pytest.mark.parametrize(
    ("scale", "zero_point", "most", "on_integers"),
    [
        (6 / 255, 0, 6.0, True),
        (6 / 255 * 1.0019, 0, 6.0, True),  # 6, rounded, is byte 255
        (6 / 255 * 1.002, 0, 6.0, False),  # 254
        (0.01, 1, 6.0, False),
        (0.01, 1, None, False),
        (0.01, 0, None, True),
    ],
)
def test_a_rectifier_vanishes_where_the_runtime_drops_it(
    scale: float, zero_point: int, most: float | None, on_integers: bool, compute_file: Compute
) -> None:
    torch.manual_seed(0)
    act = nn.ReLU() if most is None else nn.Hardtanh(0.0, most)
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), act, nn.Conv2d(4, 2, 1), nn.Flatten()).eval()
    graph = trace(network, resolution=4)
    images = 9 * torch.randn(16, 3, 4, 4)
    ranges = dict(observe(graph, ALL, [images], reduce_range=True))
    conv, rectifier = graph.operators[:2]
    zero = torch.tensor(zero_point, dtype=torch.int32)
    ranges[rectifier.name] = Range(torch.tensor(scale), zero, "uint8", None)
    last = f"{graph.operators[2].name}.bias"
    ranges[last] = replace(
        ranges[last], scale=ranges[last.replace("bias", "weight")].scale * torch.tensor(scale)
    )
    got, kinds = compute_file(insert_qdq(to_onnx(graph, dynamic_batch=True), ranges), images)
    assert kinds["QLinearConv"] == on_integers + 1
    simulation = simulate(graph, ranges)
    assert (conv.name in {action.output for action in simulation.actions}) != on_integers
    assert np.allclose(simulation.run(images).numpy(), got, rtol=0, atol=1e-5 * float(np.abs(got).max()))


def test_images_of_another_size_are_refused(graph: Graph, images: Tensor) -> None:
    simulation = simulate(graph, observe(graph, ALL, [images]))
    with pytest.raises(ValueError, match=r"takes images \(N, 3, 12, 12\), not \(64, 3, 11, 12\)"):
        simulation.run(images[:, :, 1:])


def test_a_simulation_is_near_the_floats_it_stands_for(graph: Graph, images: Tensor) -> None:
    exact = graph.run(images)
    simulated = simulate(graph, observe(graph, ALL, [images])).run(images)
    error = float((simulated - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.05


def test_fewer_layers_in_eight_bits_err_less(graph: Graph, images: Tensor) -> None:
    def error(policy: QuantPolicy) -> float:
        simulated = simulate(graph, observe(graph, policy, [images])).run(images)
        return float((simulated - graph.run(images)).abs().mean())

    assert error(QuantPolicy((("head", "w8a8"),))) < error(ALL)


def test_without_ranges_a_simulation_is_the_graph_in_the_runtimes_order(graph: Graph, images: Tensor) -> None:
    torch.testing.assert_close(simulate(graph, {}).run(images), graph.run(images), rtol=1e-5, atol=1e-6)


def test_simulating_leaves_the_graph_as_it_was(graph: Graph, images: Tensor) -> None:
    before = graph.run(images)
    simulate(graph, observe(graph, ALL, [images])).run(images)
    assert torch.equal(graph.run(images), before)


@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-30, 0.0])
def test_numbers_next_to_zero_are_zeros(size: float, compute_file: Compute) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    network.append(nn.Flatten()).append(nn.Linear(8, 3)).eval()
    with torch.no_grad():
        network.get_parameter("0.weight")[1] *= size  # of products with it no scale would be left
        network.get_parameter("0.bias")[1] = 0.0
        network.get_parameter("1.weight").mul_(size)  # nor of a whole tensor
        network.get_parameter("1.bias").fill_(size)
    graph, images = trace(network, resolution=4), torch.rand(8, 3, 4, 4)
    ranges = observe(graph, ALL, [images], reduce_range=True)
    expected = simulate(graph, ranges).run(images)
    got, _ = compute_file(insert_qdq(to_onnx(graph, dynamic_batch=True), ranges), images)
    wanted = graph.run(images)
    assert float((expected - wanted).abs().max()) < 0.01 * float(wanted.abs().max())
    assert torch.equal(torch.from_numpy(got), expected)


def test_a_range_of_another_graph_is_refused(graph: Graph) -> None:
    stray = {"elsewhere/Conv": Range(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), "uint8", None)}
    with pytest.raises(ValueError, match="elsewhere/Conv"):
        simulate(graph, stray)


@pytest.mark.parametrize(
    ("rules", "rounds"),
    [
        ((("", "w8a8"),), False),
        ((("classifier", "w8a8"),), True),
        ((("", "w8a8"), ("a.conv2", "fp32")), True),
        ((("stem", "w8a8"), ("act", "w8a8")), False),
    ],
    ids=["all", "last", "an island", "first"],
)
def test_a_simulation_tells_whether_computed_floats_become_integers(
    graph: Graph, images: Tensor, rules: tuple[tuple[str, str], ...], rounds: bool
) -> None:
    quantized = quantize(graph, QuantPolicy(rules), [images])

    assert simulate(quantized.graph, quantized.ranges).rounds_floats is rounds
