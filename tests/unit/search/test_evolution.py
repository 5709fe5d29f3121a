"""NSGA-II on codes: ranks and crowding against their definitions, and what it finds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nestling.search import hypervolume, nondominated
from nestling.search.encoding import Codes, Encoding
from nestling.search.evolution import best, crowding, evolve, mutate, ranks
from nestling.space import SearchSpace


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_ranks_are_the_fronts_that_are_left_when_better_ones_are_taken_away(objectives: int) -> None:
    points = np.random.default_rng(objectives).integers(0, 5, size=(60, objectives)).astype(np.float64)
    expected = np.full(len(points), -1)
    left = np.arange(len(points))
    rank = 0
    while len(left):
        front = nondominated(points[left])
        expected[left[front]] = rank
        left, rank = left[~front], rank + 1
    assert ranks(points).tolist() == expected.tolist()


def test_what_breaks_a_limit_comes_after_all_that_keep_it() -> None:
    points = np.array([[5.0, 5.0], [0.0, 0.0], [1.0, 1.0], [6.0, 6.0]])
    assert ranks(points, np.array([0.0, 0.2, 0.1, 0.0])).tolist() == [0, 3, 2, 1]
    assert ranks(points, np.array([0.3, 0.2, 0.1, 0.2])).tolist() == [2, 1, 0, 1]


def test_crowding_is_the_way_between_neighbours_as_a_part_of_the_front() -> None:
    points = np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [9.0, 9.0]])
    distances = crowding(points, np.array([0, 0, 0, 1]))
    assert distances.tolist() == [np.inf, 2.0, np.inf, np.inf]


def test_the_best_are_the_first_fronts_and_of_the_last_the_roomiest() -> None:
    line = np.array([0.0, 0.1, 0.2, 0.6, 1.0])
    points = np.column_stack([line, 1 - line])
    worse = points + 2.0
    kept = best(np.concatenate([worse, points]), np.zeros(10), 3)
    assert sorted(kept.tolist()) == [5, 8, 9]


def test_mutated_codes_are_canonical_and_as_different_as_asked(space: SearchSpace) -> None:
    encoding = Encoding(space)
    codes = encoding.sample(200, np.random.default_rng(0))
    assert (mutate(encoding, codes, np.random.default_rng(1), probability=0.0) == codes).all()
    mutated = mutate(encoding, codes, np.random.default_rng(1), probability=0.5)
    assert (encoding.canonical(mutated) == mutated).all()
    assert 0.1 < (mutated != codes).mean() < 0.5


def test_the_evolution_finds_the_whole_front_of_a_small_space(space: SearchSpace) -> None:
    encoding = Encoding(space)

    def score(codes: Codes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        along = encoding.ordinal(codes)
        losses = np.stack([along @ [3.0, 1.0, 2.0, 0.5, 1.0], -(along @ [1.0, 2.0, 1.0, 1.0, 3.0])], axis=1)
        return losses, np.zeros(len(codes))

    everything = score(encoding.codes(space.walk()))[0]
    reference = everything.max(axis=0) + 1
    start = encoding.codes([space.smallest])
    found = evolve(encoding, score, start, population=24, generations=15, rng=np.random.default_rng(0))
    assert len(np.unique(found, axis=0)) == len(found)
    assert hypervolume(score(found)[0], reference) == pytest.approx(hypervolume(everything, reference))
