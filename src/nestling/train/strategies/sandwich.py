"""Recipes in which the largest network teaches the others within each step: BigNAS, AlphaNet, DepS."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nestling.space import SearchSpace
from nestling.train.schedules import Cosine, Schedule, with_tail
from nestling.train.strategies.visits import Divergence, Progress, Strategy, Visit


@dataclass(frozen=True, slots=True)
class Sandwich(Strategy):
    """The sandwich rule with in-place distillation (BigNAS, Yu et al. 2020, arXiv 2003.11142).

    Every step visits the largest network, which learns from the labels, then the smallest and
    `random_subnets` random ones, which learn only from the largest's soft labels of the same step. With the
    divergence `alpha` it is AlphaNet (Wang et al. 2021, arXiv 2102.07954), which also clips each gradient at
    1.0 and lets the learning rate fall along a cosine.

    With `constant_tail` the learning rate falls by 3 % every 2.4 of 450 epochs (shorter runs: as often, and
    so as far), down to 5 %, where it stays for the second half of the run.
    """

    random_subnets: int = 2
    divergence: Divergence = "kl"
    constant_tail: bool = True

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest, the smallest and the random ones."""
        del progress  # every step is alike
        return sandwich(space, rng, random_subnets=self.random_subnets, divergence=self.divergence)

    def schedule(self, *, lr: float, warmup_steps: int, steps: int, steps_per_epoch: int) -> Schedule:
        """An exponential fall with a constant tail, or one cosine."""
        del steps_per_epoch
        return with_tail(lr, warmup_steps, steps) if self.constant_tail else Cosine(lr, warmup_steps, steps)


@dataclass(frozen=True, slots=True)
class DelayedShrinking(Strategy):
    """Delayed shrinking (DepS, Annavajjala et al. 2024, arXiv 2407.06167).

    The largest network learns alone for the part `switch` of the run. Then its channels are sorted once, and
    every step is a sandwich in which the weight of all but the largest rises linearly from 0 to 1 over
    `ramp_epochs`. The paper states the ramp as an effective learning rate of the subnets; as the learning
    rate hardly changes in a few epochs, that is this weight. Where less is left of the run than the ramp is
    long, it rises to 1 over what is left. Published with the switch at 54 % of 270 epochs
    and a ramp of 5. Without `sort_channels` they keep their places, as those of a network do that was sorted
    before, or cannot be.
    """

    switch: float = 0.5
    ramp_epochs: float = 5.0
    random_subnets: int = 2
    sort_channels: bool = True
    divergence: Divergence = "kl"

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest alone before the switch, a sandwich with rising weight after it."""
        since = progress.step - self._first_shrinking_step(progress)
        if since < 0:
            return [Visit(space.largest)]
        left = progress.steps - self._first_shrinking_step(progress)
        ramp_steps = min(self.ramp_epochs * progress.steps_per_epoch, left)
        weight = min(1.0, (since + 1) / ramp_steps) if ramp_steps else 1.0
        return sandwich(
            space, rng, random_subnets=self.random_subnets, weight=weight, divergence=self.divergence
        )

    def sorts_channels(self, space: SearchSpace, progress: Progress) -> SearchSpace | None:
        """At the switch, when the largest network alone is trained."""
        if not self.sort_channels or progress.step != self._first_shrinking_step(progress):
            return None
        return space.only({choice.name: choice.values[-1:] for choice in space.open_choices})

    def _first_shrinking_step(self, progress: Progress) -> int:
        return round(self.switch * progress.steps)


def sandwich(
    space: SearchSpace,
    rng: random.Random,
    *,
    random_subnets: int,
    weight: float = 1.0,
    divergence: Divergence = "kl",
) -> list[Visit]:
    """The visits of one step: the largest learns from labels, the smallest and random ones from it."""
    largest = space.largest
    others = [space.smallest, *(space.sample(rng) for _ in range(random_subnets))]
    return [
        Visit(largest),
        *(Visit(arch, learns_from=largest, weight=weight, divergence=divergence) for arch in others),
    ]
