"""Batch: normalised images and their labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Some images, ready for a network, and what they show.

    `images` is `(N, 3, H, W)` float32, normalised; `labels` is `(N,)` int64; both are on the same device.
    """

    images: Tensor
    labels: Tensor
