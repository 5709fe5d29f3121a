from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.report.plot import Axis, Plot, thinned

VALUES = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8)


@given(VALUES, st.sampled_from([4.0, math.inf]))
def test_an_axis_holds_every_value_it_was_made_for(values: list[float], log_from: float) -> None:
    axis = Axis.over(values, log_from=log_from)
    assert all(0 <= axis.at(value) <= 1 for value in values)


@given(VALUES, st.sampled_from([4.0, math.inf]))
def test_ticks_lie_on_the_axis_and_say_their_value(values: list[float], log_from: float) -> None:
    axis = Axis.over(values, log_from=log_from)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 24
    for value, label in ticks:
        assert -1e-6 <= axis.at(value) <= 1 + 1e-6
        said = float(label.replace(",", "").replace("\N{MINUS SIGN}", "-"))
        assert said == pytest.approx(value, rel=1e-4, abs=1e-9 * axis.high)
    assert len({label for _, label in ticks}) == len(ticks)


def test_a_wide_span_of_positive_values_is_logarithmic() -> None:
    assert Axis.over([0.2, 1.9], log_from=4).logarithmic
    assert not Axis.over([0.6, 1.9], log_from=4).logarithmic
    assert not Axis.over([0.0, 1.9], log_from=4).logarithmic


def test_half_way_on_a_logarithmic_axis_is_the_geometric_mean() -> None:
    assert Axis(0.1, 10.0, logarithmic=True).at(1.0) == pytest.approx(0.5)


def test_an_axis_ends_by_its_top() -> None:
    assert Axis.over([95.0, 99.9], top=100.0).high == 100.0


def test_close_values_do_not_fill_an_axis_with_a_least_span() -> None:
    axis = Axis.over([93.9, 94.1], least=2.0)
    assert axis.high - axis.low >= 2.0


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"), [(1.0, 1.0, False), (2.0, 1.0, False), (0.0, 1.0, True)]
)
def test_an_axis_that_cannot_be_drawn_is_refused(low: float, high: float, logarithmic: bool) -> None:
    with pytest.raises(ValueError, match="axis"):
        Axis(low, high, logarithmic)


def test_a_mark_stands_where_its_values_are() -> None:
    plot = Plot(Axis(0.0, 4.0), Axis(90.0, 100.0))
    mark = plot.dot((1.0, 98.0), radius=3)
    assert re.search(r'cx="25.00%" cy="20.00%"', mark)


def test_a_stepped_line_keeps_its_height_until_the_next_point() -> None:
    plot = Plot(Axis(0.0, 2.0), Axis(0.0, 1.0))
    line = plot.steps([(0.0, 0.0), (1.0, 1.0), (2.0, 1.0)], class_="c")
    assert line is not None
    assert 'points="0.0,1000.0 500.0,1000.0 500.0,0.0 1000.0,0.0 1000.0,0.0"' in line


def test_one_point_makes_no_line() -> None:
    assert Plot(Axis(0.0, 1.0), Axis(0.0, 1.0)).line([(0.5, 0.5)], class_="c") is None


def test_thinning_keeps_the_mean_and_short_sequences() -> None:
    points = [(float(index), float(index % 7)) for index in range(1000)]
    few = thinned(points, most=100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50], most=100) == points[:50]
