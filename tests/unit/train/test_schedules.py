from __future__ import annotations

import pytest

from nestling.train.schedules import Cosine, ExponentialTail, Phases


def test_the_learning_rate_rises_linearly_then_falls_along_one_cosine() -> None:
    schedule = Cosine(lr=0.4, warmup_steps=4, steps=24)
    assert [schedule.at(s) for s in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert schedule.at(4) == pytest.approx(0.4)
    assert schedule.at(14) == pytest.approx(0.2)
    rates = [schedule.at(s) for s in range(4, 24)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < schedule.at(23) < 0.01 * 0.4


def test_without_a_warm_up_the_learning_rate_starts_at_its_highest() -> None:
    assert Cosine(lr=0.4, warmup_steps=0, steps=10).at(0) == 0.4
    assert Cosine(lr=0.4, warmup_steps=9, steps=3).at(2) == pytest.approx(0.4 / 3)


def test_an_exponential_tail_falls_by_stairs_and_stays_at_its_floor() -> None:
    schedule = ExponentialTail(lr=2.0, warmup_steps=2, stair_steps=2.5, factor=0.5, floor=0.2)
    # stairs are counted from the first step: a warm-up takes of them, and does not shift them
    assert [schedule.at(s) for s in range(10)] == [1.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.4, 0.4]
    assert schedule.at(10**9) == 0.4


def test_each_phase_begins_its_own_schedule_anew() -> None:
    first, second = Cosine(1.0, 0, 4), Cosine(0.1, 2, 6)
    schedule = Phases((0, 4), (first, second))
    expected = [first.at(s) for s in range(4)] + [second.at(s) for s in range(6)]
    assert [schedule.at(s) for s in range(10)] == expected
    assert schedule.at(4) == pytest.approx(0.05)


def test_a_phase_without_steps_is_passed_over() -> None:
    assert Phases((0, 0, 3), (Cosine(1.0, 0, 1), Cosine(0.5, 0, 3), Cosine(0.1, 0, 3))).at(0) == 0.5


@pytest.mark.parametrize("starts", [(), (0,), (1, 2), (0, 3, 2), (3, 0)])
def test_phases_that_do_not_follow_one_another_are_refused(starts: tuple[int, ...]) -> None:
    count = 3 if len(starts) == 3 else 2
    with pytest.raises(ValueError, match="give as many starts, ascending from 0"):
        Phases(starts, (Cosine(1.0, 0, 1),) * count)
