"""Images divided among ranks: each has its part of the same batches, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from nestling.data import Batch, TrainStream
from nestling.train.distributed import Ranks, RanksError
from nestling.train.evaluate import recalibrate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartOfStream:
    """A rank's part of each batch of `stream`.

    `batch_size` stays that of all ranks together: epochs, the learning rate and the order of the images do
    not depend on the number of ranks, and a run may go on with another number. Every rank makes the whole
    batch, so that augmentation too is the same to the last bit, and moves its own part alone to its device:
    for streams that cannot make a part on their own.
    """

    stream: TrainStream
    ranks: Ranks

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        """This rank's part of the batches from step `start_step` on, without end, on `device`.

        Raises:
            RanksError: a batch has fewer images than there are ranks.
        """
        alone = self.ranks.world == 1
        whole = self.stream.batches(
            start_step=start_step, batch_size=batch_size, augment=augment, device=device if alone else "cpu"
        )
        return whole if alone else self._parts(whole, device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of all ranks together in an epoch."""
        return self.stream.steps_per_epoch(batch_size)

    def _parts(self, whole: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
        for batch in whole:
            mine = rows_of(len(batch.labels), self.ranks)
            yield Batch(batch.images[mine].to(device), batch.labels[mine].to(device))


def rows_of(count: int, ranks: Ranks) -> slice:
    """Which of `count` images are this rank's: parts in order, one image larger at most than another.

    Raises:
        RanksError: fewer images than ranks.
    """
    if count < ranks.world:
        raise RanksError(f"a batch of {count} images for {ranks.world} ranks; use a larger batch_size")
    return slice(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


def recalibrate_together(network: nn.Module, images: Iterable[Tensor], *, ranks: Ranks) -> nn.Module:
    """What `recalibrate` makes of all `images`, to which each rank contributes every `world`-th batch.

    The statistics are averages over batches that do not depend on one another, so the ranks' averages,
    weighted by their numbers of batches, are the average over all, up to rounding. `images` are the same on
    every rank.

    Raises:
        ValueError: no images.
        RanksError: another rank is gone.
    """
    if ranks.world == 1:
        return recalibrate(network, images)
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]
    statistics = [t for layer in layers for t in (layer.running_mean, layer.running_var) if t is not None]
    count = 0

    def counted(batches: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal count
        for count, batch in enumerate(batches, start=1):  # noqa: B007 - read when all are through
            yield batch

    mine = _some(islice(images, ranks.rank, None, ranks.world))
    if mine is not None:
        recalibrate(network, counted(mine))
    weighted = [tensor.double().flatten() * count for tensor in statistics]
    told = torch.tensor([float(count)], dtype=torch.float64, device=ranks.device)
    summed = ranks.sum(torch.cat([*(w.to(ranks.device) for w in weighted), told]))
    batches = int(summed[-1])
    if not batches:
        raise ValueError("recalibration needs at least one batch of images")
    pieces = torch.split(summed[:-1], [tensor.numel() for tensor in statistics])
    for tensor, piece in zip(statistics, pieces, strict=True):
        tensor.copy_((piece / batches).view(tensor.shape))
    for layer in layers:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)
    return network.eval()


def _some(items: Iterator[T]) -> Iterator[T] | None:
    """`items`, or None where there are none."""
    for item in items:
        return chain([item], items)
    return None
