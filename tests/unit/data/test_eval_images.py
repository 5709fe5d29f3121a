from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from nestling.data import DataError, EvalImages
from nestling.data.images import Indices, PixelArray
from nestling.data.kept import Kept


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


@dataclass(frozen=True, eq=False)
class Counted(PixelArray):
    """Pictures that tell how often one of them was opened."""

    opened: list[int] = field(default_factory=list)

    def open(self, index: int) -> Image.Image:
        self.opened.append(index)
        return super().open(index)

    def open_range(self, start: int, stop: int) -> Iterator[Image.Image]:
        return map(self.open, range(start, stop))

    def select(self, indices: Indices) -> Counted:
        return Counted(self.pixels[indices], self.opened)


@pytest.fixture
def counted(images: EvalImages) -> Callable[[int], tuple[EvalImages, list[int]]]:
    """The images, of which so many bytes are kept, and those that were opened."""

    def make(at_most: int) -> tuple[EvalImages, list[int]]:
        assert isinstance(images.images, PixelArray)
        pictures = Counted(images.images.pixels)
        return replace(images, images=pictures, kept=Kept(at_most)), pictures.opened

    return make


def test_resized_images_of_all_parts_and_sides_are_kept_up_to_so_many_bytes(
    images: EvalImages, counted: Callable[[int], tuple[EvalImages, list[int]]]
) -> None:
    limit = 12 * 3 * (5**2 + 6**2) + 7
    whole, opened = counted(limit)
    parts = whole.portions((4, 12), seed=0)
    same = images.portions((4, 12), seed=0)
    for side in (5, 6, 7, 8, 5, 6):
        for part, expected in zip((whole, *parts), (images, *same), strict=True):
            assert np.array_equal(part.array(side), expected.array(side))
            assert whole.kept.held <= limit
    assert {len(whole.array(side)) for side in (5, 6)} == {12}  # both together are just not too many
    opened.clear()
    assert np.array_equal(whole.array(5), images.array(5))
    assert np.array_equal(whole.array(6), images.array(6))
    assert not opened
    whole.array(7)  # in the place of both
    whole.array(5)
    assert len(opened) == 24


def test_images_that_nobody_has_any_more_are_not_kept(
    counted: Callable[[int], tuple[EvalImages, list[int]]],
) -> None:
    whole, opened = counted(10_000)
    whole.array(5)
    before = whole.kept.held
    part = whole.take(4)
    part.array(6)
    part.array(7)
    assert whole.kept.held == before + 4 * 3 * (6**2 + 7**2)
    del part
    assert whole.kept.held == before
    opened.clear()
    whole.array(5)
    assert opened == []


def test_those_longest_unused_go_first(counted: Callable[[int], tuple[EvalImages, list[int]]]) -> None:
    whole, opened = counted(12 * 3 * (6**2 + 7**2))
    for side in (5, 6, 5, 7):
        whole.array(side)
    opened.clear()
    whole.array(5)
    assert opened == []
    whole.array(6)
    assert len(opened) == 12


def test_two_who_take_turns_with_more_than_is_kept_resize_each_image_once(
    images: EvalImages, counted: Callable[[int], tuple[EvalImages, list[int]]]
) -> None:
    whole, opened = counted(12 * 3 * 6**2)
    for first, second in zip(whole.at(5, batch_size=4), whole.at(6, batch_size=4), strict=True):
        assert torch.equal(first.labels, second.labels)
    assert len(opened) == 24
    opened.clear()
    shown = torch.cat([batch.images for batch in whole.at(7, batch_size=5)])  # more than is kept at all
    assert np.array_equal(shown.numpy(), images.array(7))
    assert len(opened) == 12
