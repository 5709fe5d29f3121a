from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nestling.data.splits import balanced, proportional

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda given: np.array(given, np.int64))


@given(LABELS, st.none() | st.integers(0, 9))
def test_every_balanced_prefix_holds_classes_alike_until_one_runs_out(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int | None
) -> None:
    order = balanced(labels, rng=None if seed is None else np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    totals = Counter(labels.tolist())
    for length in range(len(labels) + 1):
        counts = Counter(labels[order[:length]].tolist())
        unfinished = [counts[label] for label, total in totals.items() if counts[label] < total]
        assert not unfinished or max(counts.values(), default=0) - min(unfinished) <= 1


@given(LABELS, st.integers(0, 9))
def test_every_proportional_prefix_is_within_one_image_of_its_share(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int
) -> None:
    order = proportional(labels, rng=np.random.default_rng(seed))
    totals = Counter(labels.tolist())
    assert len(set(order.tolist())) == len(order) == len(labels) - len(totals)
    for length in range(len(order) // 2):
        counts = Counter(labels[order[:length]].tolist())
        turns = {label: (count - 0.5) / totals[label] for label, count in counts.items()}
        waiting = [
            (counts[label] + 0.5) / totals[label] for label in totals if counts[label] < totals[label] - 1
        ]
        assert max(turns.values(), default=0) <= min(waiting, default=1) + 1e-12


def test_a_tenth_of_unequal_classes_is_a_tenth_of_each() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    chosen = proportional(labels, rng=np.random.default_rng(0))[:100]
    assert np.bincount(labels[chosen]).tolist() == [50, 30, 20]


def test_one_image_of_each_class_is_left_even_when_all_are_asked_for() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    left = np.setdiff1d(np.arange(6), proportional(labels, rng=np.random.default_rng(0)))
    assert sorted(labels[left].tolist()) == [0, 1, 2]


def test_chance_decides_who_is_chosen_within_a_class() -> None:
    labels = np.zeros(100, np.int64)
    orders = {tuple(balanced(labels, rng=np.random.default_rng(seed))) for seed in range(3)}
    assert len(orders) == 3
    assert balanced(labels).tolist() == list(range(100))
