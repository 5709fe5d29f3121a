from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nestling.data import Batch
from nestling.energy import Part
from nestling.space import Arch, Choice, SearchSpace
from nestling.train.account import KEPT_ARCHS, Account
from nestling.train.distributed import Ranks
from nestling.train.strategies import Alone, DelayedShrinking, Progress, Sandwich, Strategy, Visit
from nestling.train.strategies.accounting import forward_passes, training_macs, visits_macs

IMAGES = 8
LARGE = SearchSpace(
    "mobilenet", tuple(Choice(f"s{n}.width", tuple(range(1, 11))) for n in range(1, 6))
)  # 100,000 archs


def macs(arch: Arch) -> float:
    return float(math.prod(value for value in dict(arch).values() if isinstance(value, int)))


def batch(images: int = IMAGES, side: int = 4) -> Batch:
    return Batch(torch.zeros(images, 3, side, side), torch.zeros(images, dtype=torch.long))


def winners(visits: list[Visit]) -> list[Arch]:
    return [visit.rivals[-1] if visit.rivals else visit.arch for visit in visits]


def follow(account: Account, strategy: Strategy, space: SearchSpace, steps: range, total: int) -> float:
    """Takes the steps into `account`; the multiply-accumulates that `visits_macs` counts in them."""
    exact = 0.0
    for step in steps:
        progress = Progress(step, total, 10)
        visits = strategy.visits(space, progress, random.Random(step))
        account.step(progress, visits, winners(visits), batch=batch())
        exact += visits_macs(visits, macs) * IMAGES
    return exact


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Counter:
    """A meter that the test turns."""

    def __init__(self, part: Part) -> None:
        self.part: Part = part
        self.total = 1000.0

    def joules(self) -> float:
        return self.total


def test_winners_of_contests_count_once_more_than_those_who_lost(space: SearchSpace) -> None:
    first, second = (space.canonical({"hidden": 5, "depth": depth}) for depth in (1, 2))
    visits = [Visit(space.largest, weight=0.0), Visit(first, rivals=(second,))]
    assert forward_passes(visits, [space.largest, second]) == {space.largest: 1, first: 1, second: 4}
    # had each an even chance to win, it is what is forecast
    costs = [
        sum(macs(arch) * count for arch, count in forward_passes(visits, [space.largest, winner]).items())
        for winner in (first, second)
    ]
    assert sum(costs) / 2 == visits_macs(visits, macs)


@pytest.mark.parametrize("strategy", [Alone(), DelayedShrinking(switch=0.25, random_subnets=0), Sandwich(2)])
def test_an_account_of_few_archs_is_what_the_rule_says_of_every_visit(
    space: SearchSpace, strategy: Strategy
) -> None:
    account = Account(macs=macs)
    exact = follow(account, strategy, space, range(480), 480)
    spent = account.spent()
    assert (spent.steps, spent.images, spent.macs_error) == (480, 480 * IMAGES, 0.0)
    assert spent.macs == pytest.approx(exact, rel=1e-12)


def test_the_forecast_of_a_strategy_without_chance_is_the_account(space: SearchSpace) -> None:
    strategy, account = DelayedShrinking(switch=0.25, random_subnets=0), Account(macs=macs)
    follow(account, strategy, space, range(960), 960)
    forecast = training_macs(strategy, space, macs, steps=960, steps_per_epoch=10) * IMAGES
    assert account.spent().macs == pytest.approx(forecast)


@pytest.mark.parametrize("strategy", [Sandwich(2), DelayedShrinking(switch=0.5, random_subnets=1)])
def test_an_account_of_random_archs_counts_few_of_them_and_tells_how_near_it_is(strategy: Strategy) -> None:
    counted = []

    def noted(arch: Arch) -> float:
        counted.append(arch)
        return macs(arch)

    errors = []
    for seed in range(2):
        account = Account(macs=noted)
        exact = follow(account, strategy, LARGE, range(seed, 640 + seed), 640)
        spent = account.spent()
        assert 0 < spent.macs_error < 0.06 * exact
        errors.append((spent.macs - exact) / spent.macs_error)
    assert len(counted) / 2 <= KEPT_ARCHS + 2 * (640 / 32 + 3)
    assert all(abs(error) < 4 for error in errors)
    assert any(abs(error) > 0.01 for error in errors)


def test_teachers_count_at_the_side_that_they_see_and_archs_at_no_more_than_the_batch_has() -> None:
    large, small = (Arch((("resolution", side),)) for side in (32, 16))
    account = Account(macs=macs, teachers_macs=lambda side: 1000.0 * side)
    visits = [Visit(large, teacher=1.0), Visit(small, teacher=0.5)]
    account.step(Progress(0, 2, 2), visits, [large, small], batch=batch(side=24))
    assert account.spent().macs == IMAGES * (24_000 + 3 * 24 + 3 * 16)
    account.step(Progress(1, 2, 2), [Visit(large)], [large], batch=batch(side=48))
    assert account.spent().macs == IMAGES * (24_000 + 3 * 24 + 3 * 16 + 3 * 32)


def test_a_run_that_goes_on_from_a_checkpoint_has_the_account_of_one_that_was_never_stopped() -> None:
    whole = Account(macs=macs)
    follow(whole, Sandwich(2), LARGE, range(300), 300)
    state: Any = None
    for part in (range(3), range(3, 70), range(70, 100), range(100, 300)):
        account = Account(macs=macs)
        account.begin(state)
        follow(account, Sandwich(2), LARGE, part, 300)
        state = json.loads(json.dumps(account.state()))
        follow(account, Sandwich(2), LARGE, range(part.stop, part.stop + 5), 300)  # lost
    resumed = Account(macs=macs)
    resumed.begin(state)
    found, wanted = resumed.spent(), whole.spent()
    assert (found.steps, found.images, found.macs) == (300, 300 * IMAGES, wanted.macs)
    assert found.macs_error == wanted.macs_error


def test_seconds_and_joules_of_all_parts_are_added_up() -> None:
    state: Any = None
    for seconds, joules in ((5.0, 40.0), (7.0, 60.0)):
        clock, meter = Clock(), Counter("cpu")
        account = Account(macs=macs, meters=[meter], clock=clock)
        clock.now, meter.total = clock.now + 50.0, meter.total + 500.0  # before training begins
        account.begin(state)
        clock.now, meter.total = clock.now + seconds, meter.total + joules
        state = json.loads(json.dumps(account.state()))
        clock.now, meter.total = clock.now + 3.0, meter.total + 30.0  # lost
    account = Account(macs=macs, meters=[Counter("cpu")], clock=Clock())
    account.begin(state)
    assert account.spent().seconds == 12.0
    assert account.spent().joules == {"cpu": 100.0, "dram": None, "gpu": None}


def test_a_part_that_was_not_told_throughout_is_not_told() -> None:
    first, meter = Account(macs=macs, meters=[Counter("cpu")]), Counter("cpu")
    first.begin(None)
    second = Account(macs=macs)
    second.begin(first.state())
    third = Account(macs=macs, meters=[meter])
    third.begin(second.state())
    meter.total += 10.0
    third.settle()
    assert third.spent().joules == {"cpu": None, "dram": None, "gpu": None}
    broken = Account(macs=macs, meters=[meter])
    broken.begin(None)
    meter.total = math.nan
    broken.settle()
    meter.total = 5000.0
    broken.settle()
    assert broken.spent().joules["cpu"] is None


class Both:
    """Two ranks that exchange within one process: what the other one sends is known before."""

    def __init__(self, others: list[list[float]]) -> None:
        self.others = others

    def sum(self, _: Ranks, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor(self.others.pop(0), dtype=values.dtype)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], None]:
    def set_others(others: list[Any]) -> None:
        both = Both(others)
        monkeypatch.setattr(Ranks, "sum", lambda ranks, values: both.sum(ranks, values))

    return set_others


def test_images_of_all_ranks_count_and_the_joules_of_a_machine_once(
    beside: Callable[[list[Any]], None], space: SearchSpace
) -> None:
    package, gpu = Counter("cpu"), Counter("gpu")
    first = Account(macs=macs, meters=[package, gpu])
    first.begin(None, ranks=Ranks(0, 2))
    # the other rank has 7 images, its own GPU's 30 joules and, as it leaves the package to the first, no more
    beside([7, [0.0, 0.0, 30.0]])
    for step in range(2):
        first.step(Progress(step, 2, 2), [Visit(space.largest)], [space.largest], batch=batch())
    package.total, gpu.total = package.total + 100.0, gpu.total + 20.0
    first.settle()
    spent = first.spent()
    assert (spent.steps, spent.images, spent.macs) == (2, 30, 30 * 48.0)
    assert spent.joules == {"cpu": 100.0, "dram": None, "gpu": 50.0}


def test_a_rank_that_leaves_the_package_to_another_adds_nothing_and_hides_nothing(
    beside: Callable[[list[Any]], None],
) -> None:
    second = Account(macs=macs, tells={"gpu"})
    second.begin(None, ranks=Ranks(1, 2))
    beside([[70.0, 5.0, 30.0]])
    second.settle()
    assert second.spent().joules == {"cpu": 70.0, "dram": 5.0, "gpu": None}
