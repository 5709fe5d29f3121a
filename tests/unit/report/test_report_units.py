from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.report.units import THIN, byte_size, count, duration, metric_named, percent, short


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (0.2, "0.200"),
        (0.9996, "1.00"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (99.96, "100"),
        (999.6, "1,000"),
        (1234.5, "1,234"),
        (-3.14159, "−3.14"),  # noqa: RUF001
        (0.00001, "1.0e−05"),  # noqa: RUF001
    ],
)
def test_three_significant_digits_are_kept(value: float, said: str) -> None:
    assert short(value) == said


@given(st.floats(1e-4, 1e6))
def test_a_short_number_is_within_half_a_percent_of_its_value(value: float) -> None:
    assert float(short(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(("value", "said"), [(999, "999 B"), (412_345, "412 kB"), (1_234_567, "1.23 MB")])
def test_bytes_are_said_in_decimal_units(value: int, said: str) -> None:
    assert byte_size(value).replace(THIN, " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (2.5, "2.5 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3600, "1 h 0 min"),
        (4321, "1 h 12 min"),
        (7199, "2 h 0 min"),
    ],
)
def test_a_duration_never_says_sixty(seconds: float, said: str) -> None:
    assert duration(seconds).replace(THIN, " ") == said


def test_fractions_become_percent_only_when_they_are_said() -> None:
    assert percent(0.9512).replace(THIN, " ") == "95.1 %"
    assert metric_named("top1").shown(0.9512).replace(THIN, " ") == "95.1 %"


def test_counts_are_said_with_their_order_of_magnitude() -> None:
    assert [count(value).replace(THIN, " ") for value in (12, 2600, 1_234_567)] == ["12", "2.60 k", "1.23 M"]


def test_a_metric_that_is_not_known_keeps_its_name() -> None:
    assert metric_named("energy_mj").label == "energy_mj"
