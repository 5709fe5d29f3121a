from __future__ import annotations

import pytest

from nestling.console import duration, si


@pytest.mark.parametrize(
    ("value", "told"), [(566_163_744, "566 MMACs"), (1.5e12, "1.5 TMACs"), (999, "999 MACs"), (0, "0 MACs")]
)
def test_si_keeps_three_digits_and_a_prefix(value: float, told: str) -> None:
    assert si(value, "MACs") == told


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")]
)
def test_duration_reads_as_a_person_says_it(seconds: float, told: str) -> None:
    assert duration(seconds) == told
