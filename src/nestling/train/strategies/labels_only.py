"""Recipes without in-place distillation: every subnet learns from the labels, or from teachers outside."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nestling.space import Arch, SearchSpace
from nestling.train.schedules import Cosine, Schedule, with_tail
from nestling.train.strategies.visits import Progress, Strategy, Visit


@dataclass(frozen=True, slots=True)
class Alone(Strategy):
    """One network trained by itself, in the supernet's place: the reference for its shared weights.

    With `teacher` above 0 it learns from the averaged soft labels of teachers outside the supernet, without
    labels unless `labels` gives them a weight (MEAL V2, Shen & Savvides 2020, arXiv 2009.08453, uses none).

    As within a supernet, the space's largest network alone has dropout and stochastic depth: what a smaller
    one reaches by itself compares with what it reaches there.

    Attributes:
        arch: the network; None: the largest.
        teacher: the weight of the teachers' soft labels.
        labels: the weight of the labels beside them.
        constant_tail: whether the learning rate is BigNAS's, as that of a `Sandwich` can be, or one cosine.
    """

    arch: Arch | None = None
    teacher: float = 0.0
    labels: float | None = None
    constant_tail: bool = False

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The one network."""
        del progress, rng  # every step is alike
        arch = space.largest if self.arch is None else self.arch
        return [Visit(arch, teacher=self.teacher, labels=self.labels)]

    def schedule(self, *, lr: float, warmup_steps: int, steps: int, steps_per_epoch: int) -> Schedule:
        """An exponential fall with a constant tail, or one cosine."""
        del steps_per_epoch
        return with_tail(lr, warmup_steps, steps) if self.constant_tail else Cosine(lr, warmup_steps, steps)


@dataclass(frozen=True, slots=True)
class SinglePath(Strategy):
    """Single path one-shot (SPOS, Guo et al. 2020, arXiv 1904.00420): one random subnet a step, from labels.

    Every choice is drawn uniformly. The paper lets the learning rate fall linearly, here it is a cosine.

    For the part `coarse` of the run, its first, images have the lowest resolution of the space, so that the
    same compute buys more steps, as in progressive resizing (EfficientNetV2, Tan & Le 2021, arXiv
    2104.00298). The paper has none of it.

    Raises:
        ValueError: `coarse` is not from 0 to 1.
    """

    coarse: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.coarse <= 1:
            raise ValueError(f"coarse is {self.coarse}; give a part of the run, from 0 to 1")

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """One random subnet."""
        arch = space.sample(rng)
        resolutions = space.by_name.get("resolution")
        if resolutions is not None and progress.fraction < self.coarse:
            arch = space.canonical({**arch, "resolution": resolutions.values[0]})
        return [Visit(arch)]


@dataclass(frozen=True, slots=True)
class SortedNet(Strategy):
    """Sorted training (SortedNet, Valipour et al. 2023, arXiv 2309.00255).

    A step adds up the gradients of `random_subnets` subnets, each drawn uniformly from a set of nested ones
    and learning from the labels. All see the same batch, where the paper gives each one its own.

    Attributes:
        random_subnets: how many subnets a step visits.
        archs: the nested set; empty: the whole space, each choice drawn uniformly.
    """

    random_subnets: int = 2
    archs: tuple[Arch, ...] = ()

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The random subnets."""
        del progress  # every step is alike
        drawn = (
            rng.choice(self.archs) if self.archs else space.sample(rng) for _ in range(self.random_subnets)
        )
        return [Visit(arch) for arch in drawn]


@dataclass(frozen=True, slots=True)
class FixedList(Strategy):
    """A fixed list of subnets, all of them in each step (Starbucks, Zhuang et al. 2024, arXiv 2410.13230).

    The loss is the mean of the subnets' losses against the labels. The paper lists 6 pairs of depth and width
    of a text encoder, from small to large, and found them better than pairs drawn at random.

    Raises:
        ValueError: no archs.
    """

    archs: tuple[Arch, ...]

    def __post_init__(self) -> None:
        if not self.archs:
            raise ValueError("a fixed list of subnets names at least one")

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """All of the list, in its order."""
        del space, progress, rng  # every step is alike
        return [Visit(arch, weight=1 / len(self.archs)) for arch in self.archs]
