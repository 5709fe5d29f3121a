"""Account: what a training run has cost so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nestling.data import Batch
from nestling.energy import PARTS, Meter, Part, joules_of
from nestling.models.supernet import capped
from nestling.space import Arch
from nestling.train.distributed import ALONE, Ranks
from nestling.train.strategies import Progress, Visit
from nestling.train.strategies.accounting import forward_passes

KEPT_ARCHS = 64
STRETCH = 32
MOST_STRETCHES = 256


@dataclass(frozen=True, slots=True)
class Spent:
    """What training cost, all parts of a run that was stopped and continued together.

    What a part that was killed did after its last checkpoint is done again, and counted once.

    Attributes:
        steps: of the optimizer.
        images: read, by all ranks together; one that is read in two epochs counts twice.
        macs: multiply-accumulates of all visits that were made, look-aheads of contests and teachers among
            them, by the rule of `accounting.visits_macs`; of all ranks together.
        macs_error: one standard error of `macs`, which is 0 where every visit was counted; see `Account`.
        seconds: of wall time from the first step on, estimates of accuracy and checkpoints included.
        joules: by part of the machine, added up over machines; None where one of them did not tell them
            throughout, or does not have the part.
    """

    steps: int
    images: int
    macs: float
    macs_error: float
    seconds: float
    joules: Mapping[Part, float | None]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class Account:
    """Counts what training costs, step by step; its state goes into checkpoints.

    To count the multiply-accumulates of an arch takes 10 to 160 ms, as long as a small network's step, and
    random archs hardly ever return. So the first `KEPT_ARCHS` archs are counted, for good, and of the others
    those of one step in each stretch of a run; passes of the rest of the stretch cost what that step's cost
    on average. What that leaves open is told (`Spent.macs_error`). A run of a list of subnets, and a short
    one, are counted whole.

    Args:
        macs: of an arch's forward pass on one image.
        teachers_macs: of one forward pass of all teachers, on an image of so many pixels a side.
        meters: read at the end of every epoch, and at checkpoints where there is one rank.
        tells: the parts that this rank has to tell: of several on a machine, one alone tells the packages,
            and each its own GPU. Of one that it has no meter for nothing is known then.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        macs: Callable[[Arch], float],
        teachers_macs: Callable[[int], float] = lambda _: 0.0,
        meters: Sequence[Meter] = (),
        tells: Collection[Part] = PARTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._macs = macs
        self._teachers_macs = teachers_macs
        self._meters = tuple(meters)
        self._tells = frozenset(tells)
        self._clock = clock
        self._ranks = ALONE
        self._began = clock()
        self._read: Mapping[Part, float] = {}
        self._seconds = 0.0
        self._joules: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._images_of_step: int | None = None
        self._steps = self._images = 0
        self._total = 0.0
        self._kept: dict[str, float] = {}
        self._others = _Others()

    def begin(self, state: Mapping[str, Any] | None, *, ranks: Ranks = ALONE) -> None:
        """Goes on from `state`, as `state()` gave it to a checkpoint; from nothing where it is None."""
        if state is not None:
            self._steps, self._images, self._total = state["steps"], state["images"], state["macs"]
            self._seconds = state["seconds"]
            self._joules = {part: _or_nan(state["joules"].get(part)) for part in PARTS}
            self._kept = dict(state["kept"])
            self._others = _Others(**state["others"])
        self._ranks = ranks
        self._began, self._read = self._clock(), joules_of(self._meters)

    def step(
        self, progress: Progress, visits: Sequence[Visit], winners: Sequence[Arch], *, batch: Batch
    ) -> None:
        """Takes a step in.

        Args:
            progress: of the step.
            visits: that the strategy said.
            winners: the arch of each visit; of a contest the one that won.
            batch: this rank's part of what they saw; archs of a larger resolution ran at its own.
        """
        images, side = self._whole(batch), int(batch.images.shape[-1])
        passes = [(capped(arch, side), count) for arch, count in forward_passes(visits, winners).items()]
        self._steps += 1
        self._images += images
        if any(visit.teacher for visit in visits):
            self._total += self._teachers_macs(side) * images
        self._total += self._known(passes) * images
        others = [(arch, count) for arch, count in passes if arch.key not in self._kept]
        if others:
            length = max(STRETCH, math.ceil(progress.steps / MOST_STRETCHES))
            stretch = [progress.step // length, side]
            if self._others.is_due(stretch):
                costs = sum(self._macs(arch) * count for arch, count in others)
                self._others.look(stretch, mean=costs / sum(count for _, count in others))
                self._total += costs * images
            else:
                self._total += self._others.charge(sum(count for _, count in others), images=images)

    def settle(self) -> None:
        """Adds what the meters of all ranks have counted since the last time; every rank calls it."""
        now = joules_of(self._meters)
        used = [
            now[part] - self._read[part] if part in now else math.nan if part in self._tells else 0.0
            for part in PARTS
        ]
        self._read = now
        told = self._ranks.sum(torch.tensor(used, dtype=torch.float64, device=self._ranks.device)).tolist()
        self._joules = {part: self._joules[part] + more for part, more in zip(PARTS, told, strict=True)}

    def spent(self) -> Spent:
        """What the run has cost: its joules as they were when last settled, the rest until now."""
        return Spent(
            steps=self._steps,
            images=self._images,
            macs=self._total,
            macs_error=self._others.error,
            seconds=self._seconds + self._clock() - self._began,
            joules={part: None if math.isnan(joules) else joules for part, joules in self._joules.items()},
        )

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint, as JSON holds it.

        Several ranks do not settle here, since the first alone writes checkpoints: of a run that goes on from
        one within an epoch, the joules from that epoch's start to the checkpoint are missing.
        """
        if self._ranks.world == 1:
            self.settle()
        spent = self.spent().to_dict()
        return {**spent, "kept": dict(self._kept), "others": asdict(self._others)}

    def _whole(self, batch: Batch) -> int:
        """The images of all ranks; asked for once, as every step has as many."""
        if self._ranks.world == 1:
            return len(batch.labels)
        if self._images_of_step is None:
            mine = torch.tensor(len(batch.labels), device=self._ranks.device)
            self._images_of_step = int(self._ranks.sum(mine))
        return self._images_of_step

    def _known(self, passes: Sequence[tuple[Arch, int]]) -> float:
        """The multiply-accumulates for an image of those of `passes` whose archs are kept, or are now."""
        total = 0.0
        for arch, count in passes:
            if arch.key not in self._kept and len(self._kept) < KEPT_ARCHS:
                self._kept[arch.key] = float(self._macs(arch))
            total += self._kept.get(arch.key, 0.0) * count
        return total


@dataclass(slots=True)
class _Others:
    """The archs that are not kept: what one step in each stretch found their passes to cost on average.

    Attributes:
        stretch: that was looked at last.
        mean: of a pass of its other archs, for one image.
        looks: how often that was taken; `total` and `squares` are the sums of the means and their squares.
        open: images x passes of this stretch that were taken to cost `mean`.
        open_squares: the sum of the squares of `open`, of the stretches before.
    """

    stretch: list[int] | None = None
    mean: float = 0.0
    looks: int = 0
    total: float = 0.0
    squares: float = 0.0
    open: float = 0.0
    open_squares: float = 0.0

    def is_due(self, stretch: list[int]) -> bool:
        """Whether a step in `stretch` is to be looked at: the first of each, and the first two of a run."""
        return stretch != self.stretch or self.looks < 2

    def look(self, stretch: list[int], *, mean: float) -> None:
        """Notes what a step was found to cost."""
        if stretch != self.stretch:
            self.open_squares += self.open**2
            self.open = 0.0
        self.stretch, self.mean = stretch, mean
        self.looks += 1
        self.total += mean
        self.squares += mean**2

    def charge(self, passes: int, *, images: int) -> float:
        """What `passes` on each of `images` are taken to cost."""
        self.open += passes * images
        return passes * images * self.mean

    @property
    def error(self) -> float:
        """One standard error of all that was charged: each stretch rests on one look.

        How much looks differ is taken over the whole run, its trends included: rather too much than too
        little.
        """
        if self.looks < 2:
            return 0.0
        center = self.total / self.looks
        variance = max(0.0, self.squares - self.looks * center**2) / (self.looks - 1)
        return math.sqrt(variance * (self.open_squares + self.open**2))


def _or_nan(joules: float | None) -> float:
    return math.nan if joules is None else joules
