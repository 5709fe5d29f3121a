from __future__ import annotations

import numpy as np
import pytest

from nestling.data import DataError, EvalImages
from nestling.data.images import PixelArray


@pytest.fixture
def images() -> EvalImages:
    """Twelve images, each of one grey that names it, four of each class, class by class."""
    pixels = np.repeat(np.arange(12, dtype=np.uint8), 4 * 4 * 3).reshape(12, 4, 4, 3)
    labels = np.repeat(np.arange(3), 4).astype(np.int64)
    return EvalImages(PixelArray(pixels), labels, ("a", "b", "c"), (0.0,) * 3, (1 / 255,) * 3)


def greys(part: EvalImages) -> list[int]:
    return [round(float(image.mean())) for image in part.array(4)]


def test_portions_are_all_images_once_each_with_its_label(images: EvalImages) -> None:
    parts = images.portions((3, 5, 12), seed=0)
    assert [len(part) for part in parts] == [3, 2, 7]
    assert sorted(grey for part in parts for grey in greys(part)) == list(range(12))
    assert all([grey // 4 for grey in greys(part)] == part.labels.tolist() for part in parts)


def test_portions_are_random_and_the_same_for_the_same_seed(images: EvalImages) -> None:
    first, again, other = (images.portions((6, 12), seed=seed)[0] for seed in (0, 0, 1))
    assert greys(first) == greys(again) != greys(other)
    assert greys(first) != sorted(greys(first))


@pytest.mark.parametrize("ends", [(), (6,), (0, 12), (8, 6, 12), (6, 6, 12), (6, 13)])
def test_portions_that_are_not_a_partition_are_refused(images: EvalImages, ends: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="portions end after"):
        images.portions(ends, seed=0)
