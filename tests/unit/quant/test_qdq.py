from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, insert_qdq, observe, simulate, with_integers

ALL = QuantPolicy((("", "w8a8"),))


def run_onnx(model: onnx.ModelProto, images: Tensor, *, optimized: Path | None = None) -> NDArray[np.float32]:
    """The logits that ONNX Runtime computes; the graph that it makes of the model goes to `optimized`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Left on, this one quantizes layers that the policy leaves in float.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"images": images.numpy()})[0])


def quantized(graph: Graph, policy: QuantPolicy, images: Tensor) -> tuple[onnx.ModelProto, dict[str, Range]]:
    ranges = dict(observe(graph, policy, [images], reduce_range=True))
    return insert_qdq(to_onnx(graph, dynamic_batch=True), ranges), ranges


def test_the_file_computes_what_the_simulation_computes(graph: Graph, images: Tensor) -> None:
    model, ranges = quantized(graph, ALL, images)
    onnx.checker.check_model(model, full_check=True)
    expected = simulate(graph, ranges).run(images).numpy()
    got = run_onnx(model, images)
    difference = np.abs(expected - got) / np.abs(expected).max()
    assert np.median(difference) < 1e-5
    assert difference.max() < 0.02  # somewhere a number lies halfway between two integers
    exact = graph.run(images).numpy()
    assert np.abs(exact - got).max() > np.median(np.abs(exact - got)) > 1e-4  # it is quantized


@pytest.mark.parametrize("precision", ["w8a8", "w8a8-signed", "w8a8-signed-tensor", "w4a8", "w8", "w4-g64"])
def test_constants_that_were_integers_before_give_the_same_file(
    precision: str, graph: Graph, images: Tensor
) -> None:
    model, ranges = quantized(graph, QuantPolicy((("", precision),)), images)
    early = insert_qdq(to_onnx(with_integers(graph, ranges), dynamic_batch=True), ranges)
    assert early.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "rules",
    [
        (("", "w8a8"),),
        (("", "w8a8"), ("a", "fp32"), ("gate", "fp32")),
        (("b", "w8a8"), ("head", "w8a8"), ("mean", "w8a8")),
        (("stem", "w8a8"), ("classifier", "w8a8")),
    ],
)
def test_exactly_the_layers_of_the_policy_run_on_integers(
    graph: Graph, images: Tensor, rules: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    policy = QuantPolicy(rules)
    model, ranges = quantized(graph, policy, images)
    got = run_onnx(model, images, optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = ("Conv", "Gemm", "Add", "Mul", "HardSigmoid", "GlobalAveragePool")
    computing = [operator for operator in graph.operators if operator.kind in kinds]
    on_integers = {operator.name for operator in computing if policy.precision(operator.layer).name == "w8a8"}
    # Where it changes a node's layout, the runtime appends _token_<number> to the name.
    integer_nodes = (node for node in nodes if node.op_type.startswith(("QLinear", "QGemm")))
    assert {node.name.split("_token_")[0] for node in integer_nodes} == on_integers
    in_float = Counter(operator.kind for operator in computing if operator.name not in on_integers)
    left = Counter(node.op_type.removeprefix("Fused") for node in nodes)
    assert {kind: left[kind] for kind in ("Conv", "Gemm")} == {
        kind: in_float[kind] for kind in ("Conv", "Gemm")
    }
    expected = simulate(graph, ranges).run(images).numpy()
    assert np.abs(expected - got).max() < 0.01 * np.abs(expected).max()


def test_no_rectifier_is_left_in_float_inside_a_quantized_network(
    graph: Graph, images: Tensor, tmp_path: Path
) -> None:
    run_onnx(quantized(graph, ALL, images)[0], images, optimized=tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert not {"Relu", "Clip", "Conv", "Add", "GlobalAveragePool", "MaxPool"} & kinds.keys()
    # The images, and h-swish that nobody has split.
    assert kinds["QuantizeLinear"] == 2
    assert kinds["DequantizeLinear"] == 1


def test_a_mobilenet_is_four_times_smaller_and_agrees_with_its_simulation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_100", num_classes=10).eval()
    graph = trace(network, resolution=32)
    coarse = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    model, ranges = quantized(graph, ALL, images)
    assert to_onnx(graph).ByteSize() / model.ByteSize() > 3.4
    expected = simulate(graph, ranges).run(images).numpy()
    got = run_onnx(model, images, optimized=tmp_path / "optimized.onnx")
    assert np.median(np.abs(expected - got)) < 0.01 * np.abs(expected).max()
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not {"Conv", "Clip", "Add", "Gemm", "DequantizeLinear"} & kinds


def test_a_clip_below_zero_is_left_to_the_runtime_between_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardtanh(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    )
    graph = trace(network.eval(), resolution=6)
    images = 3 * torch.randn(8, 3, 6, 6)
    model, ranges = quantized(graph, ALL, images)
    got = run_onnx(model, images, optimized=tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["Conv"]) == (2, 0)
    expected = simulate(graph, ranges).run(images).numpy()
    assert np.median(np.abs(expected - got)) < 1e-5


def test_constants_are_stored_as_integers(graph: Graph, images: Tensor) -> None:
    model, ranges = quantized(graph, ALL, images)
    stored = {constant.name: onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer}
    assert stored["head/Conv.weight.quantized"].dtype == np.int8
    assert stored["head/Conv.bias.quantized"].dtype == np.int32
    assert "head/Conv.weight" not in stored
    operator = next(operator for operator in graph.operators if operator.name == "head/Conv")
    integers = ranges["head/Conv.weight"].integers(operator.constant())
    assert np.array_equal(stored["head/Conv.weight.quantized"], integers.numpy())


def test_attention_computes_what_its_simulation_computes() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=10).eval()
    graph = trace(network, resolution=48)
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    model, ranges = quantized(graph, ALL, images)
    expected = simulate(graph, ranges).run(images).numpy()
    difference = np.abs(expected - run_onnx(model, images)) / np.abs(expected).max()
    # A number halfway between two integers that falls the other way changes one image; it must stay a few.
    assert np.median(difference) < 1e-5
    assert difference.max() < 0.2


def test_the_float_model_is_left_as_it_was(graph: Graph, images: Tensor) -> None:
    model = to_onnx(graph)
    before = model.SerializeToString(deterministic=True)
    insert_qdq(model, observe(graph, ALL, [images]))
    assert model.SerializeToString(deterministic=True) == before
    assert insert_qdq(model, {}) is model


@pytest.mark.parametrize("name", ["elsewhere/Conv", "logits"])
def test_a_range_that_has_no_place_is_refused(graph: Graph, name: str) -> None:
    stray = {name: Range(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), "uint8", None)}
    with pytest.raises(ValueError, match=name):
        insert_qdq(to_onnx(graph), stray)
