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
from nestling.quant import QuantPolicy, Unquantizable, insert_qdq, observe, simulate
from nestling.quant.layers import layers
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


def forked(first: str, second: str, *, stem: str = "w8a8") -> tuple[Graph, QuantPolicy]:
    """Two convolutions that read what a third one wrote, through a pooling; and their precisions."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.pool(self.stem(images).relu())
            logits: Tensor = (self.first(maps) + self.second(maps)).flatten(1)
            return logits

    torch.manual_seed(0)
    rules = (("stem", stem), ("first", first), ("second", second))
    return trace(Forked().eval(), resolution=8), QuantPolicy(rules)


@pytest.mark.parametrize("readers", [("w8a8", "w4a4"), ("w4a4", "w8a8")])
def test_of_the_readers_of_a_tensor_the_one_of_fewest_bits_decides(readers: tuple[str, str]) -> None:
    graph, policy = forked(*readers)
    ranges = observe(graph, policy, [torch.rand(4, 3, 8, 8)])
    read = next(operator.inputs[0] for operator in graph.operators if operator.layer == "first")
    assert (ranges[read].dtype, ranges[graph.input].dtype) == ("uint4", "uint8")
    told = {layer.name: layer.activation_bits for layer in layers(graph, policy)}
    assert told == {"stem": 8, "first": 4, "second": 4}
    images = torch.rand(4, 3, 8, 8)
    maps = simulate(graph, ranges).held(images, frozenset({read}))[read]
    assert len(set(maps.flatten().tolist())) <= 16


def test_the_writer_of_a_tensor_decides_where_none_reads_it_on_integers() -> None:
    graph, policy = forked("fp32", "fp32", stem="w4a4")
    ranges = observe(graph, policy, [torch.rand(4, 3, 8, 8)])
    written = [name for name in ranges if name in graph.shapes and name != graph.input]
    assert [ranges[name].dtype for name in written] == ["uint4"]


def test_a_layer_between_signed_and_unsigned_integers_is_refused() -> None:
    graph, policy = forked("w8a8-signed", "w8a8-signed")
    with pytest.raises(Unquantizable, match=r"stem \(w8a8\) would be between signed integers, .* unsigned"):
        observe(graph, policy, [torch.rand(4, 3, 8, 8)])
    apart, floats = forked("w8a8-signed", "w8a8-signed", stem="fp32")
    assert observe(apart, floats, [torch.rand(4, 3, 8, 8)])
