from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from nestling.space import SearchSpace
from nestling.train.strategies import Visit
from nestling.train.watching import DIVERGED, RECENT_STEPS, Watch


def fed(watch: Watch, visits: Sequence[Visit], losses: Sequence[float], *, classes: int = 10) -> list[bool]:
    """After each step, whether training runs away."""
    told = []
    for loss in losses:
        watch.note(visits, [loss] * len(visits), classes=classes)
        told.append(watch.runs_away)
    return told


def test_training_runs_away_when_the_mean_of_fifty_steps_is_three_times_the_first(space: SearchSpace) -> None:
    visits = [Visit(space.largest)]
    losses = [2.0] + [2.0 * DIVERGED + 0.05] * RECENT_STEPS
    assert fed(Watch(), visits, losses).index(True) == RECENT_STEPS
    assert not any(fed(Watch(), visits, [2.0] + [2.0 * DIVERGED] * RECENT_STEPS))


def test_one_visit_of_a_step_that_runs_away_is_seen_beside_the_others(space: SearchSpace) -> None:
    watch, visits = Watch(), [Visit(space.largest), Visit(space.smallest, learns_from=space.largest)]
    watch.note(visits, [2.0, 2.0], classes=10)
    for _ in range(RECENT_STEPS):
        watch.note(visits, [1.0, 20.0], classes=10)
    assert watch.runs_away
    assert (watch.first, watch.mean) == (2.0, 10.5)


def test_a_network_that_begins_at_next_to_nothing_may_have_small_losses(space: SearchSpace) -> None:
    visits = [Visit(space.largest)]
    assert not any(fed(Watch(), visits, [0.004] + [0.02, 0.5, 1.3] * RECENT_STEPS))
    assert not any(fed(Watch(), visits, [1.0] + [4.0] * RECENT_STEPS, classes=1000))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_trained_network_that_goes_dead_runs_away(space: SearchSpace, classes: int) -> None:
    shares = torch.arange(classes) % 4 + 1.0  # of the labels, from one part to four
    labels = torch.repeat_interleave(torch.arange(classes), shares.to(torch.int64))
    dead = F.cross_entropy(shares.log().repeat(len(labels), 1), labels).item()
    assert fed(Watch(), [Visit(space.largest)], [0.1] + [dead] * RECENT_STEPS, classes=classes)[-1]


@pytest.mark.parametrize("joins", ["a subnet", "a teacher"])
def test_networks_that_join_are_compared_with_what_they_begin_with(space: SearchSpace, joins: str) -> None:
    watch, before = Watch(), [Visit(space.largest)]
    assert not any(fed(watch, before, [0.5] * RECENT_STEPS))
    after = [Visit(space.smallest, teacher=8.0, labels=1.0)]
    if joins == "a subnet":
        after = [*before, Visit(space.smallest, learns_from=space.largest, weight=0.1)]
    assert not any(fed(watch, after, [6.0, 4.0, 3.0] * RECENT_STEPS))
    assert watch.first == 6.0
    heavier = [*before, Visit(space.smallest, learns_from=space.largest, weight=0.2)]
    assert any(fed(watch, heavier if joins == "a subnet" else after, [40.0] * RECENT_STEPS))


def test_a_watch_goes_on_from_its_state_in_json(space: SearchSpace) -> None:
    visits, losses = [Visit(space.largest)], [1 / 3, *([7.1] * RECENT_STEPS)]
    whole, parts = Watch(), Watch()
    told = []
    for loss in losses:
        parts = Watch(json.loads(json.dumps(parts.state())))  # restarted after every step
        told += fed(parts, visits, [loss])
    assert told == fed(whole, visits, losses)
    assert told[-1]
    assert parts.mean == whole.mean
