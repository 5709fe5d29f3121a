"""EfficientTrain's curriculum: training begins with an image's low frequencies and with weak augmentation.

Wang et al. 2023, arXiv 2211.09703, and EfficientTrain++, Wang et al. 2024, arXiv 2405.08768. Images of low
frequencies alone are smaller without loss: early steps cost a fraction of the last ones.

How it meets a space's choice of `resolution`: the batch is cropped to B x B pixels before any arch sees it.
An arch of a resolution up to B resizes it to that, as ever; one of a larger resolution runs at B, as pixels
that interpolation makes up would cost what the crop saves (`Supernet.forward(..., at_most=B)`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from nestling.data.augment import AUGMENTATIONS
from nestling.data.batch import Batch
from nestling.data.stream import TrainStream


@dataclass(frozen=True, slots=True)
class Period:
    """A part of training.

    Attributes:
        share: its part of the run's steps, relative to the other periods'.
        side: of the images, as a fraction of the full side.
        magnitude: of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), of 10.
    """

    share: float
    side: float
    magnitude: int


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Periods in their order.

    Attributes:
        multiple: sides in pixels are multiples of it, as a vision transformer's patches ask for; an even one
            keeps the spectrum's halves alike.

    Raises:
        ValueError: no periods, a period that is out of its range, or one whose images are smaller than those
            of the period before; or `multiple` is below 1.
    """

    periods: tuple[Period, ...]
    multiple: int = 2

    def __post_init__(self) -> None:
        if not self.periods:
            raise ValueError("a curriculum needs at least one period")
        if self.multiple < 1:
            raise ValueError(f"the multiple of a curriculum's sides is {self.multiple}; it must be 1 or more")
        for period in self.periods:
            if not (period.share > 0 and 0 < period.side <= 1 and 0 <= period.magnitude <= 10):
                raise ValueError(f"{period}: share must be above 0, side in (0, 1], magnitude in 0 to 10")
        sides = [period.side for period in self.periods]
        if sides != sorted(sides):
            raise ValueError(f"a curriculum's images may only grow, but its sides are {sides}")

    def starts(self, steps: int) -> list[int]:
        """The step at which each period starts, of a run of `steps`; two may start at one in a short run."""
        total, before, starts = sum(period.share for period in self.periods), 0.0, []
        for period in self.periods:
            starts.append(round(steps * before / total))
            before += period.share
        return starts

    def period(self, step: int, *, steps: int) -> Period:
        """The period of `step`, counted from 0, of a run of `steps`; beyond its end, the last one."""
        begun = [
            period for period, start in zip(self.periods, self.starts(steps), strict=True) if start <= step
        ]
        return begun[-1]

    def side(self, period: Period, *, full: int) -> int:
        """The side in pixels of `period`'s images where images have `full` pixels a side."""
        if period.side == 1:
            return full
        nearest = round(full * period.side / self.multiple) * self.multiple
        return min(full, max(nearest, self.multiple))

    def compute(self, *, full: int, steps: int) -> float:
        """The part that is left of the run's pixels, and so nearly of its MACs, under this curriculum."""
        ends = [*self.starts(steps)[1:], steps]
        pixels = [
            (end - start) * self.side(period, full=full) ** 2
            for period, start, end in zip(self.periods, self.starts(steps), ends, strict=True)
        ]
        return sum(pixels) / (steps * full**2)


EFFICIENTTRAIN = Curriculum(
    tuple(
        Period(share=1.0, side=pixels / 224, magnitude=magnitude)
        for pixels, magnitude in ((160, 1), (160, 3), (160, 5), (192, 7), (224, 9))
    )
)
"""As published for images of 224 px: five periods of equally many steps, 0.65 of the compute."""

EFFICIENTTRAIN_PLUS = Curriculum(
    tuple(
        # periods that cost alike: the smaller the images, the more steps
        Period(share=(224 / pixels) ** 2, side=pixels / 224, magnitude=magnitude)
        for magnitude, pixels in enumerate((96, 96, 160, 160, 160, 160, 224, 224, 224, 224))
    )
)
"""EfficientTrain++ as published for images of 224 px: ten periods of equal compute, 0.44 of it in all.

There the learning rate falls along the compute that is spent; here it falls along the steps.
"""

CURRICULA = {"efficienttrain": EFFICIENTTRAIN, "efficienttrain++": EFFICIENTTRAIN_PLUS}
"""The curricula by name."""


def low_frequencies(images: Tensor, side: int) -> Tensor:
    """The lowest `side` x `side` frequencies of `images` (N, C, H, W), as images (N, C, side, side) float32.

    The centre of the shifted spectrum, turned back with the factor `side**2 / (H * W)`, which keeps
    intensities: a constant image stays that constant. An image without higher frequencies loses nothing:
    the result is the same picture on a coarser grid of pixels. Of the result the real
    part is taken, as an even `side` cuts off one of the two outermost frequencies (Wang et al. 2023, arXiv
    2211.09703). In channels-last order.

    Raises:
        ValueError: `side` is below 1 or larger than the images.
    """
    height, width = images.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"the side of cropped spectra is {side}; it must be 1 to {min(height, width)}")
    if (height, width) == (side, side):
        return images
    # half precision has no transform on the CPU; `forward` carries the factor
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.float(), norm="forward"), dim=(-2, -1))
    top, left = height // 2 - side // 2, width // 2 - side // 2
    centre = spectrum[..., top : top + side, left : left + side]
    cropped: Tensor = torch.fft.ifft2(torch.fft.ifftshift(centre, dim=(-2, -1)), norm="forward").real
    return cropped.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class CurriculumStream:
    """The batches of `stream` as `curriculum` shows them in a run of `steps`: a stream like any other.

    Batch k is a function of k and of `stream`: a run resumes with the same batches.

    Attributes:
        stream: images at their full side.
        curriculum: the periods.
        steps: of the whole run.
    """

    stream: TrainStream
    curriculum: Curriculum
    steps: int

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        """Batches without end, from that of `start_step` on; each of the side that its period has.

        Of an augmentation that has weaker forms (`strong-3` of `strong`), a period has that of its magnitude.
        """
        ends: list[int | None] = [*self.curriculum.starts(self.steps)[1:], None]
        for period, end in zip(self.curriculum.periods, ends, strict=True):
            if end is not None and end <= start_step:
                continue
            batches = self.stream.batches(
                start_step=start_step,
                batch_size=batch_size,
                augment=_at_magnitude(augment, period.magnitude),
                device=device,
            )
            for batch in islice(batches, None if end is None else end - start_step):
                side = self.curriculum.side(period, full=min(batch.images.shape[-2:]))
                yield Batch(images=low_frequencies(batch.images, side), labels=batch.labels)
            start_step = end or start_step

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make an epoch."""
        return self.stream.steps_per_epoch(batch_size)


def _at_magnitude(augment: str, magnitude: int) -> str:
    weaker = f"{augment}-{magnitude}"
    return weaker if weaker in AUGMENTATIONS else augment
