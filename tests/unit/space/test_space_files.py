"""Space files: what a row means, that nothing is lost on the way to disk, and what is refused."""

from __future__ import annotations

import math
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestling.space import Choice, Need, SearchSpace, SpaceError, load_space, save_space

EXAMPLE = """
family = "mobilenet"
title = "a title"
resolution = [24, 32]
act = "relu"
stages = [
  { block = "ds", width = 16, kernel = 3 },
  { width = [16, 24], depth = [1, 2], kernel = [3, 5], expand = 3, per_block = ["kernel", "expand"] },
]
[stem]
width = [8, 16]
[stem.conv]
bias = false
"""


def load(tmp_path: Path, text: str) -> SearchSpace:
    path = tmp_path / "space.toml"
    path.write_text(text, encoding="utf-8")
    return load_space(path)


def test_a_row_is_a_stage_and_a_column_a_choice(tmp_path: Path) -> None:
    deep = (Need("s2.depth", 2),)
    assert load(tmp_path, EXAMPLE) == SearchSpace(
        "mobilenet",
        (
            Choice("resolution", (24, 32)),
            Choice("act", ("relu",)),
            Choice("stem.width", (8, 16)),
            Choice("stem.conv.bias", (False,)),
            Choice("s1.block", ("ds",)),
            Choice("s1.width", (16,)),
            Choice("s1.kernel", (3,)),
            Choice("s2.width", (16, 24)),
            Choice("s2.depth", (1, 2)),
            Choice("s2.b1.kernel", (3, 5)),
            Choice("s2.b1.expand", (3,)),
            Choice("s2.b2.kernel", (3, 5), deep),
            Choice("s2.b2.expand", (3,), deep),
        ),
    )


def test_a_column_with_dots_is_the_choice_of_layers_within_a_stage_or_a_block(tmp_path: Path) -> None:
    row = 'depth = [1, 2], conv.precision = ["w8a8", "fp32"], "fc.precision" = ["w8", "fp32"]'
    text = f'family = "a"\nstages = [ {{ {row}, per_block = ["fc.precision"] }} ]'
    space = load(tmp_path, text)
    assert [choice.name for choice in space.choices] == [
        "s1.depth",
        "s1.conv.precision",
        "s1.b1.fc.precision",
        "s1.b2.fc.precision",
    ]
    assert space.by_name["s1.b2.fc.precision"] == Choice(
        "s1.b2.fc.precision", ("w8", "fp32"), (Need("s1.depth", 2),)
    )


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.one_of(
    st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False), st.just(math.inf)
)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    names = draw(st.lists(words, min_size=1, max_size=4, unique=True))
    choices: list[Choice] = []
    for name in names:
        kind = draw(st.sampled_from([words, numbers, st.booleans()]))
        values = draw(st.lists(kind, min_size=1, max_size=4, unique=True))
        numeric = [c for c in choices if all(isinstance(v, int | float) for v in c.values)]
        needed = draw(st.lists(st.sampled_from(numeric), max_size=2)) if numeric else []
        needs = tuple(Need(c.name, draw(st.integers(-5, 5))) for c in needed)
        choices.append(Choice(name, tuple(values), needs))
    return SearchSpace(draw(words), tuple(choices))


@given(space=spaces())
@example(space=SearchSpace('"\\\n\x7f\x00', (Choice("\U0001f600 a.b", (1e-7, 1e22, -math.inf)),)))
@settings(max_examples=80, deadline=None)
def test_every_space_comes_back_from_its_file(space: SearchSpace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.toml"
        save_space(space, path)
        loaded = load_space(path)
    assert loaded == space
    types = [[type(value) for value in choice.values] for choice in space.choices]
    assert [[type(value) for value in choice.values] for choice in loaded.choices] == types


def test_a_saved_file_leaves_nothing_beside_it_and_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text("old")
    save_space(SearchSpace("toy", (Choice("a", (1, 2)),)), path)
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_save_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        save_space(SearchSpace("lone surrogate \ud800", (Choice("a", (1,)),)), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution = 3", "family is missing"),
        ("family = 'a'\nb = ", "is not TOML"),
        ("family = 'a'\nb = [3, 1]", r"b is \[3, 1\]; write numbers from cheapest to dearest"),
        ("family = 'a'\nb = []", "b has no value"),
        ("family = 'a'\nb = [1, 1]", "b lists a value twice"),
        ("family = 'a'\nb = nan", "b has the value nan"),
        ("family = 'a'\nb = 2020-01-01", "b has the value datetime"),
        ("family = 'a'\nb = [[1]]", r"b has the value \[1\]"),
        ("family = 'a'\nstages = 3", "stages must be a list of tables"),
        ("family = 'a'\nstages = [{width = [2, 1]}]", r"s1.width is \[2, 1\]"),
        (
            "family = 'a'\nstages = [{width = 1}, {depth = [0, 1]}]",
            r"s2.depth is \[0, 1\]; a depth is a whole",
        ),
        ("family = 'a'\nstages = [{depth = true}]", r"s1.depth is \[True\]"),
        ("family = 'a'\nstages = [{depth = 1, per_block = ['kernel']}]", "s1.per_block is"),
        ("family = 'a'\nstages = [{depth = 1, per_block = [['depth']]}]", "s1.per_block is"),
        ("family = 'a'\nstages = [{depth = 1, per_block = 'depth'}]", "s1.per_block is"),
        ("family = 'a'\nstages = [{depth = 1, per_block = ['depth']}]", "s1.per_block lists 'depth'"),
        ("family = 'a'\nstages = [{width = 1, per_block = ['width']}]", "s1.per_block lists 'width'"),
        ("family = 'a'\nstages = [{stride = 1, per_block = ['stride']}]", "s1.per_block lists 'stride'"),
        (
            "family = 'a'\nstages = [{k = 1, per_block = ['k', 'k']}]",
            r"s1.per_block is \['k', 'k'\]; it must .* each once",
        ),
        ("family = 'a'\nstages = [{width = 1}]\n[s1]\nwidth = 2", "two choices named 's1.width'"),
        ("family = 'a'\nchoices = [{name = 'b'}]", "a choice has name, values"),
        ("family = 'a'\nchoices = [{name = 'b', values = [1], x = 1}]", "a choice has name, values"),
        ("family = 'a'\nchoices = [{name = 'b', values = [1], needs = [{choice = 'c'}]}]", "b: a need is"),
        ("family = 'a'\nchoices = [{name = 'b', values = [1], needs = 3}]", "b: a need is"),
        (
            "family = 'a'\nchoices = [{name = 'b', values = [1]}, "
            "{name = 'c', values = [1], needs = [{choice = 'b', at_least = 'x'}]}]",
            "c: a need is",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "space.toml") in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"no space file .*nowhere.toml"):
        load_space(tmp_path / "nowhere.toml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="is not TOML"):
        load_space(tmp_path / "space.toml")
