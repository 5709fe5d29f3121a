from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from nestling.models import mobilenet
from nestling.models.building import Build
from nestling.models.layouts import FindLayout, Layout, Uncuttable
from nestling.models.soundness import check
from nestling.space import Arch, Choice, Need, SearchSpace, SpaceError


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


def refused(space: SearchSpace, build: Build, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        check(space, build, resolution=8)


def test_a_choice_with_the_need_that_it_has_passes() -> None:
    needy = Choice("act", ("relu", "silu"), (Need("depth", 2),))

    def act_of_second(arch: Arch) -> nn.Module:
        network = toy(Arch(tuple((k, v) for k, v in arch.items() if k != "act")))
        if arch["act"] == "silu" and arch.integer("depth") > 1:
            network.get_submodule("blocks.1").act = nn.SiLU()
        return network

    check(SearchSpace("toy", (Choice("resolution", (8,)), DEPTH, WIDTH, needy)), act_of_second)


def test_a_mobilenet_space_passes(space: SearchSpace) -> None:
    tried = ("resolution", "s2.depth", "s2.kernel", "s3.width")
    closed = space.only({c.name: c.values[:1] for c in space.open_choices if c.name not in tried})
    check(closed, mobilenet.build)


def test_a_network_that_cannot_be_built_is_told_by_the_decision_to_blame() -> None:
    def build(arch: Arch) -> nn.Module:
        if arch["width"] == 8 and arch["depth"] == 1:
            raise ValueError("too small to be true")
        return toy(arch)

    refused(
        space(WIDTH, DEPTH),
        build,
        r"^width = 8, depth = 1, where all else .*: too small to be true; take one of",
    )


def test_a_subnet_that_is_larger_than_the_largest_is_refused() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(arch)
        if arch["act"] == "relu":
            network.add_module("extra", nn.Linear(2, 2))
        return network

    refused(
        space(WIDTH, Choice("act", ("relu", "silu"))),
        build,
        r"^act = 'relu', where all else .*: extra.weight: the largest network has no such tensor",
    )


def test_a_kept_table_of_indices_that_changes_shape_is_refused_with_its_choice() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(arch)
        network.register_buffer("index", torch.arange(arch.integer("window") ** 2))
        return network

    refused(
        space(WIDTH, Choice("window", (2, 4))),
        build,
        r"^window = 2, where .*index: this buffer would change from \(16,\) to \(4,\); a table of indices",
    )


def test_an_axis_that_the_layout_forbids_to_cut_is_refused_with_its_reason() -> None:
    def layout(network: nn.Module, arch: Arch) -> Layout:  # noqa: ARG001
        return {("blocks.0.expand.weight", 0): Uncuttable("its rows belong together")}

    find: FindLayout = layout
    with pytest.raises(
        SpaceError, match=r"^width = (8|12), where .*: its rows belong together; take the value"
    ):
        check(space(WIDTH), toy, layout=find, resolution=8)


def test_a_table_that_is_drawn_anew_in_every_build_is_refused() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(arch)
        network.register_buffer("noise", torch.randn(4), persistent=False)
        return network

    refused(space(WIDTH), build, "^noise is not kept in the network's state and has other numbers whenever")


def test_a_table_that_follows_from_the_arch_may_be_all_that_a_choice_changes() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(arch)
        table = torch.arange(4) * arch.integer("base")
        network.register_buffer("table", table, persistent=False)
        return network

    check(space(WIDTH, Choice("base", (1, 2))), build, resolution=8)


@pytest.mark.parametrize("values", [(1, 2), ("a", "b")])
def test_a_choice_that_changes_nothing_is_refused(values: tuple[int | str, ...]) -> None:
    refused(
        space(WIDTH, Choice("unread", values)),
        toy,
        r"^unread lists \[.*\], but .* and .* give the same network; make it constant, or let the family",
    )


@pytest.mark.parametrize("name", ["resolution", "precision", "blocks.precision"])
def test_a_resolution_and_a_precision_need_not_change_the_network(name: str) -> None:
    values: tuple[int | str, ...] = (8, 12) if name == "resolution" else ("w8a8", "fp32")
    check(SearchSpace("toy", (WIDTH, Choice(name, values))), toy, resolution=8)


def test_two_words_for_one_network_are_refused() -> None:
    refused(
        space(WIDTH, Choice("act", ("relu", "silu", "swish"))),
        toy,
        "'silu' and 'swish' give the same network",
    )


def test_a_missing_need_is_told() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(Arch((("width", arch["width"]), ("depth", arch["depth"]))))
        if arch["act"] == "silu" and arch.integer("depth") > 1:
            network.get_submodule("blocks.1").act = nn.SiLU()
        return network

    refused(
        space(WIDTH, DEPTH, Choice("act", ("relu", "silu"))),
        build,
        r'same network where depth is 1; .* needs = \[\{ choice = "depth", at_least = 2 \}\]',
    )


def test_a_choice_that_counts_only_beside_words_is_told_from_one_that_never_counts() -> None:
    def build(arch: Arch) -> nn.Module:
        wide = arch.integer("width") if arch["kind"] == "wide" else 4
        return Toy(wide)

    refused(
        space(Choice("kind", ("narrow", "wide")), Choice("width", (8, 16))),
        build,
        r"^width lists .*, but 8 and 16 give the same network in the arch \{.*, though not in the largest",
    )


def test_a_need_that_no_value_meets_is_refused() -> None:
    refused(
        space(DEPTH, Choice("width", (8, 16), (Need("depth", 4),))),
        toy,
        r"width needs depth of at least 4, whose values are \[1, 2, 3\]: it never counts",
    )


def sized(arch: Arch) -> nn.Module:
    return Toy({"large": 16, "middle": 12, "small": 8}[str(arch["size"])])


@pytest.mark.parametrize(
    ("order", "costs"),
    [
        (("large", "middle", "small"), "'middle' costs less than 'large'"),
        (("middle", "small", "large"), "'small' costs less than 'middle'"),
        (("small", "large", "middle"), "'middle' costs less than 'large'"),
    ],
)
def test_values_that_are_not_cheapest_first_are_refused(order: tuple[str, ...], costs: str) -> None:
    refused(
        space(Choice("size", order)), sized, rf"^size lists \[.*{costs}: .* list the values from cheapest"
    )


def test_words_that_are_cheapest_first_pass() -> None:
    check(space(Choice("size", ("small", "middle", "large"))), sized, resolution=8)


def test_fewer_macs_with_as_many_parameters_are_no_wrong_order() -> None:
    check(space(WIDTH, Choice("stride", (1, 2))), toy, resolution=8)


def test_a_build_that_depends_on_what_was_built_before_is_refused() -> None:
    built = itertools.count()

    def build(arch: Arch) -> nn.Module:
        return Toy(arch.integer("width"), stride=1 + next(built) % 2)

    refused(
        space(WIDTH), build, r"^two builds of \{.*\} differ in stem.stride; the network must follow from the"
    )


def test_a_network_that_does_not_run_at_its_resolution_is_refused() -> None:
    def build(arch: Arch) -> nn.Module:
        return nn.Sequential(toy(arch), nn.Linear(5 if arch["width"] == 16 else 4, 3))

    refused(space(WIDTH), build, "does not run for images of 8 x 8 pixels: RuntimeError")


def test_a_setting_hidden_in_a_function_is_seen() -> None:
    def build(arch: Arch) -> nn.Module:
        network = toy(Arch((("width", 16),)))
        slope = float(arch.integer("slope"))
        network.scale = lambda images: images * slope  # type: ignore[assignment]
        return network

    check(space(Choice("slope", (1, 2))), build, resolution=8)
