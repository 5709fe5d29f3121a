from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from nestling.space import Arch, Choice, SearchSpace
from nestling.space.sampling import CostSampler, cost_uniform
from nestling.train.strategies import Attentive, Progress, Shifting, Visit, guessing, histogram

BINS = 5
START = Progress(0, 100, 10)


def cost(arch: Arch) -> float:
    """Grows with every choice, a little less evenly than a sum."""
    return math.pow(sum(arch.integer(name) for name in arch), 1.2)


@pytest.fixture(scope="module")
def sampler() -> CostSampler:
    space = SearchSpace("mobilenet", tuple(Choice(f"c{i}", (1, 2, 3, 4)) for i in range(12)))
    return cost_uniform(space, cost, rng=random.Random(0), bins=BINS)


def test_guessed_costs_need_no_cost_and_are_near_the_true_ones(sampler: CostSampler) -> None:
    def refused(_: Arch) -> float:
        raise AssertionError("a cost was asked for")

    fast = guessing(replace(sampler, cost=refused))
    rng = random.Random(1)
    for index in range(BINS):
        arch = fast.within(index, rng)
        assert abs(sampler.bin_of(cost(arch)) - index) <= 1
        assert fast.cost(arch) == pytest.approx(cost(arch), rel=0.05)


def test_a_guess_is_never_below_the_cost_of_the_smallest(sampler: CostSampler) -> None:
    steep = replace(sampler, model=replace(sampler.model, curve=(1.0, -1e6)))
    assert guessing(steep).cost(sampler.space.smallest) == pytest.approx(sampler.edges[0])


def test_the_histogram_counts_where_uniform_choices_fall(sampler: CostSampler) -> None:
    counts = histogram(sampler, rng=random.Random(0), archs=400)
    assert sum(counts) == 400 + BINS
    assert counts[2] == max(counts)
    assert counts[0] < 0.05 * counts[2]
    assert min(counts) >= 1


def test_a_contest_is_between_archs_of_one_cost_that_learn_from_the_largest(sampler: CostSampler) -> None:
    strategy = Attentive(sampler, (0.0, 0.0, 0.0, 1.0, 0.0), candidates=3, keeps="worst", random_subnets=4)
    largest, smallest, *contests = strategy.visits(sampler.space, START, random.Random(0))
    assert largest == Visit(sampler.space.largest)
    assert smallest == Visit(sampler.space.smallest, learns_from=sampler.space.largest)
    assert len(contests) == 4
    for visit in contests:
        archs = (visit.arch, *visit.rivals)
        assert len(set(archs)) == len(archs) == 3
        assert {sampler.bin_of(cost(arch)) for arch in archs} == {3}
        assert (visit.keeps, visit.learns_from) == ("worst", sampler.space.largest)


def test_one_candidate_has_no_rivals(sampler: CostSampler) -> None:
    strategy = Attentive(sampler, (1.0,) * BINS, candidates=1, divergence="alpha")
    visits = strategy.visits(sampler.space, START, random.Random(0))
    assert [visit.rivals for visit in visits] == [()] * 4
    assert {visit.divergence for visit in visits[1:]} == {"alpha"}


@pytest.mark.parametrize(("candidates", "likelihoods"), [(0, (1.0,) * BINS), (3, (1.0,))])
def test_a_contest_that_cannot_be_held_is_refused(
    sampler: CostSampler, candidates: int, likelihoods: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="give at least 1, and one for each bin"):
        Attentive(sampler, likelihoods, candidates=candidates)


def gaps(**known: float) -> Progress:
    return Progress(50, 100, 10, {f"cost bin {name[1:]}": gap for name, gap in known.items()})


def test_bins_are_drawn_alike_while_nothing_is_known_or_nothing_is_left(sampler: CostSampler) -> None:
    strategy = Shifting(sampler)
    assert strategy.likelihoods(START) == pytest.approx([0.2] * BINS)
    done = gaps(b0=-0.1, b1=0.0, b2=-0.3, b3=0.0, b4=0.0)
    assert strategy.likelihoods(done) == pytest.approx([0.2] * BINS)


def test_a_bin_is_drawn_as_often_as_its_gap_is_wide_above_a_floor(sampler: CostSampler) -> None:
    known = gaps(b0=3.0, b1=1.0, b2=0.0, b3=0.0, b4=-1.0)
    found = Shifting(sampler, floor=0.1).likelihoods(known)
    assert found == pytest.approx([0.02 + 0.9 * share for share in (0.75, 0.25, 0.0, 0.0, 0.0)])
    assert Shifting(sampler, floor=1.0).likelihoods(known) == pytest.approx([0.2] * BINS)


def test_a_bin_that_nothing_is_known_of_counts_as_the_widest_gap(sampler: CostSampler) -> None:
    found = Shifting(sampler, floor=0.5).likelihoods(gaps(b0=2.0, b1=1.0, b2=1.0, b3=2.0))
    assert found == pytest.approx([0.1 + 0.5 * gap / 8 for gap in (2, 1, 1, 2, 2)])


def test_draws_follow_the_gaps_and_are_remembered_by_their_bin(sampler: CostSampler) -> None:
    strategy = Shifting(sampler, floor=0.2, random_subnets=3)
    progress = gaps(b0=0.0, b1=0.0, b2=0.0, b3=0.0, b4=1.0)
    names: Counter[str] = Counter()
    for seed in range(60):
        largest, smallest, *drawn = strategy.visits(sampler.space, progress, random.Random(seed))
        assert largest == Visit(sampler.space.largest)
        assert smallest.remembered == ""
        for visit in drawn:
            assert visit.remembered == f"cost bin {sampler.bin_of(cost(visit.arch))}"
            assert visit.learns_from == sampler.space.largest
            names[visit.remembered] += 1
    assert 0.75 < names["cost bin 4"] / names.total() < 0.93  # expected 0.84 of 180


@pytest.mark.parametrize("floor", [0.0, -0.5, 1.1])
def test_a_floor_that_would_leave_bins_unseen_is_refused(sampler: CostSampler, floor: float) -> None:
    with pytest.raises(ValueError, match=f"floor is {floor}"):
        Shifting(sampler, floor=floor)
