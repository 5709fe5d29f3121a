"""Learning rates as data: how each recipe's falls over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class Schedule(Protocol):
    """A learning rate for each step of a run."""

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        ...


@dataclass(frozen=True, slots=True)
class Cosine:
    """A learning rate that rises linearly, then falls along one cosine over the whole run."""

    lr: float
    warmup_steps: int
    steps: int

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        along = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * self.lr * (1 + math.cos(math.pi * along))


@dataclass(frozen=True, slots=True)
class ExponentialTail:
    """A learning rate that falls exponentially, by stairs, and stays where it reaches a floor.

    Of BigNAS (Yu et al. 2020, arXiv 2003.11142): while the small networks still learn, a constant tail lets
    the large ones swing, which keeps them from overfitting.

    Attributes:
        lr: the highest.
        warmup_steps: over which it rises linearly.
        stair_steps: after how many steps, counted from the first, it falls.
        factor: by what it is multiplied then.
        floor: the part of `lr` below which it does not fall.
    """

    lr: float
    warmup_steps: int
    stair_steps: float
    factor: float = 0.97
    floor: float = 0.05

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        stairs = int(step // self.stair_steps)
        return self.lr * max(self.floor, math.pow(self.factor, stairs))


STAIRS = 450 / 2.4
"""How often BigNAS's learning rate falls: every 2.4 of 450 epochs."""


def with_tail(lr: float, warmup_steps: int, steps: int) -> ExponentialTail:
    """BigNAS's learning rate, brought to a run of `steps`: it falls as often, and so as far."""
    return ExponentialTail(lr, warmup_steps, stair_steps=steps / STAIRS)


@dataclass(frozen=True, slots=True)
class Phases:
    """A learning rate that begins anew with each phase of a run (Cai et al. 2020, arXiv 1908.09791).

    Attributes:
        starts: the first step of each phase, ascending, the first one 0.
        schedules: of each phase, its steps counted from the phase's first.

    Raises:
        ValueError: another number of schedules than of starts, or starts that do not ascend from 0.
    """

    starts: tuple[int, ...]
    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        ascending = all(a <= b for a, b in pairwise(self.starts))
        if len(self.starts) != len(self.schedules) or self.starts[:1] != (0,) or not ascending:
            raise ValueError(
                f"{len(self.schedules)} schedules begin at the steps {list(self.starts)}; "
                "give as many starts, ascending from 0"
            )

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        phase = max(i for i, start in enumerate(self.starts) if start <= max(step, 0))
        return self.schedules[phase].at(step - self.starts[phase])
