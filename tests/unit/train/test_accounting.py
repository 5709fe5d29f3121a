from __future__ import annotations

import random

import pytest

from nestling.space import Arch, SearchSpace
from nestling.train.strategies import Alone, DelayedShrinking, Progress, Sandwich, Visit
from nestling.train.strategies.accounting import training_macs, visits_macs


def macs(arch: Arch) -> float:
    return float(arch.integer("hidden") * arch.integer("depth"))  # 3 to 16


def test_a_visit_counts_three_forward_passes(space: SearchSpace) -> None:
    assert visits_macs([Visit(space.largest), Visit(space.smallest, weight=0.1)], macs) == 3 * 16 + 3 * 3


def test_a_visit_that_only_teaches_counts_one_forward_pass(space: SearchSpace) -> None:
    assert visits_macs([Visit(space.largest, weight=0.0)], macs) == 16


def test_a_contest_counts_every_look_ahead_and_a_visit_of_their_mean(space: SearchSpace) -> None:
    rivals = tuple(space.canonical({"hidden": 5, "depth": depth}) for depth in (1, 2))
    assert visits_macs([Visit(space.smallest, rivals=rivals)], macs) == (3 + 5 + 10) + 3 * 6


def test_teachers_outside_count_once_a_step_in_which_they_are_asked(space: SearchSpace) -> None:
    taught = [Visit(space.smallest, teacher=1.0)] * 2
    assert visits_macs(taught, macs, teachers_macs=100.0) == 2 * 9 + 100
    assert visits_macs([Visit(space.smallest)], macs, teachers_macs=100.0) == 9


def test_a_run_costs_what_its_phases_do(space: SearchSpace) -> None:
    strategy = DelayedShrinking(switch=0.25, random_subnets=0)
    found = training_macs(strategy, space, macs, steps=960, steps_per_epoch=10)
    assert found == pytest.approx(240 * 3 * 16 + 720 * 3 * (16 + 3))


def test_a_run_of_fewer_steps_than_are_looked_at_costs_each_of_them_once(space: SearchSpace) -> None:
    assert training_macs(Alone(), space, macs, steps=7, steps_per_epoch=10) == pytest.approx(7 * 48)


def test_a_forecast_is_near_the_sum_over_all_steps(space: SearchSpace) -> None:
    strategy = Sandwich(random_subnets=2)
    exact = sum(
        visits_macs(strategy.visits(space, Progress(step, 600, 10), random.Random(step)), macs)
        for step in range(600)
    )
    assert training_macs(strategy, space, macs, steps=600, steps_per_epoch=10) == pytest.approx(
        exact, rel=0.05
    )
