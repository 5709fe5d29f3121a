"""Random changes to a batch of images, drawn from a seed and computed where the images are.

Small random numbers are drawn on the CPU, whatever the device, so that a batch is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from nestling.data.pixels import DataError

_GROUPS = 32
_GROUP_SIZE = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Of which `whole` images some are those from the `first` on: what they draw does not depend on the rest.

    So the parts of a batch that several processes change are together what one process makes of it.
    """

    first: int
    whole: int

    def of(self, drawn: Tensor, count: int) -> Tensor:
        """The rows that `count` images have in what was `drawn` for all, (whole, ...)."""
        return drawn[self.first : self.first + count]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may happen to an image.

    Attributes:
        shift: the farthest move, as a fraction of the side (images in memory).
        crop_area: the smallest part of the area that a random crop keeps (on disk, instead of `shift`).
        mirror: whether left and right may change places.
        distort: whether TrivialAugment (Müller and Hutter, 2021, arXiv:2103.10158) changes shape or colour.
        magnitude: of 10, that of RandAugment (Cubuk et al., 2019, arXiv:1909.13719), two changes an image, in
            place of TrivialAugment; None: TrivialAugment.
        erase: how often a rectangle is erased (Zhong et al., 2017, arXiv:1708.04896).
    """

    shift: float = 0.0
    crop_area: float = 1.0
    mirror: bool = False
    distort: bool = False
    magnitude: int | None = None
    erase: float = 0.0


_STRONG = Augmentation(shift=1 / 8, crop_area=0.08, mirror=True, distort=True, erase=0.25)
AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(),
    "shift": Augmentation(shift=1 / 8, crop_area=0.5),
    "standard": Augmentation(shift=1 / 8, crop_area=0.08, mirror=True),
    "strong": _STRONG,
    **{f"strong-{magnitude}": replace(_STRONG, magnitude=magnitude) for magnitude in range(10)},
}
"""`strong-0` to `strong-9` are those of a curriculum's periods, from weak to strong."""


def augmentation(name: str) -> Augmentation:
    """The augmentation called `name`.

    Raises:
        DataError: no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise DataError(f"no augmentation {name!r}; there are {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def move(
    images: Tensor, *, shift: float, mirror: bool, generator: torch.Generator, rows_of: Rows | None = None
) -> Tensor:
    """`images` `(N, C, H, W)`, each moved by up to `shift` of its sides; half are mirrored if `mirror`.

    What moves in at an edge is the image's reflection. The images may be some rows of a larger batch.
    """
    count, channels, height, width = images.shape
    part = rows_of or Rows(0, count)
    rows = part.of(_positions(part.whole, height, shift, generator), count)
    columns = part.of(_positions(part.whole, width, shift, generator), count)
    if mirror:
        turned = part.of(torch.rand(part.whole, 1, generator=generator), count) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    source = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, height * width)
    moved = images.reshape(count, channels, -1).gather(2, source.expand(-1, channels, -1))
    return moved.reshape(images.shape)


def _positions(count: int, side: int, shift: float, generator: torch.Generator) -> Tensor:
    """For each image and each place along a side, the place that its pixel is taken from: `(count, side)`."""
    most = int(side * shift)
    offsets = torch.randint(-most, most + 1, (count, 1), generator=generator)
    places = (torch.arange(side) + offsets).abs()
    return side - 1 - (side - 1 - places).abs()


def distort(
    images: Tensor,
    *,
    generator: torch.Generator,
    magnitude: int | None = None,
    rows_of: Rows | None = None,
) -> Tensor:
    """uint8 `images` `(N, 3, H, W)`, a few neighbours at a time through one random TrivialAugment.

    With a `magnitude` of 0 to 10 it is RandAugment of that strength, of two changes. The images may be
    some rows of a larger batch.
    """
    part = rows_of or Rows(0, len(images))
    seed = int(torch.randint(2**62, (), generator=generator))
    change: v2.TrivialAugmentWide | v2.RandAugment = v2.TrivialAugmentWide()
    if magnitude is not None:
        change = v2.RandAugment(num_ops=2, magnitude=3 * magnitude, num_magnitude_bins=31)
    size = max(_GROUP_SIZE, math.ceil(part.whole / _GROUPS))
    changed: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
        for group, start in enumerate(range(0, part.whole, size)):
            first, last = max(0, start - part.first), max(0, start - part.first + size)
            mine = images[first:last]
            if len(mine):  # the other groups are another's rows
                torch.default_generator.manual_seed(seed + group)
                changed.append(change(mine))
    return torch.cat(changed)


def erase(
    images: Tensor, *, probability: float, generator: torch.Generator, rows_of: Rows | None = None
) -> Tensor:
    """Normalised `images` `(N, C, H, W)`, some with a rectangle of 2 to 33 % of the area set to the mean.

    The images may be some rows of a larger batch.
    """
    count, _, height, width = images.shape
    part = rows_of or Rows(0, count)
    drawn = torch.rand(5, part.whole, generator=generator)
    chance, area, ratio, top, left = part.of(drawn.T, count).T
    area = (0.02 + area * 0.31) * (height * width)
    ratio = torch.exp((ratio * 2 - 1) * math.log(10 / 3))
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    first_row, first_column = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= first_row[:, None]) & (rows < (first_row + tall)[:, None])
    in_columns = (columns >= first_column[:, None]) & (columns < (first_column + wide)[:, None])
    erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None] & (chance < probability)[
        :, None, None, None
    ]
    return images.masked_fill(erased.to(images.device), 0.0)


def crop_box(width: int, height: int, *, area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) with at least the fraction `area` of an image, 3:4 to 4:3.

    Where ten tries do not fit the image, the largest centred box of such a shape (Szegedy et al., 2015,
    arXiv:1409.4842, as torchvision does it).
    """
    for _ in range(10):
        pixels = width * height * rng.uniform(area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
            return left, top, left + wide, top + tall
    wide, tall = min(width, max(1, height * 4 // 3)), min(height, max(1, width * 4 // 3))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall
