"""TrainStream: what training asks of the images it learns from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from nestling.data.batch import Batch


class TrainStream(Protocol):
    """Training batches whose content depends on the step alone, so that a run resumes where it stopped."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        """Batches without end, from that of `start_step` on."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make an epoch."""
        ...
