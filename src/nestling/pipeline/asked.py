"""Which of a run's networks are evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestling.config import ConfigError
from nestling.pipeline.policies import is_precision
from nestling.pipeline.studies import searched
from nestling.pipeline.workbench import Workbench
from nestling.search import spread_along_front
from nestling.space import Arch, SearchSpace
from nestling.space.sampling import stratified


@dataclass(frozen=True, slots=True)
class Asked:
    """Which networks are to be evaluated."""

    subnets: Sequence[Arch]
    alone: Sequence[Arch]
    front: Sequence[Arch]
    epochs: float
    extremes: tuple[int, int]
    """The multiply-accumulates of the space's smallest and largest network."""


def check_numbers(subnets: int, alone: int, epochs: float | None) -> None:
    """Refuses numbers that no evaluation can be made of.

    Raises:
        ConfigError: they are too small, too large, or do not fit together.
    """
    if subnets < 2:
        raise ConfigError(f"subnets is {subnets}; a curve needs at least 2, the smallest and the largest")
    if not 0 <= alone <= subnets:
        raise ConfigError(f"alone is {alone}; of {subnets} subnets, 0 to {subnets} can be trained alone")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError(f"epochs is {epochs:g}; it must be above 0")


def ask(bench: Workbench, subnets: int, alone: int, epochs: float | None) -> Asked:
    """Which networks are evaluated: the same for the same run and numbers.

    Raises:
        ConfigError: all networks of the space cost the same.
    """
    space = float_space(bench.space)
    extremes = bench.macs(space.smallest), bench.macs(space.largest)
    if not 0 < extremes[0] < extremes[1]:
        raise ConfigError(
            f"the smallest network of the space computes {extremes[0]:,} MACs and the largest "
            f"{extremes[1]:,}; an accuracy-MACs curve needs networks that differ in them"
        )
    between: list[Arch] = []
    if subnets > 2:
        # 1 above the logarithm, as a cost must be above 0: equal bins of it are equal ratios of MACs
        between = stratified(
            space,
            lambda arch: 1 + math.log(bench.macs(arch) / extremes[0]),
            subnets - 2,
            seed=bench.config.seed,
        )
    chosen = sorted({space.smallest: 0, space.largest: 0} | dict.fromkeys(between), key=bench.macs)
    return Asked(
        subnets=chosen,
        alone=[chosen[index] for index in paired_indices(len(chosen), min(alone, len(chosen)))],
        front=_front(bench, space),
        epochs=bench.config.train.epochs if epochs is None else epochs,
        extremes=extremes,
    )


def float_space(space: SearchSpace) -> SearchSpace:
    """The part of `space` in which each `*.precision` choice has its last, finest value."""
    finest = {c.name: c.values[-1:] for c in space.choices if is_precision(c.name)}
    return space.only(finest)


def paired_indices(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 to `count` - 1, ascending: pairs of neighbours, spread evenly.

    The last is always among them, from three on the first is too. Of an odd number the last has no partner.
    """
    pairs = (wanted + 1) // 2
    if pairs < 2:
        return list(range(count - wanted, count))
    if 2 * pairs > count:
        return list(range(count))
    starts = [math.floor(start) for start in np.linspace(0, count - 2, pairs)]
    indices = [index for start in starts for index in (start, start + 1)]
    return indices if wanted % 2 == 0 else [*indices[:-2], indices[-1]]


def _front(bench: Workbench, space: SearchSpace) -> list[Arch]:
    """The members of the searched front that an export hands over, as archs of the float `space`."""
    result = searched(bench)
    finest = {c.name: c.values[-1] for c in space.choices if is_precision(c.name)}
    members = spread_along_front(result, bench.config.export.members)
    return list(dict.fromkeys(space.canonical({**trial.arch, **finest}) for trial in members))
