from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nestling.config import ConfigError
from nestling.models.families import FAMILIES, family
from nestling.models.graph import Graph, trace
from nestling.pipeline.policies import end_layers, governing, kept_choices, quant_policy
from nestling.space import Value, load_space

TIMM = FAMILIES["timm"]


class Branching(nn.Module):
    """A stem of two convolutions beside one another, a residual block, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.head, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.left(images) + self.right(images)
        pooled = (stem + self.block(stem)).mean((2, 3))
        logits: Tensor = self.head(pooled) + self.other(pooled)
        return logits


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return trace(Branching().eval(), resolution=4)


def test_the_ends_are_the_layers_that_no_other_feeds_and_that_feed_no_other(graph: Graph) -> None:
    assert end_layers(graph) == {"first": {"left", "right"}, "last": {"head", "other"}}


def test_rules_of_layers_that_the_network_lacks_are_left_out(graph: Graph) -> None:
    decisions: dict[str, Value] = {"block.0.precision": "w8a8", "block.7.precision": "ternary", "width": 8}
    policy = quant_policy(TIMM, decisions, graph)
    assert policy.rules == (("block.0", "w8a8"),)
    assert policy.simulated == ()


@pytest.mark.parametrize(
    ("keep", "floats"),
    [
        ({}, set()),
        ({"first": "fp32"}, {"left", "right"}),
        ({"last": "fp32", "block": "fp32"}, {"head", "other", "block.0", "block.1"}),
    ],
)
def test_what_is_kept_stays_whatever_is_chosen(graph: Graph, keep: dict[str, str], floats: set[str]) -> None:
    decisions = {f"{n}.precision": "w8a8" for n in ("left|right", "block", "block.*", "head", "other")}
    policy = quant_policy(TIMM, decisions, graph, keep=keep)
    layers = {"left", "right", "block.0", "block.1", "head", "other"}
    assert {layer for layer in layers if policy.precision(layer).name == "fp32"} == floats


def test_layers_can_be_kept_in_another_precision_than_the_others(graph: Graph) -> None:
    policy = quant_policy(TIMM, {"block.precision": "w4a4"}, graph, keep={"block": "fp32", "block.1": "w8a8"})
    assert [policy.precision(f"block.{n}").name for n in (0, 1)] == ["fp32", "w8a8"]
    assert policy.simulated == ()


def test_a_choice_of_kept_layers_only_decides_nothing(graph: Graph) -> None:
    names = ["left|right.precision", "block.precision", "block.0.precision", "head.precision"]
    keep = {"first": "fp32", "block.0": "w8a8"}
    assert kept_choices(TIMM, names, graph, keep=keep) == {
        "left|right.precision": "fp32",
        "block.0.precision": "w8a8",
    }


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"blok": "fp32"}, "names 'blok', which no layer with weights begins with; did you mean 'block"),
        ({"first": "fp33"}, "quant.keep: 'first' is 'fp33'; known: fp32, "),
    ],
)
def test_what_cannot_be_kept_is_refused(graph: Graph, keep: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kept_choices(TIMM, [], graph, keep=keep)


def test_of_two_choices_with_one_prefix_the_one_that_names_it_decides() -> None:
    for names in (
        ["head.precision", "head.classifier.precision"],
        ["s1.b1.precision", "s1.downsample.precision"],
    ):
        for order in (names, names[::-1]):
            found = governing(family("convnext" if "s1" in names[0][:2] else "mobilenet"), order)
            assert names[1] in found.values()
            assert found.get("classifier", names[1]) == found.get("stages.0.downsample", names[1]) == names[1]


PER_BLOCK = 'precision = ["w8a8", "fp32"], {column}.precision = ["w8a8", "fp32"]'
BOTH = 'per_block = ["precision", "{column}.precision"]'
ROWS = {
    "mobilenet": (
        "conv_dw",
        'block = "mbconv", width = 8, depth = [1, 2], expand = 2',
        "stem.width = 8\nhead.width = 8",
    ),
    "resnet": (
        "conv2",
        'block = "basic", width = 8, depth = [1, 2], expand = 1',
        'stem.kind = "3x3"\nstem.width = 8',
    ),
    "convnext": ("mlp.fc1", "width = 8, depth = [1, 2], expand = 2", "stem.stride = 2"),
    "vit": ("attn.qkv", "depth = [1, 2], heads = 1, mlp = 2", "embed.width = 8\npatch = 4\nhead_dim = 4"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_table_has_precisions_of_blocks_and_of_their_layers(name: str, tmp_path: Path) -> None:
    column, row, rest = ROWS[name]
    row = ", ".join([row, PER_BLOCK.format(column=column), BOTH.format(column=column)])
    text = f'family = "{name}"\nclasses = 3\nresolution = 16\n{rest}\nstages = [{{ {row} }}]\n'
    (tmp_path / "space.toml").write_text(text)
    space = load_space(tmp_path / "space.toml")
    assert space.size == 2**2 + 2**4
    assert len({space.canonical(arch).key for arch in space.walk()}) == space.size
    made = family(name)
    decisions = dict(space.largest) | {"s1.b2.precision": "w8a8", f"s1.b1.{column}.precision": "w8"}
    graph = trace(made.build(space.largest).eval(), resolution=16)
    policy = quant_policy(made, decisions, graph)
    layers = {operator.layer for operator in graph.operators if operator.weight is not None}
    ends = {other for end in ("stem", "head") for other in made.layers(end)}
    [first], [second] = made.layers("s1.b1")[:1], made.layers("s1.b2")
    inside = {at for at in layers if f"{at}.".startswith(f"{second}.") and at != f"{second}.{column}"}
    assert inside
    assert {layer for layer in layers if policy.precision(layer).name == "w8a8"} == inside
    assert {layer for layer in layers if policy.precision(layer).name == "w8"} == {f"{first}.{column}"}
    assert not any(layer.startswith(tuple(ends)) for layer in inside)
    shallow = space.canonical(
        decisions | {"s1.depth": 1, "s1.b2.precision": "w8a8", f"s1.b1.{column}.precision": "w8a8"}
    )
    small = trace(made.build(shallow).eval(), resolution=16)
    assert {prefix for prefix, _ in quant_policy(made, shallow, small).rules} == {first, f"{first}.{column}"}
