"""What a network's shape says before it has learned anything: entropy and effectiveness.

DeepMAD (Shen et al. 2023, arXiv 2303.02165) holds a convolution network to be an information system: its
entropy grows with the widths and the number of its layers, and the ratio of depth to width, its
effectiveness, says whether the information still comes through. Both are counted in milliseconds, without
numbers. They are priors, not measurements: a search keeps one only where it helps to predict what was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nestling.models.cost import on_meta

LAST_STAGE = 8.0
"""Weight of the last stage's entropy; that of all others is 1."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A network's convolutions in the order in which they run.

    Attributes:
        fan_in: numbers that each output number is made of.
        channels: of each output.
        side: rows of each output.
    """

    fan_in: tuple[int, ...]
    channels: tuple[int, ...]
    side: tuple[int, ...]

    @property
    def entropy(self) -> float:
        """DeepMAD's score: stage by stage, the logarithm of the map's size times that of the widths so far.

        A stage is what has maps of one size. The penalty on stages of uneven depth is left out.
        """
        total, widths = 0.0, 0.0
        for place, (fan_in, channels, side) in enumerate(
            zip(self.fan_in, self.channels, self.side, strict=True)
        ):
            widths += 0.5 * math.log(fan_in)
            is_last = place + 1 == len(self.side)
            if is_last or self.side[place + 1] != side:
                weight = LAST_STAGE if is_last else 1.0
                total += weight * (math.log(channels) + 2.0 * math.log(side)) * widths
        return total

    @property
    def effectiveness(self) -> float:
        """Layers over the geometric mean of their widths; DeepMAD keeps it below 0.3 to 0.5."""
        count = len(self.fan_in)
        return count / math.exp(sum(map(math.log, self.fan_in)) / count)


def shape(network: nn.Module, resolution: int) -> Shape:
    """The convolutions that one `resolution` x `resolution` colour image goes through.

    The network may be on the meta device; nothing is computed.

    Raises:
        ValueError: the network has no convolution that runs.
    """
    found: list[tuple[int, int, int]] = []
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), _listening(network, found):
            image = torch.empty(1, 3, resolution, resolution, device="meta")
            torch.func.functional_call(network, on_meta(network), (image,), tie_weights=False)
    finally:
        network.train(training)
    if not found:
        raise ValueError(f"{type(network).__name__} runs no convolution; there is no shape to judge")
    fan_in, channels, side = zip(*found, strict=True)
    return Shape(fan_in, channels, side)


@contextmanager
def _listening(network: nn.Module, found: list[tuple[int, int, int]]) -> Iterator[None]:
    """Notes fan-in, channels and side of each convolution that runs."""
    hooks = [
        layer.register_forward_hook(partial(_note, found))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note(found: list[tuple[int, int, int]], layer: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
    assert isinstance(layer, nn.Conv2d)
    found.append((math.prod(layer.weight.shape[1:]), out.shape[1], out.shape[-1]))
