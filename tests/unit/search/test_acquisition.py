"""Which candidates are chosen: hypervolume against its exact value, spread, limits."""

from __future__ import annotations

import numpy as np
import pytest

from nestling.search import hypervolume
from nestling.search.acquisition import choose, draw_directions, reach, scaling


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_mean_reach_is_in_proportion_to_the_hypervolume(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    reference = np.ones(objectives)
    directions = draw_directions(1, 40_000, objectives, rng)
    ratios = []
    for _ in range(3):
        points = rng.random((5, objectives))
        far = reach(points[None], reference, directions).max(axis=1).mean()
        ratios.append(far / hypervolume(points, reference.tolist()))
    assert np.ptp(ratios) < 0.06 * np.mean(ratios)


def chosen(points: list[list[float]], front: list[list[float]], count: int) -> list[int]:
    candidates = np.array(points)[None]
    directions = draw_directions(1, 2000, 2, np.random.default_rng(0))
    reference = np.array([1.0, 1.0])
    reached = reach(np.array(front)[None], reference, directions).max(axis=1)
    return choose(
        candidates,
        np.ones(candidates.shape[:2], dtype=bool),
        reached,
        reference=reference,
        directions=directions,
        count=count,
    )


def test_the_candidate_that_adds_most_comes_first_and_its_like_no_more() -> None:
    points = [[0.1, 0.5], [0.11, 0.51], [0.5, 0.1], [0.9, 0.9]]
    assert chosen(points, [[0.6, 0.6]], 4) == [0, 2] or chosen(points, [[0.6, 0.6]], 4) == [2, 0]


def test_what_is_being_evaluated_is_not_proposed_once_more() -> None:
    points = [[0.1, 0.5], [0.5, 0.1]]
    assert chosen(points, [[0.6, 0.6]], 1) == [0]
    assert chosen(points, [[0.6, 0.6], [0.1, 0.5]], 1) == [1]


def test_a_candidate_counts_only_in_draws_in_which_it_keeps_the_limits() -> None:
    candidates = np.tile(np.array([[0.1, 0.1], [0.4, 0.4]]), (4, 1, 1))
    directions = draw_directions(4, 500, 2, np.random.default_rng(0))
    allowed = np.array([[False, True]] * 4)
    places = choose(
        candidates,
        allowed,
        np.zeros((4, 500)),
        reference=np.ones(2),
        directions=directions,
        count=2,
    )
    assert places == [1]


def test_an_uncertain_candidate_beats_a_certain_one_of_the_same_mean() -> None:
    rng = np.random.default_rng(0)
    losses = np.full((64, 2, 1), 0.5)
    losses[:, 1, 0] += 0.3 * rng.standard_normal(64)
    directions = np.ones((64, 1, 1))
    reached = np.full((64, 1), 0.5)
    places = choose(
        losses,
        np.ones((64, 2), dtype=bool),
        reached,
        reference=np.ones(1),
        directions=directions,
        count=1,
    )
    assert places == [1]


def test_an_objective_that_does_not_change_along_the_front_has_a_scale() -> None:
    front = np.array([[1.0, 3.0, 5.0], [2.0, 3.0, 5.0]])
    least, width, reference = scaling(front, np.array([[1.0, 3.0, 5.0], [9.0, 7.0, 5.0]]))
    assert least.tolist() == [1.0, 3.0, 5.0]
    assert width.tolist() == [1.0, 4.0, 1.0]
    assert (reference > (np.array([2.0, 3.0, 5.0]) - least) / width).all()
