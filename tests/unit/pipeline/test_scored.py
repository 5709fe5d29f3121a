from __future__ import annotations

import numpy as np
import pytest

from nestling.pipeline.scored import Scored, area_under, compared, gained, row
from nestling.space import Arch

IMAGES = 40


def scored(macs: int, top1: float, *, seed: int = 0) -> Scored:
    """A network that gets `top1` of the images right, which ones by `seed`."""
    hits = np.zeros(IMAGES, dtype=bool)
    hits[np.random.default_rng(seed).permutation(IMAGES)[: round(top1 * IMAGES)]] = True
    return Scored(Arch((("macs", macs),)), macs, hits, seconds=1.0)


def test_the_area_of_a_supernet_is_taken_over_the_logarithm_of_the_macs() -> None:
    rows = [scored(100, 0.5), scored(200, 0.7, seed=1), scored(1600, 0.9, seed=2)]
    found = area_under(rows, (100, 1600), seed=0)
    assert found is not None
    assert found["value"] == pytest.approx(0.25 * 0.6 + 0.75 * 0.8)
    assert found["low"] < found["value"] < found["high"]


def test_the_ends_of_the_curve_are_in_every_draw_of_its_interval() -> None:
    found = area_under([scored(100, 0.0), scored(200, 1.0)], (100, 200), seed=0)
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_a_supernet_that_is_as_good_as_training_alone_shows_no_gap_and_a_perfect_ranking() -> None:
    networks = [scored(100 + i, 0.4 + 0.1 * i, seed=i) for i in range(4)]
    found = compared(networks, networks, seed=0)
    assert found["tau"]["value"] == found["tau_of_macs"]["value"] == 1
    assert found["gap"] == {"value": 0, "low": 0, "high": 0}
    # pairs 0.4, 0.5 and 0.6, 0.7: the better of each against their mean
    assert found["improvement"]["value"] == pytest.approx((0.6 - 0.55) / 0.55)
    assert found["partial_tau"] is None  # the MACs order them just so


def test_equal_accuracies_of_other_images_are_equal() -> None:
    # a sum of weights in another order would differ in its last bit, and be a ranking
    shared = [scored(1, 0.9, seed=1), scored(2, 0.9, seed=2), scored(3, 0.9, seed=3)]
    alone = [scored(1, 0.3), scored(2, 0.4), scored(3, 0.5)]
    assert compared(shared, alone, seed=0)["tau"] is None


def test_one_network_has_a_gap_but_no_ranking_and_no_choice() -> None:
    found = compared([scored(5, 0.5)], [scored(5, 0.7, seed=1)], seed=0)
    assert found["gap"]["value"] == pytest.approx(-0.2)
    assert found["tau"] is None
    assert found["improvement"] is None


def test_a_front_is_held_against_networks_of_its_cost() -> None:
    rows = [scored(100, 0.4), scored(10_000, 0.8, seed=1)]
    front = [scored(1000, 0.75, seed=2)]
    found = gained(rows, front, (100, 10_000), seed=0)
    assert found is not None
    assert found["value"] == pytest.approx((0.75 - 0.6) / 0.6)
    assert found["low"] < found["value"] < found["high"]


def test_a_row_tells_the_accuracy_with_its_interval() -> None:
    told = row(scored(100, 0.5))
    low, high = told["top1_interval"]
    assert told["top1"] == 0.5
    assert low == pytest.approx(1 - high)
    assert told["arch_key"] == scored(100, 0.5).arch.key
