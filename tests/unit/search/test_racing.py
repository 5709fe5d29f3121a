"""Racing saves images and loses, up to what is stated, nothing that is on the front."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from nestling.search import Metrics, Problem, SearchResult, Trial
from nestling.search.racing import CONFIDENCE, Scored, is_beaten, looks, most_correct, race, unbeaten
from nestling.space import Arch, Choice, SearchSpace

TOTAL = 2000


def archs(count: int) -> SearchSpace:
    return SearchSpace("toy", (Choice("width", tuple(range(1, count + 1))),))


def trial(arch: Arch, **metrics: float) -> Trial:
    return Trial(0, arch, metrics, "complete")


@pytest.mark.parametrize(
    ("total", "ends"), [(60, (60,)), (360, (64, 128, 256, 360)), (5000, (625, 1250, 2500, 5000)), (1, (1,))]
)
def test_looks_double_until_all_is_seen(total: int, ends: tuple[int, ...]) -> None:
    assert looks(total) == ends


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        looks(0)


def test_what_all_images_may_reach_is_what_drawing_them_would_give() -> None:
    risk, total = 0.05, 40
    for correct in (0, 3, 8, 10):
        most = most_correct(Scored(correct, 10), total, risk=risk)
        drawn = {
            right: np.random.default_rng(right).hypergeometric(right, total - right, 10, size=20_000)
            for right in (most, most + 1)
            if correct <= right <= total - (10 - correct)
        }
        assert (drawn[most] <= correct).mean() >= risk - 0.006
        if most + 1 in drawn:
            assert (drawn[most + 1] <= correct).mean() < risk + 0.006


def test_nothing_is_left_open_once_every_image_was_seen() -> None:
    assert most_correct(Scored(7, 20), 20, risk=0.01) == 7


def per_look(hits: NDArray[np.bool_], ends: Sequence[int]) -> list[int]:
    return [int(part.sum()) for part in np.split(hits, list(ends)[:-1])]


def test_a_candidate_that_is_not_beaten_is_scored_on_all_images_as_often_as_stated() -> None:
    rng, ends, kept = np.random.default_rng(0), looks(400), 0
    for _ in range(400):
        # exactly as accurate as what it would be beaten by, were it any worse: the hardest case
        hits = np.zeros(400, dtype=np.bool_)
        hits[rng.permutation(400)[:300]] = True
        found = race(per_look(hits, ends).__getitem__, lambda top1: top1 < 0.75, ends=ends)
        kept += found.seen == 400
    # 400 races at 99 % lose more than 10 with a chance of 0.3 % only
    assert binom.sf(10, 400, 1 - CONFIDENCE) < 0.004
    assert kept >= 390


def searched(*, racing: bool) -> tuple[SearchResult, int]:
    """A search of 300 archs whose accuracies are known, and how many images it looked at."""
    rng = np.random.default_rng(1)
    space = archs(300)
    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={})
    ends, seen = looks(TOTAL) if racing else (TOTAL,), 0
    trials: list[Trial] = []
    order = np.random.default_rng(2).permutation(TOTAL)
    for number, arch in enumerate(space.walk()):
        latency = float(rng.uniform(1, 10))
        chance = 0.6 + 0.03 * latency - float(rng.exponential(0.08))
        hits = (np.random.default_rng(number).random(TOTAL) < chance)[order]
        costs: Metrics = {"latency_ms": latency, "mmacs": latency}
        found = race(per_look(hits, ends).__getitem__, partial(is_beaten, trials, costs), ends=ends)
        seen += found.seen
        images = {"top1_images": float(found.seen), "top1_partial": float(found.seen < TOTAL)}
        metrics = {**costs, "top1": found.top1, **images}
        trials.append(Trial(number, arch, metrics, "complete"))
    return SearchResult(problem, tuple(trials)), seen


def test_a_race_looks_at_fewer_images_and_finds_the_same_front() -> None:
    (raced, seen), (whole, all_images) = searched(racing=True), searched(racing=False)
    assert {t.arch for t in raced.front} == {t.arch for t in whole.front}
    assert len(whole.front) > 5
    assert seen < 0.6 * all_images


@pytest.fixture
def better() -> Trial:
    return trial(archs(3).smallest, top1=0.9, latency_ms=2.0, mmacs=5.0, size_mb=1.0)


def test_a_trial_beats_only_what_is_dearer_in_every_cost(better: Trial) -> None:
    assert is_beaten([better], {"latency_ms": 2.0, "mmacs": 5.0, "size_mb": 1.5}, 0.89)
    assert not is_beaten([better], {"latency_ms": 2.0, "mmacs": 5.0, "size_mb": 0.9}, 0.89)
    assert not is_beaten([better], {"latency_ms": 2.0, "mmacs": 5.0, "size_mb": 1.5}, 0.9)
    assert not is_beaten([better], {"latency_ms": 3.0, "peak_mb": 1.0}, 0.5)  # it has no such metric


@pytest.mark.parametrize("flag", ["top1_partial", "latency_unstable"])
def test_what_is_not_sure_itself_beats_nothing(better: Trial, flag: str) -> None:
    unsure = trial(better.arch, **better.metrics, **{flag: 1.0})
    assert not is_beaten([unsure], {"latency_ms": 9.0}, 0.1)


def test_a_partial_score_is_on_no_front_and_keeps_no_limit(better: Trial) -> None:
    space = archs(3)
    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={"top1": 0.95})
    lucky = trial(space.largest, top1=0.97, latency_ms=1.0, top1_partial=1.0)
    result = SearchResult(problem, (better, lucky))
    assert result.front == ()
    assert "the nearest has 0.9" in result.unmet[0]
    assert SearchResult(Problem(space, problem.objectives), (better, lucky)).front == (better,)


def test_what_lost_its_race_to_a_trial_that_turned_out_dearer_is_told(better: Trial) -> None:
    space = archs(4)
    _, second, third, fourth = space.walk()
    costs = {"latency_ms": 2.5, "mmacs": 6.0, "size_mb": 2.0}
    # of all 400 images at most 0.9 and 0.39 are plausible
    near = trial(second, **costs, top1=50 / 64, top1_images=64.0, top1_partial=1.0)
    far = trial(third, **costs, top1=15 / 64, top1_images=64.0, top1_partial=1.0)
    whole = trial(fourth, **costs, top1=0.6, top1_images=400.0, top1_partial=0.0)
    assert unbeaten([better, far, near, whole], total=400) == []
    slower = trial(better.arch, **{**better.metrics, "latency_ms": 3.0})
    assert unbeaten([slower, far, near, whole], total=400) == [near]  # `whole` beats the other one still
    assert unbeaten([slower, far, near], total=400) == [near, far]


def test_a_race_stays_lost_to_a_trial_whose_latency_is_no_more_than_unstable_since(better: Trial) -> None:
    _, second, _ = archs(3).walk()
    costs = {"latency_ms": 2.5, "mmacs": 6.0, "size_mb": 2.0}
    near = trial(second, **costs, top1=50 / 64, top1_images=64.0, top1_partial=1.0)
    doubted = trial(better.arch, **better.metrics, latency_unstable=1.0)
    assert unbeaten([doubted, near], total=400) == []
    dearer = trial(better.arch, **{**doubted.metrics, "latency_ms": 3.0})
    assert unbeaten([dearer, near], total=400) == [near]


def test_races_that_were_lost_stay_lost_where_nothing_was_timed_again() -> None:
    raced, _ = searched(racing=True)
    assert any(trial.is_partial for trial in raced.trials)
    assert unbeaten(raced.trials, total=TOTAL) == []
