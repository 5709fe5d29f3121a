from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.data.augment import AUGMENTATIONS, augmentation, crop_box, distort, erase, move
from nestling.data.pixels import DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 8, side: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator(9))


def every_move(image: Tensor, most: int, mirror: bool) -> set[bytes]:
    """All results that moving one image (C, H, W) may have, by numpy's own reflection."""
    _, height, width = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (most, most), (most, most)), mode="reflect")
    crops = [
        padded[:, y : y + height, x : x + width] for y in range(2 * most + 1) for x in range(2 * most + 1)
    ]
    return {crop.tobytes() for crop in crops} | {crop[:, :, ::-1].tobytes() for crop in crops if mirror}


@pytest.mark.parametrize("mirror", [False, True])
def test_each_image_is_moved_as_one_of_the_reflected_crops(mirror: bool) -> None:
    images = pictures()
    moved = move(images, shift=1 / 8, mirror=mirror, generator=generator())
    assert moved.dtype == torch.uint8
    for before, after in zip(images, moved, strict=True):
        assert after.numpy().tobytes() in every_move(before, 2, mirror)


def test_images_of_a_batch_are_moved_each_in_its_own_way() -> None:
    same = pictures(1).expand(64, -1, -1, -1)
    moved = move(same, shift=1 / 8, mirror=True, generator=generator())
    assert len({image.numpy().tobytes() for image in moved}) > 25  # of 50


def test_without_shift_and_mirror_nothing_moves() -> None:
    assert torch.equal(move(pictures(), shift=0.0, mirror=False, generator=generator()), pictures())


def test_about_half_of_the_images_are_mirrored() -> None:
    images = pictures(1).expand(400, -1, -1, -1)
    mirrored = (move(images, shift=0.0, mirror=True, generator=generator()) != images).flatten(1).any(1)
    assert 150 < int(mirrored.sum()) < 250


def test_distorting_repeats_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (distort(pictures(40), generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, distort(pictures(40), generator=generator(4)))
    assert first.dtype == torch.uint8
    assert first.shape == (40, 3, 16, 16)


def test_erasing_sets_one_rectangle_to_the_mean() -> None:
    images = torch.ones(200, 3, 12, 12)
    erased = erase(images, probability=0.5, generator=generator())[:, 0] == 0
    hit = erased.flatten(1).any(1)
    assert 70 < int(hit.sum()) < 130
    for mask in erased[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert 1 <= int(mask.sum()) <= 0.45 * 144
    assert torch.equal(erase(images, probability=0.0, generator=generator()), images)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_a_crop_box_lies_in_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = crop_box(width, height, area=0.08, rng=np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_crop_box_keeps_the_asked_area() -> None:
    for seed in range(50):
        left, top, right, bottom = crop_box(200, 200, area=0.5, rng=np.random.default_rng(seed))
        assert (right - left) * (bottom - top) >= 0.49 * 200 * 200


def test_only_standard_and_strong_mirror() -> None:
    mirrored = {name.partition("-")[0] for name, change in AUGMENTATIONS.items() if change.mirror}
    assert mirrored == {"standard", "strong"}


def test_an_unknown_augmentation_is_refused_with_those_there_are() -> None:
    with pytest.raises(DataError, match="no augmentation 'flip'; there are none, shift, standard, strong"):
        augmentation("flip")


def test_a_greater_magnitude_changes_images_more_and_all_forms_of_strong_share_the_rest() -> None:
    images = pictures(64)
    weak, full = (distort(images, generator=generator(3), magnitude=m).float() for m in (1, 9))
    assert (weak - images).abs().mean() < (full - images).abs().mean()
    strong = augmentation("strong")
    assert all(replace(augmentation(f"strong-{m}"), magnitude=None) == strong for m in range(10))
