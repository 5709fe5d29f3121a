from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, insert_qdq, observe, simulate
from nestling.quant.regions import activation_formats, is_integer

ALL = QuantPolicy((("", "w8a8"),))


def integers(graph: Graph, policy: QuantPolicy = ALL) -> set[str]:
    """The tensors that pass through integers."""
    asked = [operator for operator in graph.operators if is_integer(operator, policy)]
    return set(activation_formats(graph, asked, policy))


class Trunk(nn.Module):
    """A residual sum of linear layers, normalized where it is read, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.narrow = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.first(images.mean(1))
        trunk = trunk + self.narrow(self.act(self.wide(self.norm(trunk))))
        result = self.head(self.norm(trunk).mean(1))
        assert isinstance(result, Tensor)
        return result


@pytest.fixture(scope="module")
def trunk() -> Graph:
    torch.manual_seed(0)
    return trace(Trunk().eval(), resolution=8)


def test_a_linear_layer_gives_floats_to_what_computes_in_floats(trunk: Graph) -> None:
    kinds = {operator.name: operator.kind for operator in trunk.operators}
    read = {name for operator in trunk.operators if operator.kind == "Gemm" for name in operator.inputs}
    quantized = integers(trunk)
    assert read <= quantized
    assert {kinds[name] for name in quantized if name in kinds} <= {
        "Gelu",
        "LayerNormalization",
        "Reshape",
        "ReduceMean",
    }


def test_the_runtime_has_no_rounding_between_a_linear_layer_and_floats(trunk: Graph, tmp_path: Path) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ranges = observe(trunk, ALL, [images], reduce_range=True)
    model = insert_qdq(to_onnx(trunk, dynamic_batch=True), ranges)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QGemm"] == 4
    assert kinds["QuantizeLinear"] == 4  # what each reads
    assert kinds["DequantizeLinear"] == 0
    [got] = session.run(None, {"images": images.numpy()})
    expected = simulate(trunk, ranges).run(images).numpy()
    assert np.median(np.abs(expected - got)) < 1e-5 * np.abs(expected).max()


def test_a_sum_of_convolutions_is_integers(graph: Graph) -> None:
    assert {"a.act2/Relu", "b.act2/Relu"} <= integers(graph)


def test_a_sum_is_floats_where_a_side_of_it_is(graph: Graph) -> None:
    policy = QuantPolicy(
        (("", "w8a8"), ("a.conv2", "fp32"), ("b", "fp32"), ("gate", "fp32"), ("wide", "fp32"))
    )
    assert "a.act2/Relu" not in integers(graph, policy)


def test_a_sum_with_what_a_convolution_reads_anyway_is_integers(graph: Graph) -> None:
    # `a` adds what the pooling gives, in floats of a float stem, which a.conv1 has rounded already.
    policy = QuantPolicy((("a", "w8a8"),))
    assert {"pool/MaxPool", "a.act2/Relu"} <= integers(graph, policy)


def test_swishes_of_an_efficientnet_stay_between_integers() -> None:
    network = timm.create_model("efficientnet_b0", num_classes=3).eval()
    graph = trace(network, resolution=32)
    floats = {o.name for o in graph.operators} - integers(graph)
    told = {o.kind for o in graph.operators if o.name in floats and o.name != graph.output}
    assert told <= {"Flatten"}
