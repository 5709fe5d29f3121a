from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.data.batch import Batch
from nestling.data.curriculum import (
    EFFICIENTTRAIN,
    EFFICIENTTRAIN_PLUS,
    Curriculum,
    CurriculumStream,
    Period,
    low_frequencies,
)


def noise(side: int = 16, *, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def as_published(images: Tensor, side: int) -> Tensor:
    """By numpy: the centre of the shifted spectrum, its real part, times the ratio of areas."""
    full = images.shape[-1]
    spectrum = np.fft.fftshift(np.fft.fft2(images.double().numpy()), axes=(-2, -1))
    first = full // 2 - side // 2
    centre = np.fft.ifftshift(spectrum[..., first:, first:][..., :side, :side], axes=(-2, -1))
    return torch.from_numpy(np.fft.ifft2(centre).real * (side / full) ** 2)


def waves(side: int, *, highest: int) -> Tensor:
    """A picture (1, 3, side, side) of waves that turn up to `highest` times a side, on a grid of pixels."""
    generator = torch.Generator().manual_seed(5)
    at = torch.arange(side, dtype=torch.float64) / side
    picture = torch.zeros(1, 3, side, side, dtype=torch.float64)
    for down in range(-highest, highest + 1):
        for across in range(highest + 1):
            phase = 2 * math.pi * torch.rand(3, 1, 1, generator=generator, dtype=torch.float64)
            turns = 2 * math.pi * (down * at[:, None] + across * at[None, :])
            picture += torch.cos(turns + phase)
    return picture.float()


@pytest.mark.parametrize(("full", "side"), [(16, 10), (16, 14), (15, 8), (16, 7), (15, 9), (16, 2), (16, 15)])
def test_the_crop_is_that_of_the_shifted_spectrum(full: int, side: int) -> None:
    images = noise(full)
    assert torch.allclose(low_frequencies(images, side).double(), as_published(images, side), atol=1e-6)


@pytest.mark.parametrize("side", [1, 7, 12])
def test_a_constant_image_stays_that_constant(side: int) -> None:
    constant = torch.tensor([0.3, -2.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    cropped = low_frequencies(constant, side)
    assert cropped.shape == (2, 3, side, side)
    assert torch.allclose(cropped, constant[..., :side, :side], atol=1e-6)


@pytest.mark.parametrize("side", [12, 13])
def test_an_image_without_high_frequencies_is_the_same_picture_on_a_coarser_grid(side: int) -> None:
    cropped = low_frequencies(waves(32, highest=5), side)
    assert torch.allclose(cropped, waves(side, highest=5), atol=1e-4)


def test_energy_is_that_of_the_low_frequencies() -> None:
    images, side = noise(16), 9  # an odd one: no frequency is its own mirror image
    spectrum = torch.fft.fftshift(torch.fft.fft2(images, norm="forward"), dim=(-2, -1))
    kept = spectrum[..., 4:13, 4:13].abs().square().sum()  # Parseval: the mean square of the picture
    found = low_frequencies(images, side).square().mean((-2, -1)).sum()
    assert torch.allclose(found, kept)
    assert found < images.square().mean((-2, -1)).sum()


def test_noise_of_high_frequency_leaves_no_trace() -> None:
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    assert float(low_frequencies(board, 8).abs().max()) < 1e-6
    assert float(board[..., ::2, ::2].abs().min()) == 1.0  # which leaving out pixels would have kept


def test_the_full_side_is_the_image_itself() -> None:
    images = noise()
    assert low_frequencies(images, 16) is images


@pytest.mark.parametrize("side", [0, 17])
def test_a_side_that_the_images_do_not_have_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"is {side}; it must be 1 to 16"):
        low_frequencies(noise(), side)


def test_the_published_curriculum_costs_what_was_published() -> None:
    # 60 % of the epochs at 160 px, 20 % at 192 px, 20 % at 224 px
    expected = 0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2
    assert EFFICIENTTRAIN.compute(full=224, steps=300) == pytest.approx(expected)
    assert 1 / expected > 1.5  # "reduces the training cost by more than 1.5x"
    sides = [EFFICIENTTRAIN.side(period, full=224) for period in EFFICIENTTRAIN.periods]
    assert sides == [160, 160, 160, 192, 224]
    assert [EFFICIENTTRAIN.period(step, steps=300).magnitude for step in (0, 59, 60, 150, 299)] == [
        1,
        1,
        3,
        5,
        9,
    ]


def test_the_periods_of_the_second_version_cost_alike() -> None:
    steps = 100_000
    starts = [*EFFICIENTTRAIN_PLUS.starts(steps), steps]
    costs = [
        (end - start) * EFFICIENTTRAIN_PLUS.side(period, full=224) ** 2
        for period, start, end in zip(EFFICIENTTRAIN_PLUS.periods, starts, starts[1:], strict=False)
    ]
    assert max(costs) < 1.001 * min(costs)
    assert EFFICIENTTRAIN_PLUS.compute(full=224, steps=steps) == pytest.approx(0.44, abs=0.005)


@pytest.mark.parametrize(("multiple", "sides"), [(2, [22, 28, 32]), (4, [24, 28, 32]), (8, [24, 24, 32])])
def test_the_curriculum_fits_any_side_in_multiples(multiple: int, sides: list[int]) -> None:
    curriculum = Curriculum(EFFICIENTTRAIN.periods, multiple=multiple)
    assert [curriculum.side(curriculum.periods[index], full=32) for index in (0, 3, 4)] == sides


def test_the_last_period_has_the_full_side_even_where_that_is_no_multiple() -> None:
    assert EFFICIENTTRAIN.side(EFFICIENTTRAIN.periods[-1], full=33) == 33


def test_a_run_shorter_than_its_periods_leaves_some_out_and_ends_with_the_last() -> None:
    met = [EFFICIENTTRAIN.period(step, steps=3) for step in range(3)]
    assert met[-1] == EFFICIENTTRAIN.periods[-1]
    assert EFFICIENTTRAIN.period(7, steps=3) == EFFICIENTTRAIN.periods[-1]


@pytest.mark.parametrize(
    ("periods", "problem"),
    [
        ((), "at least one"),
        ((Period(0.0, 1.0, 9),), "share must be above 0"),
        ((Period(1.0, 1.1, 9),), "side in"),
        ((Period(1.0, 1.0, 11),), "magnitude in"),
        ((Period(1.0, 1.0, 9), Period(1.0, 0.5, 9)), "may only grow"),
    ],
)
def test_a_curriculum_that_cannot_be_followed_is_refused(periods: tuple[Period, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Curriculum(periods)


def test_sides_in_multiples_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Curriculum(EFFICIENTTRAIN.periods, multiple=0)


@dataclass(slots=True)
class Numbered:
    """Batch k is noise of seed k, and its labels are k; it notes the augmentations it is asked for."""

    asked: list[tuple[int, str]] = field(default_factory=list)

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        self.asked.append((start_step, augment))
        step = start_step
        while True:
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(batch_size, 3, 16, 16, generator=generator).to(device)
            yield Batch(images, torch.full((batch_size,), step, device=device))
            step += 1

    def steps_per_epoch(self, batch_size: int) -> int:
        return 40 // batch_size


def shown(*, start_step: int, count: int) -> list[Batch]:
    stream = CurriculumStream(Numbered(), EFFICIENTTRAIN, steps=10)
    batches = stream.batches(start_step=start_step, batch_size=2, augment="standard", device="cpu")
    return list(islice(batches, count))


def test_the_stream_shows_every_batch_once_at_its_periods_side() -> None:
    batches = shown(start_step=0, count=12)
    assert [int(batch.labels[0]) for batch in batches] == list(range(12))
    assert [batch.images.shape[-1] for batch in batches] == [12] * 6 + [14] * 2 + [16] * 4


@pytest.mark.parametrize("start", [1, 2, 7, 8, 11])
def test_a_run_that_resumes_sees_the_same_batches(start: int) -> None:
    whole, rest = shown(start_step=0, count=14)[start:], shown(start_step=start, count=14 - start)
    for expected, batch in zip(whole, rest, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def test_each_period_asks_for_its_own_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"strong": None} | {f"strong-{magnitude}": None for magnitude in range(10)}
    monkeypatch.setattr("nestling.data.curriculum.AUGMENTATIONS", known)
    stream = Numbered()
    for augment in ("strong", "standard"):
        batches = CurriculumStream(stream, EFFICIENTTRAIN, steps=10).batches(
            start_step=3, batch_size=2, augment=augment, device="cpu"
        )
        list(islice(batches, 6))
    assert stream.asked[:4] == [(3, "strong-3"), (4, "strong-5"), (6, "strong-7"), (8, "strong-9")]
    assert {augment for _, augment in stream.asked[4:]} == {"standard"}  # it has no weaker form


def test_an_epoch_is_as_long_as_without_a_curriculum() -> None:
    assert CurriculumStream(Numbered(), EFFICIENTTRAIN, steps=10).steps_per_epoch(4) == 10
