"""TrainImages: images to learn from, shuffled and augmented; step k is the same however one got there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nestling.data.augment import Augmentation, Rows, augmentation, crop_box, distort, erase, move
from nestling.data.batch import Batch
from nestling.data.eval_images import EvalImages
from nestling.data.images import Images, PixelArray
from nestling.data.kept import Kept
from nestling.data.pixels import DataError, derive_seed, fit
from nestling.data.splits import Few, Indices, balanced

_Raw = tuple[Tensor, Tensor]
"""uint8 images `(N, 3, S, S)` and their labels."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainImages:
    """Images to learn from.

    The order of epoch e is a function of (seed, e); what chance does to a batch is one of (seed, step), and
    to the crop of a picture on disk of (seed, e, its number). So a stream that starts at step k gives exactly
    what an uninterrupted one gives from there, whatever the number of workers.

    Attributes:
        labels: `(N,)` int64.
        size: the side in px of the images in a batch.
        workers: loader processes, for images on disk; 0 reads in this process.
        part: which part of each batch is given, counted from 0, and of how many.
        few: which classes `calibration` has where it gives fewer images than there are classes.
        kept: resized images of calibration, shared with whoever else has it.
    """

    images: Images = field(repr=False)
    labels: Indices = field(repr=False)
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    workers: int
    part: tuple[int, int] = (0, 1)
    few: Few = "drawn"
    kept: Kept = field(default_factory=Kept, repr=False)

    def divided(self, part: int, *, of: int) -> TrainImages:
        """These images, of whose batches part number `part` of `of` is given: the others' are not even read.

        The parts of a batch put together are, to the last bit, the whole one. `batch_size` stays that of
        the whole.

        Raises:
            DataError: `part` is not in [0, `of`).
        """
        if not 0 <= part < of:
            raise DataError(f"part {part} of {of} of a batch; parts are counted from 0")
        return replace(self, part=(part, of))

    def __len__(self) -> int:
        return len(self.labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch, at least 1; the rest of a shuffled epoch is left out.

        Raises:
            DataError: `batch_size` below 1.
        """
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        return max(1, len(self) // batch_size)

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """Batches from step `start_step` on, without end, on `device`.

        A batch has `batch_size` images, or all where there are fewer, or its `part` of them.

        Raises:
            DataError: a damaged image (on disk only), no such augmentation, or a bad step or batch size.
        """
        if start_step < 0:
            raise DataError(f"start_step must be at least 0, not {start_step}")
        change = augmentation(augment)
        per_epoch = self.steps_per_epoch(batch_size)
        whole, (part, parts) = min(batch_size, len(self)), self.part
        if whole < parts:
            raise DataError(
                f"a batch of {whole} images cannot be divided by {parts}; use a larger batch_size"
            )
        rows = slice(whole * part // parts, whole * (part + 1) // parts)
        order = _Order(len(self), self.seed, batch_size, per_epoch, start_step, rows)
        return self._stream(order, change, torch.device(device))

    def _stream(self, order: _Order, change: Augmentation, device: torch.device) -> Iterator[Batch]:
        in_memory = isinstance(self.images, PixelArray)
        raw = self._from_memory(order, device) if in_memory else self._from_disk(order, change, device)
        mean = torch.tensor(self.mean, device=device).view(3, 1, 1)
        std = torch.tensor(self.std, device=device).view(3, 1, 1)
        rows = Rows(order.rows.start, min(order.batch_size, len(self)))
        for step, (pixels, labels) in enumerate(raw, start=order.start_step):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", step))
            shift = change.shift if in_memory else 0.0
            if shift or change.mirror:
                pixels = move(pixels, shift=shift, mirror=change.mirror, generator=generator, rows_of=rows)
            if change.distort:
                pixels = distort(pixels, generator=generator, magnitude=change.magnitude, rows_of=rows)
            images = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
            if change.erase:
                images = erase(images, probability=change.erase, generator=generator, rows_of=rows)
            yield Batch(images=images, labels=labels)

    def calibration(self, count: int) -> EvalImages:
        """`count` training images without augmentation, as many of one class as of another; always the same.

        Raises:
            DataError: fewer images than that, or `count` below 1.
        """
        if not 1 <= count <= len(self):
            raise DataError(f"{count} training images asked for; ask for 1 to {len(self)}")
        rng = np.random.default_rng(derive_seed(self.seed, "calibration"))
        chosen = balanced(self.labels, count, rng=rng, few=self.few)
        images, labels = self.images.select(chosen), self.labels[chosen]
        return EvalImages(images, labels, self.classes, self.mean, self.std, self.kept)

    def _from_memory(self, order: _Order, device: torch.device) -> Iterator[_Raw]:
        assert isinstance(self.images, PixelArray)
        pixels = torch.from_numpy(self.images.pixels)
        labels = torch.from_numpy(self.labels)
        if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            pixels, labels = pixels.to(device), labels.to(device)
        for batch in order:
            chosen = torch.tensor([index for _, index in batch], device=pixels.device)
            images = pixels[chosen].permute(0, 3, 1, 2).contiguous()
            yield images.to(device), labels[chosen].to(device)

    def _from_disk(self, order: _Order, change: Augmentation, device: torch.device) -> Iterator[_Raw]:
        crops = _RandomCrops(self.images, self.labels, self.size, change.crop_area, self.seed)
        loader: DataLoader[tuple[Tensor, int] | DataError] = DataLoader(
            crops,
            batch_sampler=order,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # otherwise it draws from the global one, which dropout reads
        )
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            images, labels = loaded
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Order(Sampler[list[tuple[int, int]]]):
    """Step after step without end: the (epoch, image number) of each image in the batch."""

    count: int
    seed: int
    batch_size: int
    steps_per_epoch: int
    start_step: int
    rows: slice
    """Those images of a batch that are given."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done = divmod(self.start_step, self.steps_per_epoch)
        while True:
            order = np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(self.count)
            for step in range(done, self.steps_per_epoch):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield [(epoch, index) for index in chosen[self.rows].tolist()]
            epoch, done = epoch + 1, 0


@dataclass(frozen=True, slots=True)
class _RandomCrops(Dataset[tuple[torch.Tensor, int] | DataError]):
    """Pictures from disk, each a random crop; runs in the loader's processes."""

    images: Images
    labels: Indices
    size: int
    crop_area: float
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        epoch, index = key
        try:
            image = self.images.open(index)
        except DataError as error:
            return error  # raised here, in a worker, it would come back as a page of traceback
        if self.crop_area < 1.0:
            rng = np.random.default_rng(derive_seed(self.seed, "crop", epoch, index))
            box = crop_box(image.width, image.height, area=self.crop_area, rng=rng)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(fit(image, self.size).copy())
        return pixels.permute(2, 0, 1), int(self.labels[index])


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> _Raw | DataError:
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels)


def _ignore_interrupt(_worker: int) -> None:
    """Ctrl-C is the main process's to answer; a worker would only add its traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
