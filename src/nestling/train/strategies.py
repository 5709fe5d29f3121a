"""Training strategies: which subnets a step visits, what each learns from, and how much it counts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from nestling.config import TrainConfig
from nestling.space import Arch, SearchSpace


@dataclass(frozen=True, slots=True)
class Visit:
    """One subnet's forward and backward pass within a step.

    Attributes:
        arch: the subnet.
        learns_from: the arch whose soft labels it learns from, visited earlier in the same step; None: the
            labels.
        weight: factor of its loss.
    """

    arch: Arch
    learns_from: Arch | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `step` of `steps`, counted from 0, with `steps_per_epoch` to an epoch."""

    step: int
    steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs behind us."""
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """The part of the run behind us."""
        return self.step / self.steps


class Strategy(Protocol):
    """A recipe: a pure function from progress and chance to the visits of one step."""

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The visits of the step at `progress`, in the order in which they run."""
        ...

    def sorts_channels(self, progress: Progress) -> bool:
        """Whether channels are sorted by importance before the step at `progress`."""
        ...


@dataclass(frozen=True, slots=True)
class Sandwich:
    """The sandwich rule with in-place distillation (BigNAS, Yu et al. 2020, arXiv 2003.11142).

    Every step visits the largest network, which learns from the labels, then the smallest and
    `random_subnets` random ones, which learn only from the largest's soft labels of the same step.
    """

    random_subnets: int = 2

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest, the smallest and the random ones."""
        del progress  # every step is alike
        return _sandwich(space, rng, random_subnets=self.random_subnets, weight=1.0)

    def sorts_channels(self, progress: Progress) -> bool:
        """Never."""
        del progress
        return False


@dataclass(frozen=True, slots=True)
class DelayedShrinking:
    """Delayed shrinking (DepS, Annavajjala et al. 2024, arXiv 2407.06167).

    The largest network learns alone for the part `switch` of the run. Then its channels are sorted once, and
    every step is a sandwich in which the weight of all but the largest rises linearly from 0 to 1 over
    `ramp_epochs`. The paper states the ramp as an effective learning rate of the subnets; as the learning
    rate hardly changes in a few epochs, that is this weight. Published with the switch at 54 % of 270 epochs
    and a ramp of 5. Without `sort_channels` they keep their places, as those of a network do that was sorted
    before, or cannot be.
    """

    switch: float = 0.5
    ramp_epochs: float = 5.0
    random_subnets: int = 2
    sort_channels: bool = True

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest alone before the switch, a sandwich with rising weight after it."""
        since = progress.step - self._first_shrinking_step(progress)
        if since < 0:
            return [Visit(space.largest)]
        ramp_steps = self.ramp_epochs * progress.steps_per_epoch
        weight = min(1.0, (since + 1) / ramp_steps) if ramp_steps else 1.0
        return _sandwich(space, rng, random_subnets=self.random_subnets, weight=weight)

    def sorts_channels(self, progress: Progress) -> bool:
        """At the switch."""
        return self.sort_channels and progress.step == self._first_shrinking_step(progress)

    def _first_shrinking_step(self, progress: Progress) -> int:
        return round(self.switch * progress.steps)


def make_strategy(config: TrainConfig) -> Strategy:
    """The strategy that `config` names, with its hyper-parameters."""
    if config.strategy == "sandwich":
        return Sandwich(random_subnets=config.random_subnets)
    return DelayedShrinking(
        switch=config.switch,
        ramp_epochs=config.ramp_epochs,
        random_subnets=config.random_subnets,
        sort_channels=config.sort_channels,
    )


def _sandwich(space: SearchSpace, rng: random.Random, *, random_subnets: int, weight: float) -> list[Visit]:
    largest = space.largest
    others = [space.smallest, *(space.sample(rng) for _ in range(random_subnets))]
    return [Visit(largest), *(Visit(arch, learns_from=largest, weight=weight) for arch in others)]
