"""Images: a numbered row of pictures, in memory or on disk, that says what it is called and what it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nestling.data.pixels import DataError, decode, fit

Indices = NDArray[np.int64]

_BLOCK = 256
_SMALL = 96
"""Below this side decoding spends its time in Python, where threads were measured to be slower than none."""


class Images(Protocol):
    """Pictures by number, all readable as RGB."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """The RGB picture number `index`; `DataError` where it is damaged."""
        ...

    def open_range(self, start: int, stop: int) -> Iterator[Image.Image]:
        """The RGB pictures from `start` up to `stop`, in order."""
        ...

    def select(self, indices: Indices) -> Images:
        """The pictures with these numbers, in this order."""
        ...

    def digest(self) -> str:
        """A hash of what these pictures are: of all pixels in memory, of names, sizes and samples on disk."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a program needs to read these pictures without Nestling, as plain arrays."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PixelArray:
    """Decoded square pictures in memory: `pixels` is `(N, S, S, 3)` uint8."""

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        """The picture number `index`."""
        return Image.fromarray(self.pixels[index])

    def open_range(self, start: int, stop: int) -> Iterator[Image.Image]:
        """The pictures from `start` up to `stop`, in order."""
        return (self.open(index) for index in range(start, stop))

    def select(self, indices: Indices) -> PixelArray:
        """The pictures with these numbers, in this order (a copy)."""
        return PixelArray(self.pixels[indices])

    def digest(self) -> str:
        """A hash of shape and pixels."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`images`: the pixels."""
        return {"images": self.pixels}


@dataclass(frozen=True, slots=True, eq=False)
class ImageFiles:
    """Pictures in files below `root`."""

    root: Path
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """The picture in file number `index`.

        Raises:
            DataError: the file is missing, unreadable, or not a sound picture.
        """
        path = self.paths[index]
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return decode(encoded, name=str(path))

    def open_range(self, start: int, stop: int) -> Iterator[Image.Image]:
        """The pictures from `start` up to `stop`, in order."""
        return (self.open(index) for index in range(start, stop))

    def select(self, indices: Indices) -> ImageFiles:
        """The pictures with these numbers, in this order."""
        return ImageFiles(self.root, tuple(self.paths[index] for index in indices))

    def digest(self) -> str:
        """A hash of the files' names below the root and their sizes; contents are not read."""
        lines = (f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`paths`: the files."""
        return {"paths": np.array([str(path.resolve()) for path in self.paths])}


def usual_side(images: Images, *, at_most: int = 224) -> int:
    """The median shorter side in px of a sample of 64 pictures, within [8, `at_most`]."""
    sample = np.unique(np.linspace(0, len(images) - 1, 64).astype(np.int64))
    sides = [min(images.open(int(index)).size) for index in sample]
    return int(min(max(np.median(sides), 8), at_most))


def fit_all(images: Images, side: int) -> NDArray[np.uint8]:
    """Every picture at `side`, its centre cropped: `(N, side, side, 3)` uint8.

    Raises:
        DataError: a damaged picture; the first one is named.
    """
    if isinstance(images, PixelArray) and images.pixels.shape[1] == side:
        return images.pixels
    fitted = np.empty((len(images), side, side, 3), np.uint8)

    def work(start: int) -> None:
        stop = min(start + _BLOCK, len(images))
        for index, image in zip(range(start, stop), images.open_range(start, stop), strict=True):
            fitted[index] = fit(image, side)

    starts = range(0, len(images), _BLOCK)
    if len(starts) < 2 or max(images.open(0).size) <= _SMALL:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(work, starts):
                pass
    return fitted
