from __future__ import annotations

import json
from functools import cache

import pytest
from torch import Tensor, nn

from nestling.models import mobilenet
from nestling.models.channels import channel_groups
from nestling.models.cost import cost
from nestling.models.probing import Axes, ChoiceAxes, patterns, probe
from nestling.space import Arch, Choice, SearchSpace


class Toy(nn.Module):
    """Two or three convolutions and a classifier, of which a test changes one thing."""

    def __init__(self, width: int, *, depth: int = 2, stride: int = 1, act: str = "relu") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.blocks = nn.Sequential(*(Block(8, width, act=act) for _ in range(depth)))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.stem(images))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Block(nn.Module):
    def __init__(self, channels: int, hidden: int, *, act: str = "relu") -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = nn.ReLU() if act == "relu" else nn.SiLU()
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        projected: Tensor = self.project(self.act(self.norm(self.expand(maps))))
        return maps + projected


def toy(arch: Arch) -> nn.Module:
    return Toy(
        arch.integer("width") if "width" in arch else 16,
        depth=arch.integer("depth") if "depth" in arch else 2,
        stride=arch.integer("stride") if "stride" in arch else 1,
        act=str(arch.get("act", "relu")),
    )


def space(*choices: Choice) -> SearchSpace:
    return SearchSpace("toy", (Choice("resolution", (8,)), *choices))


WIDTH = Choice("width", (8, 12, 16))


DEPTH = Choice("depth", (1, 2, 3))


@cache
def toy_axes() -> Axes:
    choices = (WIDTH, DEPTH, Choice("act", ("relu", "silu")), Choice("resolution", (6, 8)))
    return probe(SearchSpace("toy", choices), toy)


def row(axes: Axes, name: str) -> ChoiceAxes:
    return next(choice for choice in axes.choices if choice.choice == name)


def test_a_width_governs_what_writes_its_channels_and_what_reads_them() -> None:
    written = ("expand.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    expected = {(f"blocks.{block}.{name}", 0) for block in range(3) for name in written}
    expected |= {(f"blocks.{block}.project.weight", 1) for block in range(3)}
    assert set(row(toy_axes(), "width").axes) == expected
    assert row(toy_axes(), "width").vanishing == ()


def test_a_depth_governs_no_axis_but_makes_a_block_vanish() -> None:
    found = row(toy_axes(), "depth")
    assert (found.axes, found.vanishing) == ((), ("blocks.2",))


def test_an_activation_changes_a_setting_and_no_tensor() -> None:
    found = row(toy_axes(), "act")
    assert (found.axes, found.vanishing) == ((), ())
    assert set(found.settings) >= {f"blocks.{block}.act.class" for block in range(3)}
    assert found.macs == found.params == 1


def test_macs_and_params_are_those_that_the_cost_counter_finds() -> None:
    found = row(toy_axes(), "width")
    large, small = (cost(Toy(width, depth=3), 8) for width in (16, 12))
    assert found.macs == small.macs / large.macs
    assert found.params == small.params / large.params


def test_a_resolution_changes_the_work_alone() -> None:
    found = row(toy_axes(), "resolution")
    assert (found.axes, found.settings, found.params) == ((), (), 1)
    assert 0.5 < found.macs < 0.6


def test_the_axes_of_a_mobilenet_are_those_that_sorting_moves_together(space: SearchSpace) -> None:
    tried = ("s2.width", "s3.width")
    closed = space.only({c.name: c.values[-1:] for c in space.open_choices if c.name not in tried})
    axes = probe(closed, mobilenet.build)
    network = mobilenet.build(space.largest)
    groups = {axis: set(group.axes) for group in channel_groups(network) for axis in group.axes}
    for stage, layer in (("s2", "blocks.1"), ("s3", "blocks.2")):
        governed = set(row(axes, f"{stage}.width").axes)
        assert groups[f"{layer}.1.conv_pwl.weight", 0] <= governed


def test_the_table_draws_names_together_and_names_each_choice_once() -> None:
    rows = {name: rest for name, *rest in toy_axes().rows()}
    assert rows["width"][0] == "8, 12, 16"
    assert rows["width"][2:] == [
        "-",
        "blocks.*.expand.weight[0] blocks.*.norm.*[0] blocks.*.project.weight[1]",
    ]
    assert rows["depth"][2:] == ["blocks.2", "-"]
    assert "blocks.*.act.class (no tensor)" in rows["act"][3]
    text = str(toy_axes()).splitlines()
    assert text[0].split()[:2] == ["choice", "values"]
    assert [line.split()[0] for line in text[1:] if line[0] != " "] == ["width", "depth", "act", "resolution"]
    assert max(map(len, text)) < 160


def test_the_table_as_plain_values_survives_json() -> None:
    plain = json.loads(json.dumps(toy_axes().to_json()))
    assert plain[0]["axes"][0] == "blocks.0.expand.weight[0]"
    assert plain[1]["vanishing"] == ["blocks.2"]


@pytest.mark.parametrize(
    ("names", "universe", "found"),
    [
        (["a.0.w", "a.1.w"], ["a.0.w", "a.1.w", "b.0.w"], ["a.*.w"]),
        (["a.0.w", "a.2.w"], ["a.0.w", "a.1.w", "a.2.w"], ["a.{0,2}.w"]),
        (["a.0.w"], ["a.0.w"], ["a.*.w"]),
        (["a.0.w"], ["a.0.w", "a.1.w"], ["a.0.w"]),
        (["a.0.0.w", "a.0.1.w", "a.1.0.w"], ["a.0.0.w", "a.0.1.w", "a.1.0.w"], ["a.*.*.w"]),
        (["a.0.0.w", "a.1.1.w"], ["a.0.0.w", "a.0.1.w", "a.1.0.w", "a.1.1.w"], ["a.0.0.w", "a.1.1.w"]),
        (["stem.w", "a.10.w", "a.9.w"], ["a.8.w", "a.9.w", "a.10.w"], ["stem.w", "a.{9,10}.w"]),
    ],
)
def test_patterns_stand_for_the_names_and_no_others(
    names: list[str], universe: list[str], found: list[str]
) -> None:
    assert patterns(names, universe) == found
