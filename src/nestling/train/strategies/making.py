"""The strategy that a configuration names."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from nestling.config import TrainConfig
from nestling.space import Arch, SearchSpace
from nestling.space.sampling import CostSampler, cost_uniform
from nestling.train.strategies.by_cost import Attentive, Shifting, guessing, histogram
from nestling.train.strategies.labels_only import Alone, FixedList, SinglePath, SortedNet
from nestling.train.strategies.progressive import PUBLISHED, ProgressiveShrinking, phases_of
from nestling.train.strategies.sandwich import DelayedShrinking, Sandwich
from nestling.train.strategies.visits import Strategy

_T = TypeVar("_T")


def make_strategy(
    config: TrainConfig,
    *,
    space: SearchSpace | None = None,
    cost: Callable[[Arch], float] | None = None,
    seed: int = 0,
) -> Strategy:
    """The strategy that `config` names, with its hyper-parameters.

    Args:
        config: its strategy, and the keys that it reads.
        space: what is trained; without it progressive shrinking has the published phases, whether they open
            something or not.
        cost: what an arch costs, in any unit, such as multiply-accumulates; asked for about 200 times by
            strategies that draw by cost, now and not in training.
        seed: of the archs whose cost is asked for.

    Raises:
        ValueError: the strategy needs the space or the cost, and there is none; or a subnet that is named is
            not of the space.
    """
    match config.strategy:
        case "sandwich":
            return Sandwich(
                random_subnets=config.random_subnets,
                divergence=config.divergence,
                constant_tail=config.constant_tail,
            )
        case "delayed-shrinking":
            return DelayedShrinking(
                switch=config.switch,
                ramp_epochs=config.ramp_epochs,
                random_subnets=config.random_subnets,
                sort_channels=config.sort_channels,
                divergence=config.divergence,
            )
        case "progressive-shrinking":
            return ProgressiveShrinking(
                phases=PUBLISHED if space is None else phases_of(space),
                teacher="outside" if config.teachers else "frozen",
                distilled=config.teacher_weight,
                sort_channels=config.sort_channels,
            )
        case "sorted-net":
            return SortedNet(config.random_subnets, _archs(config, space))
        case "fixed-list":
            return FixedList(_archs(config, space))
        case "single-path":
            return SinglePath(config.coarse)
        case "alone":
            return _alone(config, space)
        case "attentive":
            sampler = _sampler(config, space, cost, seed)
            return Attentive(
                sampler,
                histogram(sampler, rng=random.Random(f"histogram/{seed}")),
                candidates=config.candidates,
                keeps=config.keeps,
                random_subnets=config.random_subnets,
                divergence=config.divergence,
            )
        case "shifting":
            return Shifting(
                _sampler(config, space, cost, seed),
                floor=config.floor,
                random_subnets=config.random_subnets,
                divergence=config.divergence,
            )


def _alone(config: TrainConfig, space: SearchSpace | None) -> Alone:
    (arch,) = _archs(config, space) or (None,)
    if not config.teachers:
        return Alone(arch)
    return Alone(arch, teacher=config.teacher_weight, labels=config.teacher_labels)


def _archs(config: TrainConfig, space: SearchSpace | None) -> tuple[Arch, ...]:
    """The archs that `config` names or spreads, each once; none where it does neither."""
    if not config.subnets and config.spread is None:
        return ()
    space = _needed(space, config, "the search space")
    if config.spread is not None:
        return tuple(space.spread(config.spread))
    named = (space.canonical(Arch.from_json(text)) for text in config.subnets)
    return tuple(dict.fromkeys(named))


def _sampler(
    config: TrainConfig, space: SearchSpace | None, cost: Callable[[Arch], float] | None, seed: int
) -> CostSampler:
    space = _needed(space, config, "the search space")
    cost = _needed(cost, config, "the cost of an arch")
    rng = random.Random(f"costs/{seed}")
    return guessing(cost_uniform(space, cost, rng=rng, bins=config.cost_bins))


def _needed(given: _T | None, config: TrainConfig, what: str) -> _T:
    if given is None:
        raise ValueError(f"the strategy {config.strategy!r} needs {what}; give it to make_strategy")
    return given
