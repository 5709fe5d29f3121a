"""SearchSpace against brute force: its size, its canonical form, and what its moves bring."""

from __future__ import annotations

import random
import time
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.space import Arch, Choice, Need, SearchSpace, SpaceError, Value, load_space

SPACE_FILES = sorted((Path(__file__).parents[3] / "search_spaces").glob("*.toml"))


def staged() -> SearchSpace:
    """Two stages; the kernel of a stage's second and third block counts only where the stage is that deep."""
    choices = [Choice("resolution", (24, 32))]
    for stage in ("s1", "s2"):
        choices += [Choice(f"{stage}.depth", (1, 2, 3)), Choice(f"{stage}.b1.kernel", (3, 5))]
        choices += [Choice(f"{stage}.b{b}.kernel", (3, 5), (Need(f"{stage}.depth", b),)) for b in (2, 3)]
    return SearchSpace("toy", tuple(choices))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Small spaces in which needs run in chains, fan out, and meet."""
    choices: list[Choice] = []
    for index in range(draw(st.integers(1, 5))):
        values = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        needs: tuple[Need, ...] = ()
        if choices:
            needed = draw(st.lists(st.sampled_from(choices), max_size=2, unique_by=lambda c: c.name))
            needs = tuple(Need(choice.name, draw(st.integers(0, 5))) for choice in needed)
        choices.append(Choice(f"c{index}", tuple(sorted(values)), needs))
    return SearchSpace("toy", tuple(choices))


def every_arch(space: SearchSpace) -> set[Arch]:
    """All archs, by canonicalizing every combination of values."""
    names = [choice.name for choice in space.choices]
    combinations = product(*(choice.values for choice in space.choices))
    return {space.canonical(dict(zip(names, values, strict=True))) for values in combinations}


@given(space=spaces())
@settings(max_examples=80, deadline=None)
def test_size_and_walk_agree_with_brute_force(space: SearchSpace) -> None:
    archs = every_arch(space)
    assert space.size == len(archs)
    walked = list(space.walk())
    assert len(walked) == len(archs)
    assert set(walked) == archs


@given(space=spaces(), seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_every_move_brings_a_canonical_arch_of_the_space(space: SearchSpace, seed: int) -> None:
    rng = random.Random(seed)
    archs = every_arch(space)
    first, second = space.sample(rng), space.sample(rng)
    mutated = space.mutate(first, rng, probability=0.5)
    crossed = space.cross(first, second, rng=rng)
    spread = space.spread(4)
    for arch in (first, mutated, crossed, space.smallest, space.largest, *spread):
        assert arch in archs
        assert space.canonical(arch) == arch
    for name in crossed:
        idle = space.is_idle(space.by_name[name], crossed)
        assert idle or crossed[name] in (first[name], second[name])


@given(space=spaces())
@settings(max_examples=60, deadline=None)
def test_one_network_has_one_key(space: SearchSpace) -> None:
    archs = every_arch(space)
    assert len({arch.key for arch in archs}) == len(archs)


def test_the_kernel_of_a_block_that_depth_leaves_out_changes_nothing() -> None:
    space = staged()
    shallow = {**space.largest, "s2.depth": 1}
    assert space.canonical(shallow)["s2.b3.kernel"] == 3
    assert space.canonical(shallow) == space.canonical({**shallow, "s2.b2.kernel": 3})
    assert space.canonical(shallow) != space.canonical({**shallow, "s2.b1.kernel": 3})


def test_a_choice_that_needs_an_idle_one_is_idle() -> None:
    space = SearchSpace(
        "toy",
        (
            Choice("depth", (1, 2)),
            Choice("attention", (4, 8), (Need("depth", 2),)),
            Choice("window", (3, 5), (Need("attention", 4),)),
        ),
    )
    assert [dict(arch) for arch in space.walk()] == [
        {"depth": 1, "attention": 4, "window": 3},
        {"depth": 2, "attention": 4, "window": 3},
        {"depth": 2, "attention": 4, "window": 5},
        {"depth": 2, "attention": 8, "window": 3},
        {"depth": 2, "attention": 8, "window": 5},
    ]
    assert space.size == 5


def test_equal_numbers_of_another_type_give_the_same_key() -> None:
    space = staged()
    written = {name: float(v) for name, v in space.largest.items() if isinstance(v, int)}
    assert space.canonical(written).key == space.largest.key


def test_the_size_of_a_large_space_is_exact_and_instant() -> None:
    blocks = 4
    choices: list[Choice] = []
    for s in range(5):
        choices.append(Choice(f"s{s}.depth", (2, 3, 4)))
        for b in range(1, blocks + 1):
            choices += [Choice(f"s{s}.b{b}.{k}", (1, 2, 3), (Need(f"s{s}.depth", b),)) for k in ("k", "e")]
    began = time.process_time()
    assert SearchSpace("ofa", tuple(choices)).size == (9**2 + 9**3 + 9**4) ** 5
    assert time.process_time() - began < 0.5


def test_smallest_and_largest_hold_first_and_last_values() -> None:
    space = staged()
    assert set(space.smallest.values()) == {24, 1, 3}
    assert all(space.largest[c.name] == c.values[-1] for c in space.choices)


def test_spread_runs_from_smallest_to_largest_without_repeats() -> None:
    space = staged()
    archs = space.with_constants({"resolution": 24}).only({"s2.depth": [3]}).spread(4)
    assert [(arch["s1.depth"], arch["s2.b3.kernel"]) for arch in archs] == [(1, 3), (2, 3), (2, 5), (3, 5)]
    assert space.spread(7)[0] == space.smallest
    assert space.spread(7)[-1] == space.largest
    assert len(set(space.spread(50))) == len(space.spread(50)) < 50
    assert space.spread(1) == [space.smallest]
    assert space.spread(0) == []


def test_samples_reach_every_arch_of_a_small_space() -> None:
    space = staged().only({"s2.depth": [1]})
    rng = random.Random(0)
    assert {space.sample(rng) for _ in range(3000)} == every_arch(space)


def test_mutation_changes_nothing_at_probability_zero() -> None:
    space = staged()
    assert space.mutate(space.largest, random.Random(0), probability=0.0) == space.largest


def test_only_keeps_the_order_of_the_space() -> None:
    space = staged().only({"s1.depth": [3, 1]})
    assert space.by_name["s1.depth"].values == (1, 3)
    assert [c.name for c in space.choices] == [c.name for c in staged().choices]


def test_constants_override_and_are_added() -> None:
    space = staged().with_constants({"classes": 10, "resolution": 28})
    assert space.largest["classes"] == 10
    assert space.largest["resolution"] == 28
    assert space.size * 2 == staged().size


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"s1.depht": 2}, "no choice 's1.depht'; did you mean 's1.depth'"),
        ({"zzz": 2}, "no choice 'zzz'; its choices are resolution"),
        ({"s1.depth": 7}, r"s1.depth is 7; its values are \[1, 2, 3\]"),
    ],
)
def test_a_wrong_decision_is_named(decisions: dict[str, Value], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        staged().canonical({**staged().smallest, **decisions})


def test_a_missing_decision_is_named() -> None:
    with pytest.raises(SpaceError, match=r"s1.depth is not decided"):
        staged().canonical({"resolution": 24})


@pytest.mark.parametrize("values", [[], [9]])
def test_a_space_cannot_be_cut_to_values_it_does_not_have(values: list[int]) -> None:
    with pytest.raises(SpaceError, match=r"s1.depth cannot be cut to"):
        staged().only({"s1.depth": values})
    with pytest.raises(SpaceError, match=r"did you mean 's1.depth'"):
        staged().only({"s1.dept": [1]})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((Choice("a", (1,)), Choice("a", (2,))), "two choices named 'a'"),
        ((Choice("a", (1,), (Need("b", 1),)), Choice("b", (1,))), "needs 'b', which must stand before"),
        (
            (Choice("b", ("x",)), Choice("a", (1,), (Need("b", 1),))),
            "needs 'b', whose values are not numbers",
        ),
    ],
)
def test_choices_that_contradict_each_other_are_refused(choices: tuple[Choice, ...], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace("toy", choices)


@pytest.mark.parametrize("path", SPACE_FILES, ids=lambda path: path.stem)
def test_the_spaces_that_come_along_can_be_loaded(path: Path) -> None:
    assert load_space(path).size > 50


def test_there_are_spaces_that_come_along() -> None:
    assert SPACE_FILES
