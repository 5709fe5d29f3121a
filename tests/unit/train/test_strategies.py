from __future__ import annotations

import random

import pytest

from nestling.space import Arch, Choice, SearchSpace
from nestling.train.schedules import Cosine
from nestling.train.strategies import (
    Alone,
    DelayedShrinking,
    FixedList,
    Progress,
    Sandwich,
    SinglePath,
    SortedNet,
    Strategy,
    Visit,
)


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
    assert strategy.sorts_channels(space, Progress(step, 10, 5)) is None


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


def test_a_ramp_longer_than_what_is_left_ends_with_the_run(space: SearchSpace) -> None:
    strategy = DelayedShrinking(switch=0.4, ramp_epochs=1000)  # 60 steps from step 40 on
    assert weights(strategy, space, 40)[1] == pytest.approx(1 / 60)
    assert weights(strategy, space, 99) == [1.0] * 4


def test_without_a_ramp_subnets_count_in_full_at_once(space: SearchSpace) -> None:
    assert weights(DelayedShrinking(switch=0.4, ramp_epochs=0), space, 40) == [1.0] * 4


def test_channels_are_sorted_once_at_the_switch_and_spare_the_largest(space: SearchSpace) -> None:
    strategy = DelayedShrinking(switch=0.4)
    parts = {s: strategy.sorts_channels(space, Progress(s, 100, 10)) for s in range(100)}
    sorts = {step: part for step, part in parts.items() if part is not None}
    assert list(sorts) == [40]
    assert sorts[40].smallest == sorts[40].largest == space.largest
    never = DelayedShrinking(switch=1.0)
    assert all(never.sorts_channels(space, Progress(s, 100, 10)) is None for s in range(100))


def test_a_sandwich_without_its_tail_has_the_cosine_that_alphanet_has() -> None:
    strategy = Sandwich(divergence="alpha", constant_tail=False)
    assert strategy.schedule(lr=0.1, warmup_steps=2, steps=50, steps_per_epoch=5) == Cosine(0.1, 2, 50)


def test_the_divergence_is_that_of_every_taught_visit(space: SearchSpace) -> None:
    for strategy in (Sandwich(divergence="alpha"), DelayedShrinking(switch=0.0, divergence="alpha")):
        visits = strategy.visits(space, Progress(0, 10, 5), random.Random(0))
        assert [visit.divergence for visit in visits[1:]] == ["alpha"] * 3


def test_the_tail_of_a_sandwich_begins_halfway_as_published() -> None:
    # 2.4 of 450 epochs a stair: 99 stairs of 3 % bring the rate below 5 %
    schedule = Sandwich().schedule(lr=0.256, warmup_steps=30, steps=4500, steps_per_epoch=10)
    assert schedule.at(23) == pytest.approx(0.256 * 24 / 30)
    assert schedule.at(30) == pytest.approx(0.256 * 0.97)
    assert schedule.at(24 * 98) == pytest.approx(0.256 * 0.97**98)
    assert schedule.at(24 * 99) == schedule.at(4499) == pytest.approx(0.05 * 0.256)


def test_alone_one_network_learns_from_labels_or_from_teachers(space: SearchSpace) -> None:
    progress, rng = Progress(0, 10, 5), random.Random(0)
    assert Alone().visits(space, progress, rng) == [Visit(space.largest)]
    assert Alone(space.smallest).visits(space, progress, rng) == [Visit(space.smallest)]
    (taught,) = Alone(teacher=0.5).visits(space, progress, rng)
    assert (taught.arch, taught.teacher, taught.labels_weight) == (space.largest, 0.5, 0.0)
    (both,) = Alone(teacher=0.5, labels=0.1).visits(space, progress, rng)
    assert both.labels_weight == 0.1


def test_a_single_path_is_one_random_subnet_with_labels(space: SearchSpace) -> None:
    visits = SinglePath().visits(space, Progress(0, 10, 5), random.Random(4))
    assert visits == [Visit(space.sample(random.Random(4)))]


def test_single_path_draws_the_lowest_resolution_alone_in_its_coarse_part(space: SearchSpace) -> None:
    wide = SearchSpace(space.family, (*space.choices, Choice("resolution", (16, 24))))
    strategy = SinglePath(coarse=0.5)
    drawn = [strategy.visits(wide, Progress(s, 40, 5), random.Random(s))[0].arch for s in range(40)]
    assert {arch["resolution"] for arch in drawn[:20]} == {16}
    assert {arch["resolution"] for arch in drawn[20:]} == {16, 24}
    assert len(set(drawn[:20])) > 1
    assert strategy.visits(space, Progress(0, 40, 5), random.Random(0))  # a space without resolutions
    with pytest.raises(ValueError, match=r"coarse is 1.5"):
        SinglePath(coarse=1.5)


def test_a_sorted_net_draws_uniformly_from_its_nested_set(space: SearchSpace) -> None:
    nested = tuple(space.spread(3))
    drawn: list[Arch] = []
    for seed in range(100):
        visits = SortedNet(3, nested).visits(space, Progress(seed, 100, 5), random.Random(seed))
        assert all(visit == Visit(visit.arch) for visit in visits)
        drawn += [visit.arch for visit in visits]
    counts = [drawn.count(arch) for arch in nested]
    assert sum(counts) == 300
    assert min(counts) > 70  # expected 100, standard deviation 8


def test_without_a_set_a_sorted_net_draws_from_the_space(space: SearchSpace) -> None:
    rng = random.Random(2)
    visits = SortedNet(4).visits(space, Progress(0, 10, 5), random.Random(2))
    assert [visit.arch for visit in visits] == [space.sample(rng) for _ in range(4)]


def test_a_fixed_list_is_visited_whole_and_its_losses_are_averaged(space: SearchSpace) -> None:
    archs = tuple(space.spread(3))
    visits = FixedList(archs).visits(space, Progress(7, 10, 5), random.Random(2))
    assert visits == [Visit(arch, weight=1 / 3) for arch in archs]
    with pytest.raises(ValueError, match="names at least one"):
        FixedList(())


def test_progress_is_told_in_epochs_and_as_a_fraction() -> None:
    progress = Progress(step=15, steps=60, steps_per_epoch=10)
    assert (progress.epoch, progress.fraction) == (1.5, 0.25)
