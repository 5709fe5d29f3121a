"""Data: three disjoint splits of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nestling.config import DataConfig
from nestling.data.eval_images import EvalImages
from nestling.data.images import PixelArray, fit_all, usual_side
from nestling.data.kept import Kept
from nestling.data.pixels import Colours, DataError, derive_seed, measure_colours
from nestling.data.sources import Labelled, open_source
from nestling.data.splits import Few, balanced, proportional
from nestling.data.train_images import TrainImages

_IN_MEMORY_SIDE = 96
_IN_MEMORY_BYTES = 8 * 1024**3
_IMAGENET_COLOURS: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class Data:
    """Images in three disjoint splits.

    Attributes:
        classes: names, in the order of the labels.
        size: the side in px at which training images come.
        mean: per channel, of the training images as fractions of 255 (ImageNet's where they stay on disk);
            `std` likewise.
        train: to learn from.
        search: to choose by: scores candidates and calibrates quantization. Cut off the training split.
        fingerprint: sixteen hexadecimal digits that name the source, the splits and their content.
    """

    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: TrainImages
    search: EvalImages
    fingerprint: str
    _test: EvalImages = field(repr=False)

    def test(self) -> EvalImages:
        """The images that nothing may be chosen by: to be read once, for the final table."""
        return self._test


def load_data(config: DataConfig, *, seed: int, few: Few = "drawn") -> Data:
    """The images that `config` asks for, split by `seed`.

    Args:
        config: the source, and how many images each split has.
        seed: of all that is drawn.
        few: which classes a part has that holds fewer images than there are classes.

    Raises:
        DataError: no such source, a damaged image, an empty class, a missing column or split, or fewer images
            than asked for; the message names which.
    """
    source = open_source(config)
    rest, test = source.train, source.test
    if test is None:
        count = round(len(rest) * config.test_fraction)
        rest, test = _cut(rest, count, key=f"test_fraction = {config.test_fraction}", seed=seed, few=few)
    key = f"search_images = {config.search_images}"
    train, search = _cut(rest, config.search_images, key=key, seed=seed, few=few)
    if config.train_images is not None:
        train = _spread(train, config.train_images, key="train_images", seed=seed, few=few)
    if config.test_images is not None:
        test = _spread(test, config.test_images, key="test_images", seed=seed, few=few)

    size = config.size or source.side or usual_side(source.train.images)
    mean, std = _IMAGENET_COLOURS
    if _fits_in_memory(size, (train, search, test)):
        pixels = fit_all(train.images, size)
        mean, std = measure_colours(pixels)
        train = Labelled(PixelArray(pixels), train.labels)
        search, test = _decoded(search, size), _decoded(test, size)
    kept = Kept()
    return Data(
        classes=source.classes,
        size=size,
        mean=mean,
        std=std,
        train=TrainImages(
            train.images,
            train.labels,
            source.classes,
            size=size,
            mean=mean,
            std=std,
            seed=seed,
            workers=config.workers,
            few=few,
            kept=kept,
        ),
        search=EvalImages(search.images, search.labels, source.classes, mean, std, kept),
        fingerprint=_fingerprint(source.classes, size, (train, search, test)),
        _test=EvalImages(test.images, test.labels, source.classes, mean, std, kept),
    )


def _cut(part: Labelled, count: int, *, key: str, seed: int, few: Few) -> tuple[Labelled, Labelled]:
    """`part` without `count` images, and those images: the classes in proportion, one image of each left."""
    most = len(part) - len(np.unique(part.labels))
    if not 1 <= count <= most:
        raise DataError(
            f"data.{key} takes {count} of {len(part)} training images; it must take 1 to {most}, so "
            "that one image of each class is left to train on"
        )
    chosen = proportional(part.labels, count, rng=_rng(seed, key.partition(" ")[0]), few=few)
    return part.select(np.setdiff1d(np.arange(len(part)), chosen)), part.select(chosen)


def _spread(part: Labelled, count: int, *, key: str, seed: int, few: Few) -> Labelled:
    """`count` images of `part`, as many of one class as of another, in their old order."""
    if count > len(part):
        raise DataError(f"data.{key} = {count}, but there are {len(part)}; ask for at most that many")
    return part.select(np.sort(balanced(part.labels, count, rng=_rng(seed, key), few=few)))


def _rng(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, key))


def _fits_in_memory(size: int, parts: Sequence[Labelled]) -> bool:
    small = size <= _IN_MEMORY_SIDE and sum(map(len, parts)) * size * size * 3 <= _IN_MEMORY_BYTES
    return small or all(isinstance(part.images, PixelArray) for part in parts)


def _decoded(part: Labelled, size: int) -> Labelled:
    return Labelled(PixelArray(fit_all(part.images, size)), part.labels)


def _fingerprint(classes: tuple[str, ...], size: int, parts: Sequence[Labelled]) -> str:
    digest = hashlib.sha256(repr((classes, size)).encode())
    for part in parts:
        digest.update(part.images.digest().encode())
        digest.update(part.labels.tobytes())
    return digest.hexdigest()[:16]
