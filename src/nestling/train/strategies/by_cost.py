"""Recipes that draw subnets by what they cost: AttentiveNAS, and bins that follow what is still to learn."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from nestling.space import Arch, SearchSpace
from nestling.space.sampling import CostSampler
from nestling.train.strategies.visits import Divergence, Keeps, Progress, Strategy, Visit

_HISTOGRAM_ARCHS = 2000


@dataclass(frozen=True, slots=True)
class Attentive(Strategy):
    """Attentive sampling (AttentiveNAS, Wang et al. 2021, arXiv 2011.09011): BestUp and WorstUp.

    A sandwich whose random subnets are the winners of a look ahead: a cost is drawn as it occurs among random
    archs, then `candidates` archs of that cost, and the one that does best on the batch (`best`), or worst,
    learns from the largest network. Published with 2 random subnets and 3 candidates, each gradient clipped
    at 1.0, the learning rate along a cosine.

    Attributes:
        sampler: draws archs of a cost; `guessing` makes it fast.
        likelihoods: for each of its cost bins, how often it is drawn, unnormalised; see `histogram`.
        candidates: how many archs compete.
        keeps: which one wins.
        random_subnets: how many winners a step has.
        divergence: between their soft labels and the largest's.

    Raises:
        ValueError: no candidates, or another number of likelihoods than of bins.
    """

    sampler: CostSampler
    likelihoods: tuple[float, ...]
    candidates: int = 3
    keeps: Keeps = "best"
    random_subnets: int = 2
    divergence: Divergence = "kl"

    def __post_init__(self) -> None:
        bins = len(self.sampler.tilts)
        if self.candidates < 1 or len(self.likelihoods) != bins:
            raise ValueError(
                f"{self.candidates} candidates and {len(self.likelihoods)} likelihoods for {bins} cost bins; "
                "give at least 1, and one for each bin"
            )

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest, the smallest, and contests between archs of one cost each."""
        del progress  # every step is alike
        largest = Visit(space.largest)
        taught = Visit(space.smallest, learns_from=space.largest, divergence=self.divergence)
        return [largest, taught, *(self._contest(taught, rng) for _ in range(self.random_subnets))]

    def _contest(self, taught: Visit, rng: random.Random) -> Visit:
        index = rng.choices(range(len(self.likelihoods)), self.likelihoods)[0]
        drawn = dict.fromkeys(self.sampler.within(index, rng) for _ in range(self.candidates))
        first, *rivals = drawn
        return replace(taught, arch=first, rivals=tuple(rivals), keeps=self.keeps)


@dataclass(frozen=True, slots=True)
class Shifting(Strategy):
    """A sandwich whose random subnets come from the costs that have most left to learn.

    After ShiftNAS (Zhang et al. 2023, arXiv 2307.08300), which learns the likelihood of each bin of costs
    from gradients on validation images, and archs from a recurrent network. Here a bin's likelihood follows a
    moving average of how much greater the labels' loss of its subnets is than the largest network's, with no
    network beside; the part `floor` of all draws is uniform over bins, so that each one is seen again.

    Attributes:
        sampler: draws archs of a cost; `guessing` makes it fast.
        floor: the part of draws that is uniform.
        random_subnets: how many subnets a step draws, beside the largest and the smallest.
        divergence: between their soft labels and the largest's.

    Raises:
        ValueError: `floor` is not above 0, or above 1.
    """

    sampler: CostSampler
    floor: float = 0.25
    random_subnets: int = 2
    divergence: Divergence = "kl"

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; give a part above 0, at most 1")

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """The largest, the smallest, and archs of drawn costs, whose gaps are remembered."""
        taught = Visit(space.smallest, learns_from=space.largest, divergence=self.divergence)
        likelihoods = self.likelihoods(progress)
        visits = [Visit(space.largest), taught]
        for index in rng.choices(range(len(likelihoods)), likelihoods, k=self.random_subnets):
            arch = self.sampler.within(index, rng)
            visits.append(replace(taught, arch=arch, remembered=f"cost bin {index}"))
        return visits

    def likelihoods(self, progress: Progress) -> list[float]:
        """How likely each cost bin is to be drawn, summing up to 1.

        A bin that nothing is known of yet counts like the one with the widest gap.
        """
        bins = range(len(self.sampler.tilts))
        known = {i: progress.gaps[f"cost bin {i}"] for i in bins if f"cost bin {i}" in progress.gaps}
        widest = max([0.0, *known.values()])
        gaps = [max(0.0, known.get(index, widest)) for index in bins]
        total = sum(gaps)
        shares = [gap / total for gap in gaps] if total > 0 else [1 / len(bins) for _ in bins]
        return [self.floor / len(bins) + (1 - self.floor) * share for share in shares]


def guessing(sampler: CostSampler) -> CostSampler:
    """`sampler` that takes its model's guess for the cost of an arch.

    Within training an arch is drawn several times a step, and an exact cost takes as long as a small
    network's forward pass. Costs only sort archs into bins there.
    """
    model, least = sampler.model, sampler.edges[0]

    def cost(arch: Arch) -> float:
        guess = max(model.guess(arch), model.scaled(least))
        return math.exp(guess) if model.power == 0 else guess ** (1 / model.power)

    return replace(sampler, cost=cost)


def histogram(
    sampler: CostSampler, *, rng: random.Random, archs: int = _HISTOGRAM_ARCHS
) -> tuple[float, ...]:
    """How often each cost bin is met when every choice is drawn uniformly: counts, at least 1."""
    counts = [1.0] * len(sampler.tilts)
    for _ in range(archs):
        counts[sampler.bin_of(sampler.cost(sampler.space.sample(rng)))] += 1
    return tuple(counts)
