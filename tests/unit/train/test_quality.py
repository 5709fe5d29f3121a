from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nestling.train.quality import (
    Floats,
    Indices,
    Statistic,
    along_cost,
    area,
    bootstrap,
    hits_from_text,
    hits_to_text,
    improvement_along,
    improvement_of_choice,
    kendall_tau,
    neighbours,
    partial_tau,
    relative_improvement,
)


def numbers(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def test_each_halving_of_the_cost_takes_the_same_length_of_the_axis() -> None:
    assert along_cost([1.0, 2.0, 4.0, 16.0], least=1.0, most=16.0) == pytest.approx([0, 0.25, 0.5, 1])


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.0), (2.0, 2.0), (3.0, 2.0)])
def test_a_cost_axis_that_does_not_rise_is_refused(least: float, most: float) -> None:
    with pytest.raises(ValueError, match="must rise"):
        along_cost([1.0], least=least, most=most)


def test_the_area_under_a_straight_line_is_its_height_in_the_middle_wherever_its_points_lie() -> None:
    for places in ([0.0, 1.0], [0.0, 0.1, 0.15, 1.0], [1.0, 0.7, 0.0, 0.7]):
        along = numbers(*places)
        assert area(along, 0.5 + 0.2 * along) == pytest.approx(0.6)


def test_the_area_of_a_bend_is_that_of_its_trapezoids() -> None:
    assert area(numbers(0, 0.25, 1), numbers(0.4, 0.8, 0.8)) == pytest.approx(0.25 * 0.6 + 0.75 * 0.8)


def test_points_with_one_cost_count_as_their_mean_not_as_their_best() -> None:
    assert area(numbers(0, 0.5, 0.5, 1), numbers(0.5, 0.9, 0.1, 0.5)) == pytest.approx(0.5)


def test_a_line_is_flat_beyond_its_ends() -> None:
    assert area(numbers(0.5), numbers(0.7)) == pytest.approx(0.7)
    assert area(numbers(0.5, 1.0), numbers(0.4, 0.8)) == pytest.approx(0.5 * 0.4 + 0.5 * 0.6)


def test_tau_is_the_share_of_pairs_in_order_less_those_in_reverse() -> None:
    first = numbers(1, 2, 3, 4)
    assert kendall_tau(first, first**3) == pytest.approx(1)
    assert kendall_tau(first, -first) == pytest.approx(-1)
    assert kendall_tau(first, numbers(2, 1, 3, 4)) == pytest.approx((5 - 1) / 6)


def test_ties_in_one_score_count_against_tau_and_ties_in_both_do_not() -> None:
    rng = np.random.default_rng(0)
    for values in (3, 8):
        first, second = (rng.integers(values, size=15).astype(np.float64) for _ in range(2))
        pairs = list(itertools.combinations(range(15), 2))
        products = [(first[a] - first[b]) * (second[a] - second[b]) for a, b in pairs]
        agreed, against = sum(p > 0 for p in products), sum(p < 0 for p in products)
        only_first = sum(first[a] == first[b] and second[a] != second[b] for a, b in pairs)
        only_second = sum(first[a] != first[b] and second[a] == second[b] for a, b in pairs)
        untied = agreed + against
        expected = (agreed - against) / math.sqrt((untied + only_first) * (untied + only_second))
        assert only_first > 0
        assert kendall_tau(first, second) == pytest.approx(expected)


def test_a_score_that_is_the_same_throughout_has_no_ranking() -> None:
    assert math.isnan(kendall_tau(numbers(1, 1, 1), numbers(1, 2, 3)))
    assert math.isnan(partial_tau(numbers(1, 2, 3), numbers(1, 3, 2), given=numbers(1, 2, 3)))


def test_what_two_scores_owe_to_a_third_is_left_out_of_the_partial_tau() -> None:
    cost = np.repeat(np.arange(60.0), 2)
    # within equal costs the two scores agree, or one half of them does not
    tilt = np.tile([0.0, 0.1], 60)
    against = tilt * np.where(np.arange(120) % 4 < 2, 1, -1)
    agreeing = partial_tau(cost + tilt, cost + tilt + 7, given=cost)
    unrelated = partial_tau(cost + tilt, cost + against, given=cost)
    assert agreeing == pytest.approx(1)
    assert unrelated == pytest.approx(0, abs=1e-9)
    assert kendall_tau(cost + tilt, cost + against) > 0.95


def test_the_partial_tau_is_the_correlation_of_signs_given_those_of_the_third() -> None:
    # Kendall's own reading: a partial correlation of the signs of all pairs
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=12) for _ in range(3)]
    pairs = list(itertools.combinations(range(12), 2))
    signs = [numbers(*(np.sign(s[a] - s[b]) for a, b in pairs)) for s in scores]
    left = [signs[i] - (signs[i] @ signs[2]) / (signs[2] @ signs[2]) * signs[2] for i in (0, 1)]
    expected = left[0] @ left[1] / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))
    assert partial_tau(scores[0], scores[1], given=scores[2]) == pytest.approx(expected)


def test_the_relative_improvement_is_a_part_of_what_chance_reaches() -> None:
    # Yang et al. 2020, section 3: 100 * (method - random) / random, here not in per cent
    assert relative_improvement(0.97, 0.94) == pytest.approx(0.0319, abs=5e-5)
    assert relative_improvement(0.4, 0.5) == pytest.approx(-0.2)
    assert math.isnan(relative_improvement(0.4, 0.0))


def test_neighbours_in_cost_are_paired_and_the_dearest_may_be_left_over() -> None:
    assert neighbours(numbers(30, 10, 40, 20)).tolist() == [[1, 3], [0, 2]]
    assert neighbours(numbers(30, 10, 20)).tolist() == [[1, 2]]


def test_choosing_by_a_score_wins_what_it_gets_right_less_what_it_gets_wrong() -> None:
    pairs = np.array([[0, 1], [2, 3]])
    accuracies = numbers(0.4, 0.6, 0.5, 0.7)
    mean = 0.55
    assert improvement_of_choice(pairs, accuracies, accuracies) == pytest.approx(0.1 / mean)
    assert improvement_of_choice(pairs, -accuracies, accuracies) == pytest.approx(-0.1 / mean)
    assert improvement_of_choice(pairs, numbers(0, 1, 1, 0), accuracies) == pytest.approx(0)
    assert improvement_of_choice(pairs, numbers(0, 1, 1, 1), accuracies) == pytest.approx(0.05 / mean)


def test_chosen_networks_are_held_against_others_of_the_same_cost() -> None:
    places, accuracies = numbers(0, 1), numbers(0.4, 0.8)
    assert improvement_along(places, accuracies, at=numbers(0.25), found=numbers(0.55)) == pytest.approx(0.1)
    none = improvement_along(places, accuracies, at=numbers(0.2, 0.7), found=numbers(0.48, 0.68))
    assert none == pytest.approx(0)


def test_an_interval_repeats_with_its_seed_and_holds_its_value() -> None:
    values = np.random.default_rng(0).normal(size=30)

    def mean(seed: int) -> tuple[float, float, float]:
        found = bootstrap(lambda rows, _: float(values[rows].mean()), rows=30, seed=seed, resamples=200)
        assert found is not None
        return found.value, found.low, found.high

    assert mean(1) == mean(1)
    assert mean(1) != mean(2)
    value, low, high = mean(1)
    assert value == values.mean()
    assert low < value < high


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(size=200)
    found = bootstrap(lambda rows, _: float(values[rows].mean()), rows=200, resamples=2000)
    assert found is not None
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_the_interval_of_an_accuracy_over_images_is_that_of_the_binomial_distribution() -> None:
    hits = np.zeros((1, 400))
    hits[0, :300] = 1
    found = bootstrap(lambda rows, w: float((hits @ w)[rows].mean()), rows=1, images=400, resamples=2000)
    assert found is not None
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.12 * half)


def _area_of(places: Floats, hits: Floats) -> Statistic:
    return lambda rows, weights: area(places[rows], (hits @ weights)[rows])


def test_intervals_of_an_area_hold_the_true_area_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    count, images, held = 14, 100, 0
    for repeat in range(40):
        inner = (np.arange(count - 2) + rng.random(count - 2)) / (count - 2)
        places = np.concatenate([[0.0], inner, [1.0]])
        ability = 0.5 + 0.3 * places + 0.04 * rng.normal(size=count)
        # an image is hard for all networks or for none; half of what makes it hard is the network's own
        hardness = np.where(rng.random(images) < 0.5, rng.random(images), rng.random((count, images)))
        hits = (hardness < ability[:, None]).astype(np.float64)
        found = bootstrap(
            _area_of(places, hits),
            rows=count,
            images=images,
            kept=(0, count - 1),
            seed=repeat,
            resamples=100,
        )
        assert found is not None
        held += found.low <= 0.65 <= found.high
    assert held >= 35  # 95 % of 40 are 38; fewer than 35 come by chance once in 70 times


def test_rows_that_were_chosen_are_in_every_draw() -> None:
    draws: list[list[int]] = []

    def note(rows: Indices, _: Floats) -> float:
        draws.append(rows.tolist())
        return float(rows.sum())

    bootstrap(note, rows=5, kept=(0, 4), resamples=50)
    assert all(drawn[0] == 0 and drawn[-1] == 4 and len(drawn) == 5 for drawn in draws)
    assert all(drawn.count(0) == drawn.count(4) == 1 for drawn in draws)
    assert {row for drawn in draws for row in drawn} == set(range(5))
    assert len({tuple(drawn) for drawn in draws}) > 5


def test_a_draw_without_the_figure_may_have_been_anything_within_its_bounds() -> None:
    two = numbers(1, 2)

    def tau(rows: Indices, _: Floats) -> float:
        return kendall_tau(two[rows], two[rows])  # every other draw is of one row alone

    found = bootstrap(tau, rows=2, bounds=(-1, 1), resamples=50)
    assert found is not None
    assert (found.value, found.low, found.high) == (1, -1, 1)
    assert bootstrap(tau, rows=2, resamples=50) is None


def test_a_figure_that_is_not_there_is_none() -> None:
    same, two = numbers(1, 1), numbers(1, 2)
    found = bootstrap(
        lambda rows, _: kendall_tau(same[rows], two[rows]), rows=2, bounds=(-1, 1), resamples=50
    )
    assert found is None


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap(lambda *_: 0.0, rows=0)
    with pytest.raises(ValueError, match="at least one point"):
        area(numbers(), numbers())
    with pytest.raises(ValueError, match="at least one pair"):
        improvement_of_choice(np.empty((0, 2), dtype=np.int64), numbers(1), numbers(1))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 60])
def test_hits_are_read_back_as_they_were_written(count: int) -> None:
    hits = np.random.default_rng(count).random(count) < 0.5
    assert hits_from_text(hits_to_text(hits), count).tolist() == hits.tolist()


@pytest.mark.parametrize(("text", "count"), [("ff", 9), ("ffff", 8), ("f", 4), ("zz", 8)])
def test_hits_that_are_not_as_many_as_they_should_be_are_refused(text: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"bits|hex"):
        hits_from_text(text, count)
