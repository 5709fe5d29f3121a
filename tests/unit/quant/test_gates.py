from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, insert_qdq, observe, simulate, split_gates

ALL = QuantPolicy((("", "w8a8"),))


@pytest.fixture(scope="module")
def swishing() -> Graph:
    """A hard swish between two convolutions, a hard sigmoid after the second; 6 px."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Conv2d(8, 4, 1),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            network.get_parameter(name).mul_(6)  # or no number would come near the ends of a gate
    return trace(network.eval(), resolution=6)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return 2 * torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_split_graph_computes_the_same_but_for_a_part_of_a_step(swishing: Graph, pixels: Tensor) -> None:
    split = split_gates(swishing, ALL)
    assert "HardSwish" not in {operator.kind for operator in split.operators}
    wanted = swishing.run(pixels)
    assert float((split.run(pixels) - wanted).abs().max() / wanted.abs().max()) < 1e-3
    assert {operator.name for operator in split.operators} | {split.input} == set(split.shapes)


def test_what_stays_in_floats_is_left_whole(swishing: Graph) -> None:
    split = split_gates(swishing, QuantPolicy((("", "w8a8"), ("1", "fp32"), ("3", "fp32"))))
    assert split.operators == swishing.operators


def test_gates_are_sums_of_integers_and_agree_with_the_simulation(
    swishing: Graph, pixels: Tensor, tmp_path: Path
) -> None:
    split = split_gates(swishing, ALL)
    ranges = observe(split, ALL, [pixels], reduce_range=True)
    model = insert_qdq(to_onnx(split, dynamic_batch=True), ranges)
    onnx.checker.check_model(model, full_check=True)
    expected = simulate(split, ranges).run(pixels).numpy()
    scale = np.abs(expected).max()
    [by_definition] = ReferenceEvaluator(model).run(None, {"images": pixels.numpy()})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    [by_runtime] = session.run(None, {"images": pixels.numpy()})
    for got in (by_definition, by_runtime):
        difference = np.abs(got - expected) / scale
        assert np.median(difference) < 1e-5
        assert difference.max() < 0.03
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kinds["QLinearAdd"], kinds["QLinearMul"]) == (2, 1)
    assert not {"HardSigmoid", "HardSwish", "Mul", "Clip", "DequantizeLinear"} & kinds.keys()


def test_a_gate_of_floats_is_left_as_it_is(swishing: Graph, pixels: Tensor) -> None:
    policy = QuantPolicy((("4", "w8a8"),))
    split = split_gates(swishing, policy)
    model = insert_qdq(to_onnx(split), observe(split, policy, [pixels]))
    assert {"HardSwish", "HardSigmoid"} <= {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("gain", [1.0, 3.0, 7.0, 13.0, 25.0, 60.0])
def test_the_gate_of_zero_is_rounded_alike_whoever_computes_it(gain: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False), nn.Hardsigmoid(), nn.Conv2d(3, 2, 1), nn.Flatten()
    )
    network.append(nn.Linear(32, 3)).eval()
    images = gain * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images[:, :, ::2] = 0
    with torch.no_grad():
        network.get_parameter("0.weight").copy_(torch.eye(3)[:, :, None, None])
    graph = split_gates(trace(network, resolution=4), ALL)
    ranges = observe(graph, ALL, [images])
    model = insert_qdq(to_onnx(graph, dynamic_batch=True), ranges)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [by_runtime] = session.run(None, {"images": images.numpy()})
    [by_definition] = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    expected = simulate(graph, ranges).run(images).numpy()
    for got in (by_runtime, by_definition):
        assert np.median(np.abs(got - expected)) < 1e-5 * np.abs(expected).max()
