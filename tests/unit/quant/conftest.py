from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, observe


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.act2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.conv2(self.act1(self.bn1(self.conv1(maps))))
        result = self.act2(inner + maps)
        assert isinstance(result, Tensor)
        return result


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.sigmoid = nn.Hardsigmoid()

    def forward(self, maps: Tensor) -> Tensor:
        result = maps * self.sigmoid(self.conv(maps.mean((2, 3), keepdim=True)))
        assert isinstance(result, Tensor)
        return result


@pytest.fixture(scope="session")
def graph() -> Graph:
    """Two residual blocks, a gate, a h-swish, pooling of both kinds; five classes, 12 px."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 16, 3, padding=1))
    network.add_module("act", nn.ReLU())
    network.add_module("pool", nn.MaxPool2d(2))
    network.add_module("a", Residual(16))
    network.add_module("b", Residual(16))
    network.add_module("gate", Gate(16))
    network.add_module("wide", nn.Conv2d(16, 32, 1))
    network.add_module("swish", nn.Hardswish())
    network.add_module("head", nn.Conv2d(32, 32, 1))
    network.add_module("mean", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(32, 5))
    return trace(network.eval(), resolution=12)


@pytest.fixture(scope="session")
def images() -> Tensor:
    """64 normalised images (64, 3, 12, 12) that differ in more than noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(64, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")


Computed = tuple[NDArray[np.float32], Counter[str]]


@pytest.fixture
def compute_file(tmp_path: Path) -> Callable[[onnx.ModelProto, Tensor], Computed]:
    """What ONNX Runtime computes from a model, checked first, and how often it uses each operator."""

    def compute(model: onnx.ModelProto, images: Tensor) -> Computed:
        onnx.checker.check_model(model, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "WeightBiasQuantization"
        )
        # Left off, on x86 every signed tensor that several nodes read makes floats of those.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        logits = np.asarray(session.run(None, {"images": images.numpy()})[0])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        return logits, Counter(node.op_type for node in nodes)

    return compute


@pytest.fixture(scope="session")
def uneven() -> Graph:
    """Convolutions, a depthwise and a grouped one, and linear layers, their channels of very unlike sizes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1),
        nn.LeakyReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.2)
            sizes = torch.exp(1.5 * torch.randn(len(layer.weight)))
            if layer is not network[-1]:
                layer.weight.data *= sizes.reshape(-1, *(1 for _ in layer.weight.shape[1:]))
                layer.bias.data *= sizes
    return trace(network.eval(), resolution=12)


@pytest.fixture(scope="session")
def coarse(uneven: Graph, images: Tensor) -> Mapping[str, Range]:
    """The ranges of `uneven` with 4 bits for weights."""
    return in_four_bits(observe(uneven, QuantPolicy((("", "w8a8"),)), [images]))


def in_four_bits(ranges: Mapping[str, Range]) -> dict[str, Range]:
    wider = {
        name: replace(found, scale=found.scale * 127 / 7)
        for name, found in ranges.items()
        if name.endswith((".weight", ".bias"))
    }
    narrow = {name: replace(found, dtype="int4") for name, found in wider.items() if name.endswith(".weight")}
    return {**ranges, **wider, **narrow}
