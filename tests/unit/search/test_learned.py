"""Fast stand-ins of slow functions: close, exact where asked before, honest about the rest."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nestling.search.encoding import Codes, Encoding
from nestling.search.learned import cheapest, learn
from nestling.space import Arch, Choice, Need, SearchSpace


def blocks() -> SearchSpace:
    choices = [Choice("resolution", (16, 24, 32))]
    for stage in ("s1", "s2", "s3"):
        choices += [Choice(f"{stage}.depth", (1, 2)), Choice(f"{stage}.width", (8, 12, 16))]
        for block in (1, 2):
            needs = (Need(f"{stage}.depth", 2),) if block == 2 else ()
            choices.append(Choice(f"{stage}.b{block}.expand", (2, 3, 4), needs))
    return SearchSpace("toy", tuple(choices))


def cost(arch: Arch) -> float:
    """Multiply-accumulates as a network has them: products of widths, summed over blocks."""
    total, before = 0.0, 4
    for stage in ("s1", "s2", "s3"):
        width = arch.integer(f"{stage}.width")
        for block in range(1, arch.integer(f"{stage}.depth") + 1):
            inner = before * arch.integer(f"{stage}.b{block}.expand")
            total += inner * (before + 9 + width)
            before = width
    return total * arch.integer("resolution") ** 2


def test_a_cost_of_blocks_is_learned_from_few_archs() -> None:
    space = blocks()
    learned = learn(space, cost, samples=120)
    assert learned.typical < 0.05
    codes = Encoding(space).sample(100, np.random.default_rng(9))
    truth = np.array([cost(arch) for arch in Encoding(space).archs(codes)])
    parts = np.abs(learned(codes) - truth) / truth
    assert np.median(parts) < 0.05
    assert parts.max() < 3 * learned.worst


def test_what_was_asked_for_is_told_exactly() -> None:
    space = blocks()
    learned = learn(space, cost, samples=20)
    codes = Encoding(space).codes([space.smallest, space.largest])
    assert learned(codes).tolist() == [cost(space.smallest), cost(space.largest)]


def test_too_few_samples_and_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples; give at least 10"):
        learn(blocks(), cost, samples=3)
    with pytest.raises(ValueError, match="has the value inf; it must be finite"):
        learn(blocks(), lambda arch: cost(arch) * float("inf"), samples=10)


def test_archs_without_a_value_are_passed_over() -> None:
    space = blocks()

    def some(arch: Arch) -> float | None:
        return None if arch["s2.width"] == space.largest["s2.width"] else cost(arch)

    learned = learn(space, some, samples=60)
    assert len(learned.known) == len(learn(space, cost, samples=60).known)  # others make up for them
    assert learned.typical < 0.2
    with pytest.raises(ValueError, match="only 0 archs have a value"):
        learn(space, lambda _: None, samples=20)
    few = space.only({"s1.width": [8], "s1.depth": [1], "s2.depth": [1], "s3.depth": [1], "resolution": [16]})
    whole = learn(few, some, samples=few.size)
    codes = Encoding(few).codes([few.smallest, few.largest])
    assert whole.typical == 0.0
    assert whole(codes)[0] == cost(few.smallest)
    assert whole(codes)[1] > 0


def test_of_a_space_with_few_archs_all_are_asked_for() -> None:
    space = blocks().only({"s1.width": [8], "s2.depth": [1], "s3.depth": [1], "resolution": [16]})
    learned = learn(space, cost, samples=space.size)
    assert (learned.typical, learned.worst) == (0.0, 0.0)
    archs = list(space.walk())
    assert learned(Encoding(space).codes(archs)).tolist() == [cost(arch) for arch in archs]


def test_the_cheapest_archs_are_found_where_they_are_not_at_an_end() -> None:
    space = blocks().only({"s1.depth": [2], "s2.depth": [1], "s3.depth": [1], "resolution": [16]})

    def away(codes: Codes) -> NDArray[np.float64]:
        return np.asarray(1.0 + np.abs(codes - 1).sum(axis=1), dtype=np.float64)

    found = cheapest(space, away, count=3)
    everything = Encoding(space).codes(space.walk())
    values = away(Encoding(space).codes(found))
    assert values[0] == away(everything).min()
    assert values.tolist() == sorted(values)
