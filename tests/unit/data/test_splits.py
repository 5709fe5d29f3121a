from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.data.splits import balanced, proportional

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda given: np.array(given, np.int64))


@given(LABELS, st.none() | st.integers(0, 9))
def test_every_balanced_prefix_holds_classes_alike_until_one_runs_out(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int | None
) -> None:
    def chosen(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return balanced(labels, count, rng=None if seed is None else np.random.default_rng(seed))

    order = chosen(len(labels))
    assert sorted(order.tolist()) == list(range(len(labels)))
    totals = Counter(labels.tolist())
    for length in range(len(labels) + 1):
        part = chosen(length) if length <= len(totals) else order[:length]
        assert len(part) == length
        counts = Counter(labels[part].tolist())
        unfinished = [counts[label] for label, total in totals.items() if counts[label] < total]
        assert not unfinished or max(counts.values(), default=0) - min(unfinished) <= 1


@given(LABELS, st.integers(0, 9))
def test_every_proportional_prefix_is_within_one_image_of_its_share(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int
) -> None:
    order = proportional(labels, len(labels), rng=np.random.default_rng(seed))
    totals = Counter(labels.tolist())
    assert len(set(order.tolist())) == len(order) == len(labels) - len(totals)
    for length in range(len(order) // 2):
        few = length <= len(totals)
        part = proportional(labels, length, rng=np.random.default_rng(seed)) if few else order[:length]
        assert len(part) == length
        counts = Counter(labels[part].tolist())
        turns = {label: (count - 0.5) / totals[label] for label, count in counts.items()}
        waiting = [
            (counts[label] + 0.5) / totals[label] for label in totals if counts[label] < totals[label] - 1
        ]
        assert max(turns.values(), default=0) <= min(waiting, default=1) + 1e-12


def test_a_tenth_of_unequal_classes_is_a_tenth_of_each() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    chosen = proportional(labels, 100, rng=np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [50, 30, 20]


def test_one_image_of_each_class_is_left_even_when_all_are_asked_for() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    left = np.setdiff1d(np.arange(6), proportional(labels, 6, rng=np.random.default_rng(0)))
    assert sorted(labels[left].tolist()) == [0, 1, 2]


def test_chance_decides_who_is_chosen_within_a_class() -> None:
    labels = np.zeros(100, np.int64)
    orders = {tuple(balanced(labels, 100, rng=np.random.default_rng(seed))) for seed in range(3)}
    assert len(orders) == 3
    assert balanced(labels, 100).tolist() == list(range(100))


@pytest.mark.parametrize("few", ["balanced by chance", "balanced in order", "proportional"])
def test_fewer_images_than_classes_are_of_classes_from_all_over(few: str) -> None:
    labels = np.repeat(np.arange(100), 7)

    def shown(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        if few == "proportional":
            return sorted(labels[proportional(labels, 40, rng=rng)].tolist())
        chosen = balanced(labels, 40, rng=rng if few == "balanced by chance" else None)
        return sorted(labels[chosen].tolist())

    for seed in range(5):
        assert len(set(shown(seed))) == 40
        assert 5 < sum(label >= 75 for label in shown(seed)) < 16
    assert shown(0) == shown(0)
    assert (shown(0) == shown(1)) == (few == "balanced in order")


def test_of_classes_of_one_size_that_cannot_all_be_there_some_are_drawn() -> None:
    labels = np.repeat(np.arange(60), [1000] * 10 + [10] * 50)
    chosen = labels[proportional(labels, 520, rng=np.random.default_rng(0))]
    assert np.bincount(chosen)[:10].tolist() == [50] * 10
    assert len(set(chosen.tolist())) == 30
    assert 35 < np.mean(np.unique(chosen)[10:]) < 50  # the lowest 20 would have a mean of 19.5


@given(LABELS, st.integers(0, 9), st.integers(1, 60))
def test_where_every_class_is_there_images_are_those_of_runs_begun_before(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int, count: int
) -> None:
    for choose in (balanced, proportional):
        before = choose(labels, count, rng=np.random.default_rng(seed), few="first")
        now = choose(labels, count, rng=np.random.default_rng(seed))
        order = choose(labels, len(labels), rng=np.random.default_rng(seed))
        assert before.tolist() == order[:count].tolist()
        if set(labels[before]) == set(labels[order]):
            assert now.tolist() == before.tolist()
