"""What a strategy says: visits, made from progress and chance alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nestling.space import Arch, SearchSpace
from nestling.train.schedules import Cosine, Schedule

Divergence = Literal["kl", "alpha"]
Keeps = Literal["best", "worst"]


@dataclass(frozen=True, slots=True)
class Visit:
    """One subnet's forward and backward pass within a step.

    Attributes:
        arch: the subnet.
        learns_from: the arch whose soft labels it learns from, visited earlier in the same step; None: of no
            other subnet's.
        weight: factor of its whole loss. With 0 there is no backward pass: it only teaches.
        labels: the weight of the labels' loss beside that of soft labels; None: 1 where it learns from no
            soft labels, else 0.
        teacher: the weight of the loss against the averaged soft labels of the teachers outside the supernet.
        divergence: how soft labels of another subnet are compared with its own: `kl`, or the adaptive
            alpha-divergence of AlphaNet (arXiv 2102.07954).
        rivals: of `arch` and these, one alone is visited: the one whose labels' loss on the batch, looked up
            without gradients, is least (`best`) or greatest (`worst`). The first one where they are equal.
        keeps: which one.
        remembered: under this name a moving average is kept of how much greater its labels' loss is than that
            of the largest network, visited earlier in the same step; `Progress.gaps` gives it back.
    """

    arch: Arch
    learns_from: Arch | None = None
    weight: float = 1.0
    labels: float | None = None
    teacher: float = 0.0
    divergence: Divergence = "kl"
    rivals: tuple[Arch, ...] = ()
    keeps: Keeps = "best"
    remembered: str = ""

    @property
    def labels_weight(self) -> float:
        """The weight of the labels' loss."""
        if self.labels is not None:
            return self.labels
        return 1.0 if self.learns_from is None and self.teacher == 0 else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `step` of `steps`, counted from 0, with `steps_per_epoch` to an epoch.

    `gaps` holds what visits asked to be remembered.
    """

    step: int
    steps: int
    steps_per_epoch: int
    gaps: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def epoch(self) -> float:
        """Epochs behind us."""
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """The part of the run behind us."""
        return self.step / self.steps


class Strategy(Protocol):
    """A recipe: a pure function from progress and chance to the visits of one step.

    One that names this class keeps what it does not say otherwise: no sorting, and one cosine.
    """

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The visits of the step at `progress`, in the order in which they run."""
        ...

    def sorts_channels(self, space: SearchSpace, progress: Progress) -> SearchSpace | None:
        """The part of `space` that is trained already, if channels are sorted before the step at `progress`.

        Its subnets keep what they compute: only channels that all of them have, or lack, change places. None
        where nothing is sorted.
        """
        del space, progress
        return None

    def freezes_teacher(self, progress: Progress) -> bool:
        """Whether the largest network, as it is before the step at `progress`, becomes the teacher."""
        del progress
        return False

    def schedule(self, *, lr: float, warmup_steps: int, steps: int, steps_per_epoch: int) -> Schedule:
        """The learning rate of a run of `steps` steps whose highest is `lr`."""
        del steps_per_epoch
        return Cosine(lr, warmup_steps, steps)
