from __future__ import annotations

import random

import pytest

from nestling.config import TrainConfig
from nestling.space import SearchSpace
from nestling.train.strategies import DelayedShrinking, Progress, Sandwich, Strategy, Visit, make_strategy


def weights(strategy: Strategy, space: SearchSpace, step: int) -> list[float]:
    progress = Progress(step, steps=100, steps_per_epoch=10)
    return [visit.weight for visit in strategy.visits(space, progress, random.Random(0))]


def test_a_sandwich_visits_the_largest_the_smallest_and_random_ones_that_learn_from_the_largest(
    space: SearchSpace,
) -> None:
    visits = Sandwich(random_subnets=3).visits(space, Progress(0, 10, 5), random.Random(1))
    assert visits[0] == Visit(space.largest, learns_from=None, weight=1.0)
    assert visits[1] == Visit(space.smallest, learns_from=space.largest, weight=1.0)
    rng = random.Random(1)
    assert [v.arch for v in visits[2:]] == [space.sample(rng) for _ in range(3)]
    assert all(v.learns_from == space.largest and v.weight == 1.0 for v in visits[1:])


@pytest.mark.parametrize("step", [0, 5, 9])
def test_a_sandwich_is_alike_at_every_step_and_never_sorts(space: SearchSpace, step: int) -> None:
    strategy = Sandwich(random_subnets=0)
    assert len(strategy.visits(space, Progress(step, 10, 5), random.Random(0))) == 2
    assert not strategy.sorts_channels(Progress(step, 10, 5))


@pytest.mark.parametrize("strategy", [Sandwich(), DelayedShrinking(switch=0.0)])
def test_visits_depend_on_chance_alone(space: SearchSpace, strategy: Strategy) -> None:
    progress = Progress(3, 10, 5)
    drawn = [tuple(strategy.visits(space, progress, random.Random(seed))) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_the_largest_learns_alone_before_the_switch(space: SearchSpace) -> None:
    strategy = DelayedShrinking(switch=0.4, ramp_epochs=2)
    for step in (0, 20, 39):
        visits = strategy.visits(space, Progress(step, 100, 10), random.Random(0))
        assert visits == [Visit(space.largest)]
    assert len(strategy.visits(space, Progress(40, 100, 10), random.Random(0))) == 4


def test_the_weight_of_subnets_rises_linearly_over_the_ramp(space: SearchSpace) -> None:
    strategy = DelayedShrinking(switch=0.4, ramp_epochs=2)  # 20 steps from step 40 on
    expected = {40: 1 / 20, 49: 0.5, 58: 0.95, 59: 1.0, 60: 1.0, 99: 1.0}
    for step, weight in expected.items():
        assert weights(strategy, space, step) == [1.0, *[pytest.approx(weight)] * 3], step


def test_without_a_ramp_subnets_count_in_full_at_once(space: SearchSpace) -> None:
    assert weights(DelayedShrinking(switch=0.4, ramp_epochs=0), space, 40) == [1.0] * 4


def test_channels_are_sorted_once_at_the_switch() -> None:
    strategy = DelayedShrinking(switch=0.4)
    assert [s for s in range(100) if strategy.sorts_channels(Progress(s, 100, 10))] == [40]
    never = DelayedShrinking(switch=1.0)
    assert not any(never.sorts_channels(Progress(s, 100, 10)) for s in range(100))


def test_the_strategy_is_the_one_that_the_configuration_names() -> None:
    assert make_strategy(TrainConfig(strategy="sandwich", random_subnets=1)) == Sandwich(random_subnets=1)
    config = TrainConfig(switch=0.3, ramp_epochs=2.0, random_subnets=4)
    assert make_strategy(config) == DelayedShrinking(switch=0.3, ramp_epochs=2.0, random_subnets=4)


def test_progress_is_told_in_epochs_and_as_a_fraction() -> None:
    progress = Progress(step=15, steps=60, steps_per_epoch=10)
    assert (progress.epoch, progress.fraction) == (1.5, 0.25)


def test_channels_that_are_not_to_be_sorted_never_are() -> None:
    progress = Progress(step=40, steps=100, steps_per_epoch=10)
    assert DelayedShrinking(switch=0.4).sorts_channels(progress)
    assert not DelayedShrinking(switch=0.4, sort_channels=False).sorts_channels(progress)
    assert not make_strategy(TrainConfig(sort_channels=False, switch=0.4)).sorts_channels(progress)
