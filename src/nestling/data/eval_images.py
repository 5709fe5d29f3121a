"""EvalImages: images to score by, plain, the same to the bit wherever PIL and numpy are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nestling.data.batch import Batch
from nestling.data.images import Images, fit_all
from nestling.data.kept import Kept
from nestling.data.pixels import DataError, normalise
from nestling.data.splits import Indices, balanced


@dataclass(frozen=True, eq=False)
class EvalImages:
    """Images without augmentation, in a fixed order.

    Attributes:
        labels: `(N,)` int64.
        mean: per channel, as a fraction of 255; so is `std`.
        kept: resized images, shared with whoever else has it.
    """

    images: Images = field(repr=False)
    labels: Indices = field(repr=False)
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kept: Kept = field(default_factory=Kept, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name these images, their order, labels and normalisation."""
        what = repr((self.images.digest(), self.labels.tolist(), self.classes, self.mean, self.std))
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def at(self, resolution: int, *, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All images once, in order, at `resolution`; the last batch may be smaller.

        Normalised on the CPU, then moved to `device`: the numbers are the same on every device.

        Raises:
            DataError: a damaged image (on disk only), or a resolution or batch size below 1.
        """
        _at_least_one(resolution=resolution, batch_size=batch_size)
        return self._batches(resolution, batch_size, torch.device(device))

    def _batches(self, resolution: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
        whole = self.kept.fitted(self.images, resolution, whose=self)
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            if whole is None:
                pixels = fit_all(self.images.select(np.arange(start, stop)), resolution)
            else:
                pixels = whole[start:stop]
            images = torch.from_numpy(normalise(pixels, mean=self.mean, std=self.std))
            labels = torch.from_numpy(self.labels[start:stop].copy())
            yield Batch(images=images.to(device), labels=labels.to(device))

    def array(self, resolution: int) -> NDArray[np.float32]:
        """All images as `(N, 3, resolution, resolution)` float32, normalised: what an ONNX file is fed.

        Raises:
            DataError: a damaged image (on disk only), or a resolution below 1.
        """
        _at_least_one(resolution=resolution)
        whole = self.kept.fitted(self.images, resolution, whose=self)
        pixels = fit_all(self.images, resolution) if whole is None else whole
        return normalise(pixels, mean=self.mean, std=self.std)

    def take(self, count: int) -> EvalImages:
        """The first `count` images when classes take turns: as many of one class as of another.

        A smaller `take` is the beginning of a larger one where both hold every class. One that is too small
        for that holds classes that were drawn, always the same.

        Raises:
            DataError: fewer images than that, or `count` below 1.
        """
        _at_least_one(count=count)
        if count > len(self):
            raise DataError(f"{count} images asked for, there are {len(self)}; ask for at most that many")
        chosen = balanced(self.labels, count)
        return self._part(chosen)

    def portions(self, ends: Sequence[int], *, seed: int) -> tuple[EvalImages, ...]:
        """All images in random order, cut after each of `ends`; the same for the same seed.

        Raises:
            DataError: `ends` do not rise, or the last is not the number of images.
        """
        if list(ends) != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] != len(self):
            raise DataError(f"portions end after {list(ends)} images; they must rise, from 1 to {len(self)}")
        order = np.random.default_rng(seed).permutation(len(self))
        parts = np.split(order, list(ends)[:-1])
        return tuple(map(self._part, parts))

    def preprocessing(self, resolution: int) -> dict[str, str]:
        """The steps from a picture to the network's input, in words and numbers, for a file's metadata."""
        return {
            "color": "RGB",
            "resize": f"shorter side to {resolution}, the longer in proportion, rounded down; PIL bicubic; "
            "left out where the shorter side has that size",
            "crop": f"centre {resolution} x {resolution}, offsets rounded down",
            "scale": "divide by 255, subtract mean, divide by std, in float32",
            "mean": ",".join(map(str, self.mean)),
            "std": ",".join(map(str, self.std)),
            "layout": "NCHW",
        }

    def save_split(self, path: Path) -> None:
        """Writes an `.npz` that numpy and PIL can score by, atomically: no pickled objects.

        It holds `labels`, `classes`, `mean`, `std`, and the pictures: `images` (N, S, S, 3) uint8 where they
        are in memory, `paths` where they are files, or `encoded` bytes, the i-th `offsets[i]:offsets[i + 1]`.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    allow_pickle=False,
                    labels=self.labels,
                    classes=np.array(self.classes),
                    mean=np.array(self.mean),
                    std=np.array(self.std),
                    **self.images.arrays(),
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _part(self, chosen: Indices) -> EvalImages:
        images, labels = self.images.select(chosen), self.labels[chosen]
        return EvalImages(images, labels, self.classes, self.mean, self.std, self.kept)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"{name} must be at least 1, not {number}")
