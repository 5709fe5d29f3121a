"""What a report is told of a run."""

from __future__ import annotations

import pytest

from nestling.pipeline.summary import improvement_told


@pytest.mark.parametrize("evaluation", [{}, {"search": {"improvement": None, "networks": []}}])
def test_nothing_is_told_of_a_front_that_nobody_compared(evaluation: dict[str, object]) -> None:
    assert improvement_told(evaluation) is None


def test_the_gain_over_chance_comes_with_its_interval() -> None:
    estimate = {"value": 0.04, "low": 0.01, "high": 0.06}
    assert improvement_told({"search": {"improvement": estimate}}) == (0.04, 0.01, 0.06)
