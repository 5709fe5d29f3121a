"""Networks of one kind of operator each, by which a runtime is asked what it makes of a precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant.layers import kind_of


@dataclass(frozen=True, slots=True)
class Probe:
    """A network made of one kind of operator.

    What has no weights lies after a convolution, where a runtime finds integers.

    Attributes:
        kind: as `nestling.quant.layers` names it: `Conv`, `depthwise Conv`, or another ONNX operator type.
        build: the network for so many channels and so many of the operator, one after another.
        small: channels and resolution of the one whose result is compared.
        large: those of the one that is timed: a layer of a usual size.
        repeats: how many operators the timed one has.
        weighted: whether the operator has weights.
    """

    kind: str
    build: Callable[[int, int], nn.Module]
    small: tuple[int, int] = (3, 8)
    large: tuple[int, int] = (3, 128)
    repeats: int = 8
    weighted: bool = False

    def graph(self, *, timed: bool) -> Graph:
        """The graph of the timed or of the compared network; its weights are the same each time."""
        channels, resolution = self.large if timed else self.small
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.build(channels, self.repeats if timed else 1).eval()
        return trace(network, resolution=resolution, image=self.images(1, timed=timed))

    def images(self, count: int, *, timed: bool) -> Tensor:
        """Images (count, 3, R, R) for that network, from 0.5 to 1: so high that sums of products overflow."""
        _, resolution = self.large if timed else self.small
        generator = torch.Generator().manual_seed(count)
        return 0.5 + 0.5 * torch.rand((count, 3, resolution, resolution), generator=generator)

    def subjects(self, graph: Graph) -> frozenset[str]:
        """The names of the operators of `graph` that are of this kind."""
        return frozenset(operator.name for operator in graph.operators if kind_of(operator) == self.kind)


def _convolutions(channels: int, repeats: int) -> nn.Module:
    layers = [_high(nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1)) for i in range(repeats)]
    return nn.Sequential(*layers, nn.Flatten())


def _in_groups(inputs: Callable[[int], int]) -> Callable[[int, int], nn.Module]:
    """Convolutions of which each group reads `inputs(channels)` channels."""

    def build(channels: int, repeats: int) -> nn.Module:
        first, groups = _high(nn.Conv2d(3, channels, 1)), channels // inputs(channels)
        layers = (_high(nn.Conv2d(channels, channels, 3, padding=1, groups=groups)) for _ in range(repeats))
        return nn.Sequential(first, *layers, nn.Flatten())

    return build


def _pools(pool: Callable[[], nn.Module]) -> Callable[[int, int], nn.Module]:
    """Pooling after a convolution: there a runtime may keep channels last, for which its kernels differ."""
    return lambda channels, repeats: nn.Sequential(
        _high(nn.Conv2d(3, channels, 1)), *(pool() for _ in range(repeats)), nn.Flatten()
    )


class _Steps(nn.Module):
    """Calls `step(tensor, first)` some times, `first` being the result of `layer`, where it begins."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], *, repeats: int, layer: nn.Module) -> None:
        super().__init__()
        self.step, self.repeats, self.layer = step, repeats, layer

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = self.layer(images)
        tensor = first
        for _ in range(self.repeats):
            tensor = self.step(tensor, first)
        return tensor.flatten(1)


class _Linears(nn.Module):
    """Linear layers over the rows of the images."""

    def __init__(self, width: int, repeats: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_high(nn.Linear(width, width)) for _ in range(repeats)))

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.layers(images.flatten(1, 2))
        return rows.flatten(1)


def _high(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """`layer` with large weights of one sign in every other channel, whose sums saturate where any do."""
    with torch.no_grad():
        fan_in = layer.weight[0].numel()
        layer.weight[::2] = (0.8 + 0.2 * torch.rand_like(layer.weight[::2])) / fan_in
    return layer


def _steps(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int, int], nn.Module]:
    return lambda channels, repeats: _Steps(step, repeats=repeats, layer=_high(nn.Conv2d(3, channels, 1)))


def _products(_: int, repeats: int) -> nn.Module:
    return _Steps(lambda tensor, images: tensor @ images, repeats=repeats, layer=nn.Identity())


def _normalized(tensor: Tensor, _: Tensor) -> Tensor:
    return F.layer_norm(tensor, tensor.shape[-1:])


_PROBES = (
    Probe("Conv", _convolutions, small=(16, 8), large=(64, 28), repeats=3, weighted=True),
    Probe("depthwise Conv", _in_groups(lambda _: 1), (16, 8), (96, 28), repeats=4, weighted=True),
    # of ResNeXts and RegNets, which have 8 to 64 channels a group
    Probe("grouped Conv", _in_groups(lambda all: all // 8), (64, 8), (128, 28), repeats=3, weighted=True),
    Probe("Gemm", _Linears, small=(16, 16), large=(192, 192), repeats=2, weighted=True),
    Probe("MatMul", _products, large=(3, 96), repeats=3),
    Probe("Add", _steps(lambda tensor, first: tensor + first), (16, 8), (64, 56)),
    Probe("Mul", _steps(lambda tensor, first: tensor * first), (16, 8), (64, 56)),
    Probe("Concat", _steps(lambda tensor, first: torch.cat([tensor, first], 1)), (16, 8), (8, 64)),
    Probe("MaxPool", _pools(lambda: nn.MaxPool2d(3, 1, 1)), (16, 8), (64, 56), repeats=4),
    Probe("AveragePool", _pools(lambda: nn.AvgPool2d(2, 1)), (16, 8), (64, 56), repeats=4),
    Probe("GlobalAveragePool", _pools(lambda: nn.AdaptiveAvgPool2d(1)), (16, 8), (64, 112), repeats=1),
    Probe("Relu", _steps(lambda tensor, first: F.relu(tensor + first)), (16, 8), (64, 56)),
    Probe("Sigmoid", _steps(lambda tensor, _: torch.sigmoid(tensor)), (16, 8), (64, 56)),
    Probe("HardSigmoid", _steps(lambda tensor, _: F.hardsigmoid(tensor)), (16, 8), (64, 56)),
    Probe("HardSwish", _steps(lambda tensor, _: F.hardswish(tensor)), (16, 8), (64, 56)),
    Probe("Gelu", _steps(lambda tensor, _: F.gelu(tensor)), (16, 8), (64, 56)),
    Probe("Softmax", _steps(lambda tensor, _: F.softmax(tensor, dim=-1)), (16, 8), (64, 56)),
    Probe("LayerNormalization", _steps(_normalized), (16, 8), (64, 56)),
)

PROBES: Mapping[str, Probe] = MappingProxyType({probe.kind: probe for probe in _PROBES})
"""Every probe by the kind of its operator."""
WEIGHTED: tuple[str, ...] = tuple(probe.kind for probe in _PROBES if probe.weighted)
"""The kinds that have weights: what a precision is for."""
