"""What a strategy costs in multiply-accumulates: for forecasts, and for comparisons at equal compute."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from nestling.space import Arch, SearchSpace
from nestling.train.strategies.visits import Progress, Strategy, Visit

BACKWARD = 3.0
"""A forward and a backward pass cost three forward passes."""

SAMPLED_STEPS = 48


def visits_macs(
    visits: Iterable[Visit], macs: Callable[[Arch], float], *, teachers_macs: float = 0.0
) -> float:
    """The multiply-accumulates for each image of one step with `visits`.

    A visit counts its forward pass and twice as much for its backward pass; one without weight its forward
    pass alone; a contest the forward passes of all rivals, and a visit of their mean cost, as who wins is not
    known before. Teachers outside the supernet count once a step in which they are asked.

    Args:
        visits: of one step.
        macs: of an arch's forward pass on one image.
        teachers_macs: of one forward pass of all teachers.
    """
    total, asks = 0.0, False
    for visit in visits:
        costs = [macs(arch) for arch in (visit.arch, *visit.rivals)]
        look_ahead = sum(costs) if visit.rivals else 0.0
        total += look_ahead + sum(costs) / len(costs) * (BACKWARD if visit.weight else 1.0)
        asks |= visit.teacher > 0
    return total + (teachers_macs if asks else 0.0)


def forward_passes(visits: Sequence[Visit], winners: Sequence[Arch]) -> Counter[Arch]:
    """How many forward passes' worth each arch had in a step, by the rule of `visits_macs`.

    Of a contest the winner is known here: `winners` holds the arch that each of `visits` was made with.
    """
    passes: Counter[Arch] = Counter()
    for visit, winner in zip(visits, winners, strict=True):
        if visit.rivals:
            passes.update((visit.arch, *visit.rivals))
        passes[winner] += int(BACKWARD) if visit.weight else 1
    return passes


def training_macs(
    strategy: Strategy,
    space: SearchSpace,
    macs: Callable[[Arch], float],
    *,
    steps: int,
    steps_per_epoch: int,
    teachers_macs: float = 0.0,
    sampled: int = SAMPLED_STEPS,
    part: tuple[int, int] | None = None,
) -> float:
    """The multiply-accumulates for each image of a batch, of a run of `steps` steps, forecast from some.

    The steps that are looked at are the middles of equal parts of what is counted; archs are drawn from a
    seed.

    Args:
        strategy: whose visits are counted.
        space: what is trained.
        macs: of an arch's forward pass on one image.
        steps: of the run.
        steps_per_epoch: of the data.
        teachers_macs: of one forward pass of all teachers.
        sampled: how many steps are looked at.
        part: counts these steps of the run alone, from the first up to, without, the last.
    """
    first, end = part or (0, steps)
    total = 0.0
    for index in range(sampled):
        step = first + int((index + 0.5) * (end - first) / sampled)
        # chance by the index and not by the step: runs of any length draw alike, and a longer one costs more
        visits = strategy.visits(
            space, Progress(step, steps, steps_per_epoch), random.Random(f"forecast/{index}")
        )
        total += visits_macs(visits, macs, teachers_macs=teachers_macs)
    return total / sampled * (end - first)
