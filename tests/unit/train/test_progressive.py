from __future__ import annotations

import random
from itertools import product
from typing import Literal

import pytest

from nestling.space import Choice, Need, SearchSpace
from nestling.train.schedules import Cosine
from nestling.train.strategies import PUBLISHED, Phase, Progress, ProgressiveShrinking, Visit, phases_of
from nestling.train.strategies.progressive import opened_part

STEPS = 605  # one step for each published epoch


@pytest.fixture
def space() -> SearchSpace:
    """A stage as once-for-all's, with a choice of another kind."""
    blocks = [
        Choice(f"s1.b{block}.{kind}", values, (Need("s1.depth", block),))
        for block, (kind, values) in product((1, 2, 3, 4), (("kernel", (3, 5, 7)), ("expand", (3, 4, 6))))
    ]
    return SearchSpace(
        "mobilenet",
        (
            Choice("resolution", (24, 32)),
            Choice("s1.width", (8, 12, 16)),
            Choice("s1.depth", (2, 3, 4)),
            *blocks,
        ),
    )


def drawn_at(space: SearchSpace, step: int, strategy: ProgressiveShrinking) -> list[Visit]:
    visits: list[Visit] = []
    for seed in range(40):
        visits += strategy.visits(space, Progress(step, STEPS, 1), random.Random(seed))
    return visits


def values_drawn(space: SearchSpace, step: int) -> dict[str, set[object]]:
    """The values that archs of the step have, by kind of choice; idle blocks left out."""
    strategy = ProgressiveShrinking(teacher="none")
    found: dict[str, set[object]] = {}
    for visit in drawn_at(space, step, strategy):
        for choice in space.choices:
            if not space.is_idle(choice, visit.arch):
                found.setdefault(choice.name.rpartition(".")[2], set()).add(visit.arch[choice.name])
    return found


@pytest.mark.parametrize(
    ("step", "kernel", "depth", "expand", "width"),
    [
        (0, {7}, {4}, {6}, {16}),
        (179, {7}, {4}, {6}, {16}),
        (180, {3, 5, 7}, {4}, {6}, {16}),
        (305, {3, 5, 7}, {3, 4}, {6}, {16}),
        (330, {3, 5, 7}, {2, 3, 4}, {6}, {16}),
        (455, {3, 5, 7}, {2, 3, 4}, {4, 6}, {12, 16}),
        (480, {3, 5, 7}, {2, 3, 4}, {3, 4, 6}, {8, 12, 16}),
        (604, {3, 5, 7}, {2, 3, 4}, {3, 4, 6}, {8, 12, 16}),
    ],
)
def test_the_space_opens_kernel_depth_and_expand_after_one_another(
    space: SearchSpace, step: int, kernel: set[int], depth: set[int], expand: set[int], width: set[int]
) -> None:
    found = values_drawn(space, step)
    resolution = {32} if step < 180 else {24, 32}
    assert found == {
        "kernel": kernel, "depth": depth, "expand": expand, "width": width, "resolution": resolution,
    }  # fmt: skip


def test_archs_of_every_phase_are_archs_of_the_whole_space(space: SearchSpace) -> None:
    # in a part of the space an idle block is pinned to another value, which would be another name
    for step in (0, 200, 310, 400, 460, 600):
        for visit in drawn_at(space, step, ProgressiveShrinking(teacher="none")):
            assert space.canonical(visit.arch) == visit.arch


def test_the_phases_have_the_published_numbers_of_subnets(space: SearchSpace) -> None:
    strategy = ProgressiveShrinking(teacher="none")
    counts = [
        len(strategy.visits(space, Progress(step, STEPS, 1), random.Random(0)))
        for step in (0, 180, 305, 330, 455, 480)
    ]
    assert counts == [1, 1, 2, 2, 4, 4]


def test_subnets_learn_from_labels_and_from_the_largest_of_the_same_step(space: SearchSpace) -> None:
    strategy = ProgressiveShrinking(teacher="largest", distilled=0.5)
    assert strategy.visits(space, Progress(3, STEPS, 1), random.Random(0)) == [Visit(space.largest)]
    teaches, *taught = strategy.visits(space, Progress(500, STEPS, 1), random.Random(0))
    assert teaches == Visit(space.largest, weight=0.0)
    assert len(taught) == 4
    for visit in taught:
        # the whole loss is 0.5 of the soft labels' and 1 of the labels'
        assert (visit.learns_from, visit.weight, visit.weight * visit.labels_weight) == (
            space.largest,
            0.5,
            1.0,
        )


@pytest.mark.parametrize("teacher", ["outside", "frozen"])
def test_subnets_learn_from_labels_and_from_a_teacher_outside(
    space: SearchSpace, teacher: Literal["outside", "frozen"]
) -> None:
    strategy = ProgressiveShrinking(teacher=teacher, distilled=2.0)
    visits = strategy.visits(space, Progress(500, STEPS, 1), random.Random(0))
    assert len(visits) == 4
    assert {(v.learns_from, v.teacher, v.labels_weight, v.weight) for v in visits} == {(None, 2.0, 1.0, 1.0)}


def test_runs_too_short_for_every_phase_have_their_teacher_when_it_is_asked(space: SearchSpace) -> None:
    strategy = ProgressiveShrinking()
    for steps in range(1, 60):
        frozen = False
        for step in range(steps):
            progress = Progress(step, steps, 1)
            freezes = strategy.freezes_teacher(progress)
            assert not (frozen and freezes)
            frozen |= freezes
            taught = any(visit.teacher for visit in strategy.visits(space, progress, random.Random(0)))
            assert taught == frozen


def test_where_a_phase_has_no_step_channels_spare_what_the_last_one_with_steps_trained(
    space: SearchSpace,
) -> None:
    strategy, steps = ProgressiveShrinking(), 10  # of which "expand 1" has none
    sorted_at = [strategy.sorts_channels(space, Progress(step, steps, 1)) for step in range(steps)]
    (part,) = (part for part in sorted_at if part is not None)
    assert part == opened_part(space, (("kernel", 1_000), ("depth", 1_000)))


def test_channels_are_sorted_before_each_phase_of_expansions_and_spare_what_is_trained(
    space: SearchSpace,
) -> None:
    strategy = ProgressiveShrinking()
    parts = {s: strategy.sorts_channels(space, Progress(s, STEPS, 1)) for s in range(STEPS)}
    sorts = {step: part for step, part in parts.items() if part is not None}
    assert list(sorts) == [455, 480]
    for step, part in sorts.items():
        trained = strategy.phases[strategy._phase(Progress(step - 1, STEPS, 1))]
        assert part == opened_part(space, tuple(trained.opened.items()))
    never = ProgressiveShrinking(sort_channels=False)
    assert all(never.sorts_channels(space, Progress(s, STEPS, 1)) is None for s in range(STEPS))


def test_the_largest_network_is_frozen_once_its_own_phase_ends() -> None:
    frozen = [s for s in range(STEPS) if ProgressiveShrinking().freezes_teacher(Progress(s, STEPS, 1))]
    assert frozen == [180]
    outside = ProgressiveShrinking(teacher="outside")
    assert not any(outside.freezes_teacher(Progress(s, STEPS, 1)) for s in range(STEPS))


def test_the_learning_rate_of_each_phase_is_the_published_one() -> None:
    schedule = ProgressiveShrinking().schedule(lr=0.08125, warmup_steps=3, steps=STEPS, steps_per_epoch=1)
    expected = [(0, 180, 0.08125, 3), (180, 125, 3e-2, 5), (305, 25, 2.5e-3, 0), (330, 125, 7.5e-3, 5)]
    expected += [(455, 25, 2.5e-3, 0), (480, 125, 7.5e-3, 5)]
    for start, length, lr, warmup in expected:
        cosine = Cosine(lr, warmup, length)
        for step in (0, 4, 10, length - 1):
            assert schedule.at(start + step) == pytest.approx(cosine.at(step)), (start, step)


def test_phases_that_open_nothing_in_a_space_are_left_out(space: SearchSpace) -> None:
    assert phases_of(space) == PUBLISHED
    plain = space.only({"resolution": [32], "s1.width": [16]})
    assert phases_of(plain) == PUBLISHED
    no_kernels = plain.only({c.name: [7] for c in plain.choices if c.name.endswith("kernel")})
    assert [p.name for p in phases_of(no_kernels)] == ["full", "depth 1", "depth 2", "expand 1", "expand 2"]


def test_of_two_phases_that_open_the_same_the_longer_one_is_kept(space: SearchSpace) -> None:
    two_depths = space.only({"s1.depth": [3, 4]})
    names = [phase.name for phase in phases_of(two_depths)]
    assert names == ["full", "kernel", "depth 2", "expand 1", "expand 2"]


def test_a_space_of_one_network_has_one_phase(space: SearchSpace) -> None:
    assert [p.name for p in phases_of(space.only({n: [space.largest[n]] for n in space.by_name}))] == ["full"]


def test_the_part_that_is_open_keeps_the_dearest_values(space: SearchSpace) -> None:
    part = opened_part(space, (("expand", 2),))
    assert part.by_name["s1.b1.expand"].values == (4, 6)
    assert part.by_name["s1.b1.kernel"].values == (7,)
    assert part.by_name["resolution"].values == (24, 32)
    assert part.largest == space.largest


@pytest.mark.parametrize("phase", [Phase("p", 0, 0, 1, 1), Phase("p", 1, 0, 1, 0), Phase("p", 1, 2, 1, 1)])
def test_a_phase_without_length_or_subnets_is_refused(phase: Phase) -> None:
    with pytest.raises(ValueError, match="phase 'p' has"):
        ProgressiveShrinking((phase,))


def test_progressive_shrinking_without_phases_or_with_a_weight_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 phases"):
        ProgressiveShrinking(())
    with pytest.raises(ValueError, match="distilled is 0"):
        ProgressiveShrinking(distilled=0)


def test_a_run_shorter_than_its_phases_still_ends_in_the_last_one(space: SearchSpace) -> None:
    strategy = ProgressiveShrinking(teacher="none")
    schedule = strategy.schedule(lr=0.1, warmup_steps=0, steps=3, steps_per_epoch=1)
    assert all(0 < schedule.at(step) <= 0.1 for step in range(3))
    assert [len(strategy.visits(space, Progress(s, 3, 1), random.Random(0))) for s in range(3)] == [1, 1, 4]
