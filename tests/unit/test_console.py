from __future__ import annotations

import pytest

from nestling.console import duration, si, spent_words
from nestling.pipeline import Forecast, Spent


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


def test_what_training_cost_is_said_beside_its_forecast() -> None:
    forecast = Forecast(steps=100, images=6400, macs=2e12, seconds=50.0)
    spent = Spent(100, 6400, 2.2e12, 2.2e10, 75.0, {"cpu": 4321.0, "dram": None, "gpu": 900.0})
    assert spent_words(spent, forecast) == (
        "spent: 100 steps; 6.4 k images; 2.2 TMACs (+- 1.0%), 1.10 of the forecast; "
        "1 min 15 s, 1.50 of the forecast; energy cpu 4.32 kJ, gpu 900 J"
    )
    untold = Spent(100, 6400, 2e12, 0.0, 50.0, {"cpu": None, "dram": None, "gpu": None})
    assert spent_words(untold, forecast) == (
        "spent: 100 steps; 6.4 k images; 2 TMACs, 1.00 of the forecast; 50 s, 1.00 of the forecast; "
        "energy not told by this machine"
    )
