"""Progressive shrinking: the space opens choice by choice (OFA)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate, groupby
from types import MappingProxyType
from typing import Literal

from nestling.space import SearchSpace, Value
from nestling.train.schedules import Cosine, Phases, Schedule
from nestling.train.strategies.visits import Progress, Strategy, Visit

ALL = 1_000
"""More values than a choice has."""

Teacher = Literal["frozen", "largest", "outside", "none"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run in which subnets are drawn from a part of the space.

    Attributes:
        name: what a person calls it.
        epochs: how long it is, warm-up included, in the paper's epochs; a run shares its steps out by these.
        warmup: how many of them the learning rate rises.
        lr: the highest learning rate, as a factor of the run's.
        subnets: how many are visited in each step.
        opened: kind of choice (`kernel`, `depth`, `expand`; `other` for any other kind) -> how many of its
            values, from the dearest, are drawn. Kinds that are not named keep the dearest alone.
        sorts: whether channels are sorted by importance before its first step.
    """

    name: str
    epochs: float
    warmup: float
    lr: float
    subnets: int
    opened: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    sorts: bool = False


_LR_OF_TEACHER = 0.08125
"""For 64 images: 2.6 for 32 GPUs."""

PUBLISHED = (
    Phase("full", 180, 0, 1.0, 1),
    Phase("kernel", 125, 5, 3e-2 / _LR_OF_TEACHER, 1, {"kernel": ALL}),
    Phase("depth 1", 25, 0, 2.5e-3 / _LR_OF_TEACHER, 2, {"kernel": ALL, "depth": 2}),
    Phase("depth 2", 125, 5, 7.5e-3 / _LR_OF_TEACHER, 2, {"kernel": ALL, "depth": ALL}),
    Phase(
        "expand 1", 25, 0, 2.5e-3 / _LR_OF_TEACHER, 4,
        {"kernel": ALL, "depth": ALL, "expand": 2, "other": 2}, sorts=True,
    ),
    Phase(
        "expand 2", 125, 5, 7.5e-3 / _LR_OF_TEACHER, 4,
        {"kernel": ALL, "depth": ALL, "expand": ALL, "other": ALL}, sorts=True,
    ),
)  # fmt: skip
"""Once-for-all's phases on MobileNetV3: 605 epochs."""


@dataclass(frozen=True, slots=True)
class ProgressiveShrinking(Strategy):
    """Progressive shrinking (once-for-all, Cai et al. 2020, arXiv 1908.09791).

    The largest network learns alone; then kernels, depths and expansions open one after the other, and every
    step draws the phase's number of subnets, which learn from the labels and, with the weight `distilled`,
    from the soft labels of a teacher. Channels are sorted before each phase that opens expansions. The
    learning rate begins anew with each phase. Resolution, and precision, are drawn in every phase but the
    first; choices of other kinds, such as widths, open with expansions, the paper's space having none.

    The teacher is the network that the first phase made, `frozen`; or one from `outside` the supernet, which
    teaches in every phase but the first; or the `largest` network of the same step as it goes on changing; or
    `none`.

    The paper's transformation of kernels is left out: a small kernel would be a product of weights that no
    plain network holds, so neither the largest network's file nor an extracted subnet's would have a place
    for the matrices. AttentiveNAS and BigNAS crop kernels plainly.

    Attributes:
        phases: in their order; `phases_of` leaves out those that open nothing in a space.
        teacher: who gives soft labels.
        distilled: the weight of the soft labels' loss beside the labels'.
        sort_channels: whether channels are sorted.

    Raises:
        ValueError: no phases, one without length or subnets, or `distilled` is not above 0.
    """

    phases: tuple[Phase, ...] = PUBLISHED
    teacher: Teacher = "frozen"
    distilled: float = 1.0
    sort_channels: bool = True

    def __post_init__(self) -> None:
        if not self.phases or self.distilled <= 0:
            raise ValueError(
                f"progressive shrinking has {len(self.phases)} phases and distilled is {self.distilled}; it "
                "needs a phase, and a weight above 0 (or no teacher)"
            )
        for phase in self.phases:
            if phase.epochs <= 0 or phase.subnets < 1 or not 0 <= phase.warmup <= phase.epochs:
                raise ValueError(
                    f"phase {phase.name!r} has {phase.epochs} epochs, {phase.warmup} of them to warm up, and "
                    f"{phase.subnets} subnets a step; it needs more than 0 epochs and at least 1 subnet"
                )

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """Subnets of what the phase has opened; the largest one before them where it teaches."""
        phase = self.phases[self._phase(progress)]
        if not phase.opened:
            return [Visit(space.largest)]
        part = opened_part(space, tuple(phase.opened.items()))
        # what is idle has another first value in the part, and so another name
        drawn = [space.canonical(part.sample(rng)) for _ in range(phase.subnets)]
        if self.teacher == "none":
            return [Visit(arch) for arch in drawn]
        if self.teacher in ("outside", "frozen"):
            return [Visit(arch, teacher=self.distilled, labels=1.0) for arch in drawn]
        soft = Visit(
            space.largest, learns_from=space.largest, weight=self.distilled, labels=1 / self.distilled
        )
        return [Visit(space.largest, weight=0.0), *(replace(soft, arch=arch) for arch in drawn)]

    def sorts_channels(self, space: SearchSpace, progress: Progress) -> SearchSpace | None:
        """Before the first step of each phase that opens expansions: what the phase before it trained."""
        index, before = self._phase(progress), self._phase_before(progress)
        if index == before or not (self.sort_channels and self.phases[index].sorts):
            return None
        return opened_part(space, () if before is None else tuple(self.phases[before].opened.items()))

    def freezes_teacher(self, progress: Progress) -> bool:
        """When the first phase ends; in a run so short that it has no step, before the first step of all."""
        begins = self._phase(progress) > 0 and self._phase_before(progress) in (0, None)
        return self.teacher == "frozen" and begins

    def schedule(self, *, lr: float, warmup_steps: int, steps: int, steps_per_epoch: int) -> Schedule:
        """A cosine for each phase, the first of which warms up as long as it is told."""
        del steps_per_epoch
        starts = self._starts(steps)
        lengths = [end - start for start, end in zip(starts, (*starts[1:], steps), strict=True)]
        warmups = [round(p.warmup / p.epochs * n) for p, n in zip(self.phases, lengths, strict=True)]
        warmups[0] = min(warmup_steps, lengths[0])
        parts = zip(self.phases, warmups, lengths, strict=True)
        return Phases(starts, tuple(Cosine(lr * p.lr, warmup, length) for p, warmup, length in parts))

    def _starts(self, steps: int) -> tuple[int, ...]:
        ends = list(accumulate(phase.epochs for phase in self.phases))
        return (0, *(round(end / ends[-1] * steps) for end in ends[:-1]))

    def _phase_before(self, progress: Progress) -> int | None:
        """The number of the phase that the step before belongs to: short runs have phases without a step."""
        return self._phase(replace(progress, step=progress.step - 1)) if progress.step else None

    def _phase(self, progress: Progress) -> int:
        return max(i for i, start in enumerate(self._starts(progress.steps)) if start <= progress.step)


def phases_of(space: SearchSpace, phases: Sequence[Phase] = PUBLISHED) -> tuple[Phase, ...]:
    """`phases` without those that draw from the same part of `space` as a longer one beside them does."""
    kept: list[Phase] = []
    for _, alike in groupby(phases, key=lambda phase: opened_part(space, tuple(phase.opened.items()))):
        kept.append(max(alike, key=lambda phase: phase.epochs))
    return tuple(kept)


@lru_cache(maxsize=64)
def opened_part(space: SearchSpace, opened: tuple[tuple[str, int], ...]) -> SearchSpace:
    """The part of `space` in which a choice keeps as many of its dearest values as its kind's entry says."""
    counts = dict(opened)
    cut: dict[str, tuple[Value, ...]] = {}
    for choice in space.open_choices:
        if opened and any(
            fnmatchcase(choice.name, kind) for kind in ("resolution", "*.precision", "precision")
        ):
            continue
        kind = choice.name.rpartition(".")[2]
        named = kind if kind in ("kernel", "depth", "expand") else "other"
        cut[choice.name] = choice.values[-counts.get(named, 1) :]
    return space.only(cut)
