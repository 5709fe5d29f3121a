"""Codes and features of archs, against the space itself."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nestling.search.encoding import Encoding, anything, unlike
from nestling.space import Choice, Need, SearchSpace


@pytest.fixture
def nested() -> SearchSpace:
    """A space with needs of needs, and with needs of constants."""
    return SearchSpace(
        "toy",
        (
            Choice("fixed", (2,)),
            Choice("s1.depth", (1, 2, 3)),
            Choice("s1.more", (0, 1), (Need("s1.depth", 2),)),
            Choice("s1.b3.kernel", (3, 5, 7), (Need("s1.depth", 3), Need("s1.more", 1))),
            Choice("s2.always", ("a", "b"), (Need("fixed", 2),)),
            Choice("s2.never", (1, 2, 3), (Need("fixed", 3),)),
        ),
    )


def test_codes_and_archs_turn_into_each_other(nested: SearchSpace) -> None:
    encoding = Encoding(nested)
    archs = list(nested.walk())
    codes = encoding.codes(archs)
    assert encoding.archs(codes) == archs
    assert len(np.unique(codes, axis=0)) == nested.size == len(archs)


def test_canonical_codes_are_those_of_canonical_archs(nested: SearchSpace) -> None:
    encoding = Encoding(nested)
    codes = np.random.default_rng(0).integers(0, encoding.levels, size=(200, len(encoding.levels)))
    raw = encoding.archs(codes)
    assert encoding.archs(encoding.canonical(codes)) == [nested.canonical(arch) for arch in raw]


def test_an_idle_choice_is_silent_in_all_features(nested: SearchSpace) -> None:
    encoding = Encoding(nested)
    archs = list(nested.walk())
    codes = encoding.codes(archs)
    by_hand = np.array(
        [[not nested.is_idle(choice, arch) for choice in nested.open_choices] for arch in archs]
    )
    assert (encoding.active(codes) == by_hand).all()
    hot = encoding.one_hot(codes)
    for column in range(len(encoding.levels)):
        own = hot[:, encoding.feature_columns([column])].sum(axis=1)
        assert (own == by_hand[:, column]).all()
    assert ((encoding.ordinal(codes) > 0) == by_hand).all()


def test_a_larger_network_has_a_larger_size(space: SearchSpace) -> None:
    encoding = Encoding(space)
    sizes = encoding.size(encoding.codes([space.smallest, *space.spread(3), space.largest]))
    assert (np.diff(sizes) >= 0).all()
    assert sizes[-1] == 1.0


def test_tilted_codes_reach_nearer_to_the_ends_than_plain_ones() -> None:
    encoding = Encoding(SearchSpace("toy", tuple(Choice(f"c{i}", (1, 2, 3)) for i in range(40))))
    rng = np.random.default_rng(0)
    plain, tilted = (encoding.size(encoding.sample(500, rng, tilted=tilted)) for tilted in (False, True))
    assert tilted.min() < plain.min()
    assert tilted.max() > plain.max()
    assert tilted.std() > 2 * plain.std()


def test_the_columns_of_a_stage_share_what_stands_before_the_dot(nested: SearchSpace) -> None:
    encoding = Encoding(nested)
    assert [[encoding.names[c] for c in group] for group in encoding.groups] == [
        ["s1.depth", "s1.more", "s1.b3.kernel"],
        ["s2.always", "s2.never"],
    ]


def test_rows_that_are_known_or_seen_before_are_left_out() -> None:
    codes = np.array([[1, 2], [0, 0], [1, 2], [3, 3]])
    assert unlike(codes, np.array([[0, 0]])).tolist() == [0, 3]


def test_anything_finds_the_last_unknown_arch(space: SearchSpace) -> None:
    encoding = Encoding(space)
    rng = random.Random(0)
    archs = list(space.walk())
    last = rng.choice(archs)
    known = encoding.codes([arch for arch in archs if arch != last])
    found = anything(encoding, known, 3, np.random.default_rng(0))
    assert encoding.archs(found) == [last]
