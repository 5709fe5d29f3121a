"""A network's own batch-normalization statistics, and its accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.data import Batch


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`correct` of `total` images classified right."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """The fraction classified right."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the fraction, by Wilson's score."""
        z, n, p = 1.96, self.total, self.top1
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def recalibrate(network: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """`network`, its batch-normalization statistics now the average over `images`; in place.

    Weights shared by many subnets have no statistics of their own; without this step a subnet's accuracy is
    near chance (Yu & Huang 2019, arXiv 1903.05134). Batches (N, 3, H, W) count alike, whatever their size.

    Raises:
        ValueError: no images.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    seen = False
    try:
        with torch.no_grad():
            for batch in images:
                network(batch)
                seen = True
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.eval()
    if not seen:
        raise ValueError("recalibration needs at least one batch of images")
    return network


def top1(network: nn.Module, batches: Iterable[Batch]) -> Accuracy:
    """The accuracy of `network`, in evaluation mode, on `batches`.

    Raises:
        ValueError: no images.
    """
    network.eval()
    correct = total = 0
    with torch.no_grad():
        for batch in batches:
            correct += int((network(batch.images).argmax(dim=1) == batch.labels).sum())
            total += len(batch.labels)
    if not total:
        raise ValueError("accuracy needs at least one image")
    return Accuracy(correct, total)
