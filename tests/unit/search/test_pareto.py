"""Dominance, hypervolume and spread, against brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestling.search import hypervolume, nondominated
from nestling.search.pareto import spread

GRID = 6


@st.composite
def points_on_a_grid(draw: st.DrawFn) -> NDArray[np.float64]:
    """Points with whole coordinates below GRID, so that a volume is a number of cells."""
    objectives = draw(st.integers(1, 4))
    row = st.tuples(*[st.integers(0, GRID)] * objectives)
    rows = draw(st.lists(row, max_size=8))
    return np.array(rows, dtype=np.float64).reshape(-1, objectives)


@given(points=points_on_a_grid())
@settings(max_examples=80, deadline=None)
def test_nondominated_agrees_with_the_definition(points: NDArray[np.float64]) -> None:
    rows = [tuple(point) for point in points.tolist()]

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    assert nondominated(points).tolist() == [not any(beats(other, row) for other in rows) for row in rows]


@given(points=points_on_a_grid())
@settings(max_examples=80, deadline=None)
def test_hypervolume_counts_the_dominated_cells(points: NDArray[np.float64]) -> None:
    cells = np.stack(np.meshgrid(*[np.arange(GRID)] * points.shape[1]), axis=-1).reshape(-1, points.shape[1])
    dominated = np.zeros(len(cells), dtype=bool)
    for point in points:
        dominated |= (cells >= point).all(axis=1)
    assert hypervolume(points, [GRID] * points.shape[1]) == pytest.approx(dominated.sum())


def test_hypervolume_of_a_staircase_is_its_area() -> None:
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [3.0, 3.0]])
    assert hypervolume(points, (4.0, 4.0)) == pytest.approx(3 + 2 + 1)


def test_points_beyond_the_reference_count_nothing() -> None:
    assert hypervolume(np.array([[5.0, 0.0], [0.0, 4.0]]), (4.0, 4.0)) == 0.0
    assert hypervolume(np.empty((0, 2)), (4.0, 4.0)) == 0.0


def test_spread_takes_the_ends_and_no_neighbours() -> None:
    line = np.linspace(0.0, 1.0, 101)
    points = np.column_stack([line, 1000.0 * (1.0 - line)])
    taken = spread(points, 5)
    assert taken[0] == 0
    assert taken[-1] == 100
    assert all(20 <= after - before <= 30 for before, after in pairwise(taken))


def test_spread_of_fewer_points_than_asked_for_is_all_of_them() -> None:
    points = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert spread(points, 2) == [0, 1]
    assert spread(points, 9) == [0, 1]
    assert spread(points, 1) == [0]
    assert spread(np.empty((0, 2)), 3) == []


def test_spread_survives_an_objective_that_never_changes() -> None:
    points = np.array([[0.0, 7.0], [0.1, 7.0], [1.0, 7.0]])
    assert spread(points, 2) == [0, 2]
