"""What a report is told of a run."""

from __future__ import annotations

from typing import Any

import pytest

from nestling.pipeline.summary import _notes, improvement_told


@pytest.mark.parametrize("evaluation", [{}, {"search": {"improvement": None, "networks": []}}])
def test_nothing_is_told_of_a_front_that_nobody_compared(evaluation: dict[str, object]) -> None:
    assert improvement_told(evaluation) is None


def test_the_gain_over_chance_comes_with_its_interval() -> None:
    estimate = {"value": 0.04, "low": 0.01, "high": 0.06}
    assert improvement_told({"search": {"improvement": estimate}}) == (0.04, 0.01, 0.06)


def test_what_ran_on_another_provider_is_a_note_with_its_share() -> None:
    plain: dict[str, Any] = {"unstable": False}
    moved = {"elsewhere": {"kernels": 0.25, "time": 0.5}}
    cards: list[dict[str, Any]] = [
        {**plain, "name": "01-a", **moved},
        {**plain, "name": "02-b", "elsewhere": {"kernels": 0.0, "time": 0.0}},
        {**plain, "name": "03-c", "elsewhere": None},
        {**plain, "name": "04-of-before"},
    ]
    [note] = _notes(cards, None)
    assert note.endswith("their latency is of both: 01-a (25% of the nodes, 50% of the time).")
    assert _notes(cards[1:], None) == []
