"""Values that Python holds to be equal (1, 1.0, true) stay what the space says they are."""

from __future__ import annotations

import pytest

from nestling.space import Arch, Choice, Need, SearchSpace, Value

SWITCHED = SearchSpace(
    "toy",
    (Choice("se", (False, True)), Choice("ratio", (0.25, 1.0), (Need("se", 1),)), Choice("width", (1, 2))),
)


@pytest.mark.parametrize("written", [1, 1.0, True])
def test_an_arch_has_the_values_of_its_space_however_they_were_written(written: Value) -> None:
    arch = SWITCHED.canonical({"se": written, "ratio": written, "width": written})
    assert [type(value) for value in arch.values()] == [bool, float, int]
    assert arch.key == SWITCHED.canonical({"se": True, "ratio": 1.0, "width": 1}).key


def test_a_truth_value_can_be_needed() -> None:
    assert SWITCHED.size == 2 * (1 + 2)
    assert SWITCHED.canonical({"se": False, "ratio": 1.0, "width": 2})["ratio"] == 0.25


def test_archs_that_python_holds_to_be_equal_are_two_in_a_set() -> None:
    archs = {Arch((("a", 1),)), Arch((("a", 1.0),)), Arch((("a", True),))}
    assert len({arch.key for arch in archs}) == len(archs) == 3


def test_cutting_keeps_the_values_of_the_space() -> None:
    assert SWITCHED.only({"se": [1], "width": [True]}).largest == SWITCHED.canonical(
        {"se": True, "ratio": 1.0, "width": 1}
    )


def test_a_stage_cut_to_its_first_depth_leaves_deeper_blocks_idle() -> None:
    space = SearchSpace(
        "toy", (Choice("s1.depth", (1, 2)), Choice("s1.b2.kernel", (3, 5), (Need("s1.depth", 2),)))
    )
    assert space.size == 3
    assert space.only({"s1.depth": [1]}).size == 1
    assert list(space.only({"s1.depth": [1]}).walk()) == [space.smallest]


def test_a_group_of_choices_linked_late_is_counted_once() -> None:
    """Two choices that nothing links, until a third one needs both."""
    space = SearchSpace(
        "toy",
        (
            Choice("a", (1, 2)),
            Choice("b", (1, 2, 3)),
            Choice("free", (1, 2)),
            Choice("both", (1, 2, 3, 4), (Need("a", 2), Need("b", 2))),
        ),
    )
    assert space.size == len(list(space.walk())) == 2 * (3 + 1 + 2 * 4)
