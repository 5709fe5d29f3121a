"""Arch: a mapping with a key that is the same everywhere."""

from __future__ import annotations

import pytest

from nestling.space import Arch, Choice

ARCH = Arch((("depth", 2), ("se", 0.25), ("act", "relu"), ("bias", True)))


def test_an_arch_comes_back_from_json() -> None:
    assert Arch.from_json(ARCH.to_json()) == ARCH
    assert list(Arch.from_json(ARCH.to_json())) == ["depth", "se", "act", "bias"]


def test_the_key_is_the_same_in_every_process() -> None:
    assert ARCH.key == "ac1e81549a0a"


def test_archs_are_equal_when_their_keys_are() -> None:
    assert Arch((("a", 1),)) != Arch((("a", 1.0),))
    assert Arch((("a", 1),)) != Arch((("a", True),))
    assert Arch((("a", 1), ("b", 2))) != Arch((("b", 2), ("a", 1)))
    assert {ARCH: 1}[Arch(ARCH.decisions)] == 1


def test_a_choice_that_the_arch_does_not_decide_is_named() -> None:
    assert "width" not in ARCH
    with pytest.raises(KeyError, match=r"width \(this arch decides depth, se, act, bias\)"):
        ARCH["width"]


@pytest.mark.parametrize("name", ["se", "act", "bias"])
def test_only_a_whole_number_is_an_integer(name: str) -> None:
    assert ARCH.integer("depth") == 2
    with pytest.raises(TypeError, match=f"{name} must be a whole number"):
        ARCH.integer(name)


@pytest.mark.parametrize("text", ["[1]", '{"a": [1]}', '{"a": null}', "{"])
def test_json_that_is_no_arch_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"an arch is|Expecting"):
        Arch.from_json(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [((), "has no value"), ((1, 1.0), "lists a value twice"), ((float("nan"),), "is not a number")],
)
def test_a_choice_has_different_values(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"choice 'a' .*{message}"):
        Choice("a", values)
