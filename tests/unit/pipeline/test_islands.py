from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import trace
from nestling.pipeline.islands import FloatNode, float_islands
from nestling.pipeline.writing import write_file
from nestling.profile import Device, connect
from nestling.quant import Quantized, QuantPolicy, quantize

Islands = Callable[..., tuple[FloatNode, ...]]


class Between(nn.Module):
    """Two convolutions with an activation between them."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 4, 6)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.act(self.first(images)))
        return logits.flatten(1)


@pytest.fixture(scope="module")
def islands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Islands]:
    path = tmp_path_factory.mktemp("islands") / "model.onnx"
    with connect("ort:cpu") as device:
        yield lambda act, *rules: _islands(device, act, path, *rules)


def _islands(device: Device, act: nn.Module, path: Path, *rules: tuple[str, str]) -> tuple[FloatNode, ...]:
    torch.manual_seed(0)
    graph = trace(Between(act).eval(), resolution=8)
    quantized = quantize(graph, QuantPolicy(rules), [torch.randn(2, 3, 8, 8)])
    write_file(quantized, path)
    found = float_islands(device, path, quantized)
    assert found is not None
    return found


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid(), nn.Hardswish(), nn.Hardsigmoid()])
def test_a_chain_of_integers_has_no_island(act: nn.Module, islands: Islands) -> None:
    assert islands(act, ("", "w8a8")) == ()


def test_an_activation_without_integer_kernel_is_an_island_of_its_layer(islands: Islands) -> None:
    found = islands(nn.GELU(), ("", "w8a8"))
    assert [(node.op, node.layer) for node in found] == [("Gelu", "act")]


def test_a_layer_that_the_policy_leaves_in_floats_is_an_island(islands: Islands) -> None:
    middle = nn.Conv2d(8, 8, 1)
    found = islands(middle, ("", "w8a8"), ("act", "fp32"))
    assert {node.layer for node in found if node.op.endswith("Conv")} == {"act"}
    assert any(node.why == "its weight is not quantized in the file" for node in found)


def test_of_a_graph_that_is_not_told_islands_are_not_known() -> None:
    untold = SimpleNamespace(optimized_ops=lambda _: None)
    graph = trace(Between(nn.ReLU()).eval(), resolution=8)
    quantized = quantize(graph, QuantPolicy((("", "w8a8"),)), [torch.randn(2, 3, 8, 8)])
    assert float_islands(cast(Device, untold), Path("model.onnx"), quantized) is None


def test_a_network_in_floats_has_no_island_whatever_the_device_tells() -> None:
    graph = trace(Between(nn.ReLU()).eval(), resolution=8)
    unasked = cast(Device, SimpleNamespace())
    assert float_islands(unasked, Path("model.onnx"), Quantized(graph, {})) == ()


def test_floats_before_the_first_integer_and_after_the_last_are_no_island(islands: Islands) -> None:
    assert islands(nn.Hardswish(), ("last", "w8a8")) == ()
    assert islands(nn.Hardswish()) == ()
