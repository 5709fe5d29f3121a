from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache

import pytest

from nestling.space import Arch, Choice, Need, SearchSpace
from nestling.space.sampling import CostSampler, cost_uniform, stratified

BINS = 8
DRAWS = 160


@cache
def space() -> SearchSpace:
    """Two stages of up to four blocks, each with its own kernel and expansion, as in once-for-all."""
    choices = [Choice("resolution", (16, 24, 32)), Choice("act", ("relu",))]
    for stage in range(1, 3):
        choices += [Choice(f"s{stage}.width", (8, 16)), Choice(f"s{stage}.depth", (2, 3, 4))]
        for block in range(1, 5):
            needs = (Need(f"s{stage}.depth", block),) if block > 2 else ()
            choices += [Choice(f"s{stage}.b{block}.{k}", (3, 5, 7), needs) for k in ("kernel", "expand")]
    return SearchSpace("toy", tuple(choices))


def macs(arch: Arch) -> float:
    """Blocks add up, the image multiplies."""
    total = 0
    for stage in range(1, 3):
        width = arch.integer(f"s{stage}.width")
        for block in range(1, arch.integer(f"s{stage}.depth") + 1):
            hidden = width * arch.integer(f"s{stage}.b{block}.expand")
            total += hidden * (2 * width + arch.integer(f"s{stage}.b{block}.kernel") ** 2)
    return float(total * arch.integer("resolution") ** 2)


@cache
def sampler() -> CostSampler:
    return cost_uniform(space(), macs, bins=BINS, rng=random.Random(0))


@cache
def drawn() -> tuple[Arch, ...]:
    rng = random.Random(1)
    return tuple(sampler().draw(rng) for _ in range(DRAWS))


def chi_square(archs: tuple[Arch, ...]) -> float:
    """How far the costs of `archs` are from uniform over the bins; 24.3 is passed by chance once in 1000."""
    edges = sampler().edges
    counts = Counter(sum(macs(arch) >= edge for edge in edges[1:-1]) for arch in archs)
    expected = len(archs) / BINS
    return sum((counts[index] - expected) ** 2 / expected for index in range(BINS))


def test_costs_are_uniform_between_the_smallest_and_the_largest() -> None:
    assert chi_square(drawn()) < 24.3


def test_uniform_choices_crowd_the_middle_of_the_same_space() -> None:
    rng = random.Random(1)
    assert chi_square(tuple(space().sample(rng) for _ in range(DRAWS))) > 60


@pytest.mark.parametrize("index", range(BINS))
def test_an_arch_of_a_bin_costs_what_the_bin_says(index: int) -> None:
    rng = random.Random(index)
    archs = {sampler().within(index, rng) for _ in range(10)}
    low, high = sampler().edges[index : index + 2]
    assert all(low <= macs(arch) <= high for arch in archs)
    assert len(archs) > 4


def test_archs_of_one_bin_differ_in_most_of_their_choices() -> None:
    rng = random.Random(2)
    archs = [sampler().within(2, rng) for _ in range(40)]
    varied = [c.name for c in space().open_choices if len({arch[c.name] for arch in archs}) > 1]
    assert len(varied) > 0.9 * len(space().open_choices)


def test_every_arch_is_the_canonical_one() -> None:
    assert all(space().canonical(arch) == arch for arch in drawn())


def test_the_same_rng_draws_the_same_archs() -> None:
    def draw() -> list[Arch]:
        rng = random.Random(5)
        again = cost_uniform(space(), macs, bins=4, evaluations=40, rng=rng)
        return [again.draw(rng) for _ in range(5)]

    assert draw() == draw()


def test_few_costs_are_asked_for() -> None:
    asked: list[Arch] = []

    def counted(arch: Arch) -> float:
        asked.append(arch)
        return macs(arch)

    rng = random.Random(3)
    again = cost_uniform(space(), counted, bins=BINS, evaluations=150, rng=rng)
    assert len(asked) <= 150
    asked.clear()
    for _ in range(40):
        again.draw(rng)
    assert len(asked) <= 3 * 40
    assert len(set(asked)) == len(asked)


def test_a_space_whose_choices_interact_is_covered_all_the_same() -> None:
    # a cost that no sum over choices tells: the model is wrong, the archs still lie in their bins
    def tangled(arch: Arch) -> float:
        odd = sum(arch[c.name] == c.values[-1] for c in space().open_choices) % 3
        return macs(arch) * (1 + 0.2 * odd)

    again = cost_uniform(space(), tangled, bins=4, rng=random.Random(0))
    rng = random.Random(4)
    for index in range(4):
        low, high = again.edges[index : index + 2]
        costs = [tangled(again.within(index, rng)) for _ in range(5)]
        assert sum(low <= cost <= high or (cost > high and index == 3) for cost in costs) >= 4


def test_where_a_bin_is_empty_the_nearest_arch_is_given() -> None:
    two = SearchSpace("toy", (Choice("a", (1, 100)), Choice("b", (1, 2))))
    again = cost_uniform(
        two, lambda arch: float(arch.integer("a") + arch.integer("b")), bins=5, rng=random.Random(0)
    )
    rng = random.Random(0)
    assert {again.within(1, rng)["a"] for _ in range(2)} == {1}
    assert {again.within(3, rng)["a"] for _ in range(2)} == {100}


def test_stratified_archs_stand_one_in_each_bin_of_cost() -> None:
    archs = stratified(space(), macs, 6)
    least, most = macs(space().smallest), macs(space().largest)
    places = [min(math.floor((macs(arch) - least) / (most - least) * 6), 5) for arch in archs]
    assert places == list(range(6))
    assert archs == stratified(space(), macs, 6)
    assert archs != stratified(space(), macs, 6, seed=1)


def test_of_each_bin_the_first_arch_that_is_allowed_is_drawn() -> None:
    free = stratified(space(), macs, 6)
    left = stratified(space(), macs, 6, allowed=lambda arch: arch not in free)
    assert len(left) >= 4
    assert not set(left) & set(free)
    assert stratified(space(), macs, 6, allowed=lambda _: False) == []


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda _: 3.0, "the smallest arch costs 3 and the largest 3; a cost is above 0"),
        (lambda arch: macs(arch) - macs(space().smallest), "the smallest arch costs 0 and"),
        (
            lambda arch: macs(arch) if arch in (space().smallest, space().largest) else -1.0,
            "costs -1; a cost is",
        ),
    ],
)
def test_a_cost_that_cannot_be_covered_is_refused(cost: object, message: str) -> None:
    assert callable(cost)
    with pytest.raises(ValueError, match=message):
        cost_uniform(space(), cost, rng=random.Random(0))


def test_no_bins_and_bins_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="0 bins and 200 evaluations"):
        cost_uniform(space(), macs, bins=0, rng=random.Random(0))
    with pytest.raises(IndexError, match="no cost bin 8; they are 0 to 7"):
        sampler().within(BINS, random.Random(0))
