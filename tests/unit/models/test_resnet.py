from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.graph import trace
from nestling.models.resnet import build, layers, rebuild
from nestling.models.supernet import Supernet, at_resolution
from nestling.space import Arch, Choice, SearchSpace, Value, load_space

SPACES = Path(__file__).parents[3] / "search_spaces"
ROWS: list[tuple[str, tuple[Value, ...]]] = [
    ("resolution", (16, 24)),
    ("classes", (5,)),
    ("act", ("relu",)),
    ("avg_down", (True,)),
    ("stem.kind", ("residual",)),
    ("stem.width", (8, 16)),
    ("stem.middle", (8, 16)),
    ("stem.depth", (2, 3)),
    ("s1.block", ("basic",)),
    ("s1.width", (16, 24)),
    ("s1.depth", (1, 2)),
    ("s1.expand", (0.5, 1.0)),
    ("s1.precision", ("fp32",)),
    ("s2.block", ("bottleneck",)),
    ("s2.width", (32, 40)),
    ("s2.depth", (2, 3)),
    ("s2.b1.expand", (0.25, 0.5)),
    ("s2.b2.expand", (0.25, 0.5)),
    ("s2.b3.expand", (0.25, 0.5)),
    ("s2.stride", (2,)),
    ("s2.se", (0.25,)),
    ("s2.act", ("hard_swish",)),
]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """A stage of basic blocks and one of bottlenecks, with squeeze-and-excitation and once-for-all's stem."""
    return SearchSpace("resnet", tuple(Choice(name, values) for name, values in ROWS))


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    """A supernet whose weights and statistics are all different from one another."""
    torch.manual_seed(0)
    supernet = Supernet(space, build)
    randomize(supernet.largest)
    return supernet


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Four images (4, 3, 24, 24)."""
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def randomize(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            positive = name.endswith(("running_var", "weight"))
            tensor.uniform_(0.5, 1.5) if positive else tensor.uniform_(-0.5, 0.5)


def change(arch: Arch, **values: Value) -> Arch:
    return Arch(tuple({**arch, **{k.replace("__", "."): v for k, v in values.items()}}.items()))


def stages(block: str, *, widths: tuple[int, ...], depths: tuple[int, ...], **rest: Value) -> Arch:
    decisions: dict[str, Value] = {"classes": 5}
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        decisions |= {
            f"s{number}.block": block,
            f"s{number}.width": width,
            f"s{number}.depth": depth,
            f"s{number}.stride": 1 if number == 1 else 2,
        }
    return Arch(tuple({**decisions, **{k.replace("__", "."): v for k, v in rest.items()}}.items()))


def convolution(network: nn.Module, name: str) -> nn.Conv2d:
    found = network.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


DEPTHS = (1, 2, 1, 1)
DEEP: dict[str, Any] = {"stem_type": "deep", "stem_width": 8, "avg_down": True}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            stages("bottleneck", widths=(32, 64, 96, 128), depths=DEPTHS, stem__width=64),
            lambda: ResNet(Bottleneck, DEPTHS, num_classes=5, channels=(8, 16, 24, 32)),  # type: ignore[arg-type]
        ),
        (
            stages("basic", widths=(8, 16, 24, 32), depths=DEPTHS, stem__width=64),
            lambda: ResNet(BasicBlock, DEPTHS, num_classes=5, channels=(8, 16, 24, 32)),  # type: ignore[arg-type]
        ),
        (
            stages(
                "bottleneck", widths=(32, 64, 96, 128), depths=DEPTHS,
                stem__width=16, stem__kind="deep", avg_down=True,
            ),
            lambda: ResNet(Bottleneck, DEPTHS, num_classes=5, channels=(8, 16, 24, 32), **DEEP),  # type: ignore[arg-type]
        ),
    ],
    ids=["bottleneck", "basic", "resnet-d"],
)  # fmt: skip
def test_a_network_that_timm_has_is_timms(ours: Arch, theirs: Any, images: Tensor) -> None:
    torch.manual_seed(0)
    network, expected = build(ours), theirs()
    randomize(expected)
    network.load_state_dict(expected.state_dict(), strict=True)
    assert network.feature_info == expected.feature_info
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected.eval()(images))


def test_resnet50d_costs_what_timms_does() -> None:
    space = load_space(SPACES / "ofa_resnet50d.toml").with_constants({"classes": 1000})
    decisions: dict[str, Value] = {f"s{i}.depth": depth for i, depth in enumerate((3, 4, 6, 3), start=1)}
    expands = {name: 0.25 for name in space.largest if name.endswith(".expand")}
    arch = space.canonical({**space.largest, **decisions, **expands})
    ours = cost(build_shapes(build, arch), 224)
    theirs = cost(build_shapes(lambda _: timm.create_model("resnet50d"), arch), 224)
    assert (ours.macs, ours.params) == (theirs.macs, theirs.params)


# by hand: 0.25 * 208 = 52 lies in the middle of 48 and 56; 0.25 * 40 = 10 would lose a fifth
MIDDLES = [
    ("bottleneck", 168, 0.2, 32), ("bottleneck", 168, 0.25, 40), ("bottleneck", 168, 0.35, 56),
    ("bottleneck", 208, 0.2, 40), ("bottleneck", 208, 0.25, 56), ("bottleneck", 208, 0.35, 72),
    ("bottleneck", 2048, 0.35, 720), ("bottleneck", 40, 0.25, 16),
    ("basic", 24, 0.5, 16), ("basic", 48, 0.75, 40), ("basic", 16, 1.5, 24),
]  # fmt: skip


@pytest.mark.parametrize(("block", "width", "expand", "middle"), MIDDLES)
def test_the_middle_of_a_block_is_a_part_of_its_width_to_a_multiple_of_8(
    block: str, width: int, expand: float, middle: int
) -> None:
    arch = stages(block, widths=(width,), depths=(2,), stem__width=8, s1__expand=expand)
    network = build_shapes(build, arch)
    for number, inputs in enumerate((8, width)):
        assert convolution(network, f"layer1.{number}.conv1").weight.shape[:2] == (middle, inputs)
        last = "conv2" if block == "basic" else "conv3"
        assert convolution(network, f"layer1.{number}.{last}").weight.shape[:2] == (width, middle)


def test_only_the_first_block_of_a_stage_has_a_convolution_in_its_shortcut() -> None:
    # widths and strides that would need none anywhere
    arch = stages("basic", widths=(16, 16), depths=(3, 2), stem__width=16, s2__stride=1)
    network = build_shapes(build, arch)
    for stage in ("layer1", "layer2"):
        blocks = list(network.get_submodule(stage).children())
        assert ["downsample" in block._modules for block in blocks] == [True] + [False] * (len(blocks) - 1)


def test_a_step_is_taken_by_the_first_block_alone(images: Tensor) -> None:
    arch = stages(
        "basic", widths=(8, 8, 8), depths=(2, 2, 1), stem__width=8, stem__kind="3x3", stem__stride=1
    )
    for pool, sides in ((True, [12, 6, 3]), (False, [24, 12, 6])):
        network = build(change(arch, stem__pool=pool))
        _, (stem, *maps, _) = network.forward_intermediates(images)
        assert [m.shape[-1] for m in (stem, *maps)] == [24, *sides]
        told: Any = network.feature_info
        assert [24 // info["reduction"] for info in told] == [24, *sides]


def test_a_block_decides_its_own_middle(space: SearchSpace) -> None:
    network = build_shapes(build, change(space.largest, s2__b2__expand=0.25))
    middles = [convolution(network, f"layer2.{i}.conv2").weight.shape[0] for i in range(3)]
    assert middles == [24, 16, 24]


def test_a_stage_has_its_own_activation_and_squeeze(space: SearchSpace) -> None:
    network = build_shapes(build, space.largest)
    assert isinstance(network.get_submodule("act1"), nn.ReLU)
    assert isinstance(network.get_submodule("layer1.0.act1"), nn.ReLU)
    assert isinstance(network.get_submodule("layer2.2.act3"), nn.Hardswish)
    assert convolution(network, "layer2.0.se.fc1").weight.shape[:2] == (8, 40)
    assert "layer1.0.se" not in dict(network.named_modules())


def test_the_middle_convolution_of_a_residual_stem_adds_to_what_it_reads(
    supernet: Supernet, images: Tensor
) -> None:
    largest = supernet.space.largest
    deep, shallow = supernet.materialize(largest), supernet.materialize(change(largest, stem__depth=2))
    with torch.no_grad():
        assert not torch.equal(deep(images), shallow(images))
        for parameter in deep.get_submodule("conv1.3.fn.1").parameters():
            parameter.zero_()
        assert torch.equal(deep(images), shallow(images))


def test_a_subnet_computes_the_same_with_lent_and_with_its_own_weights(
    supernet: Supernet, images: Tensor
) -> None:
    rng = random.Random(2)
    space = supernet.space
    with torch.no_grad():
        for arch in [space.smallest, space.largest, *(space.sample(rng) for _ in range(5))]:
            shared = supernet(images, arch)
            own = supernet.materialize(arch).train()(at_resolution(images, arch))
            assert float((shared - own).abs().max()) == 0.0, arch.to_json()


def test_every_weight_of_the_largest_network_learns(space: SearchSpace, images: Tensor) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space, build).train()
    randomize(supernet.largest)
    torch.autograd.backward(supernet(images, space.largest).square().sum())
    for name, parameter in supernet.largest.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()), name


def test_the_graph_of_a_subnet_computes_what_it_does(supernet: Supernet, images: Tensor) -> None:
    rng = random.Random(4)
    for arch in (supernet.space.largest, supernet.space.sample(rng)):
        network = supernet.materialize(arch)
        with torch.no_grad():
            expected = network(images)
            found = trace(network, resolution=24).run(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_source_that_rebuilds_a_network_needs_no_nestling(supernet: Supernet, images: Tensor) -> None:
    for arch in (supernet.space.largest, supernet.space.smallest):
        network, source = supernet.materialize(arch), rebuild(arch)
        assert "nestling" not in source
        names: dict[str, Any] = {}
        exec(source, names)
        rebuilt = names["network"].to(memory_format=torch.channels_last)
        assert shapes(rebuilt) == shapes(network)
        rebuilt.load_state_dict(network.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(rebuilt.eval()(images), network(images))


def test_stochastic_depth_and_dropout_have_their_places(space: SearchSpace, images: Tensor) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space, build, dropout=0.5, drop_path=0.5).train()
    network = supernet._borrower(space.largest, is_largest=True).network
    assert len([m for m in network.modules() if isinstance(m, DropPath)]) == 5
    with torch.no_grad():
        assert not torch.equal(supernet(images, space.largest), supernet(images, space.largest))


def test_the_layers_of_all_stages_are_the_layers_of_the_network(space: SearchSpace) -> None:
    network = build_shapes(build, space.largest)
    prefixes = [p for stage in ("stem", "s1", "s2.b1", "s2.b2", "s2.b3", "head") for p in layers(stage)]
    for name, found in network.named_modules():
        if not list(found.children()) and name not in ("layer3", "layer4"):
            owners = [p for p in prefixes if name == p or name.startswith(f"{p}.")]
            assert len(owners) == 1, name


@pytest.mark.parametrize("file", ["ofa_resnet50d", "resnet_cifar"])
def test_no_two_values_of_expand_give_one_network(file: str) -> None:
    space = load_space(SPACES / f"{file}.toml")
    for stage in ("s1", "s2", "s3"):
        block = str(space.largest[f"{stage}.block"])
        expands = space.by_name[f"{stage}.b1.expand"].values
        for width in space.by_name[f"{stage}.width"].values:
            archs = [
                stages(block, widths=(int(width),), depths=(1,), stem__width=8, s1__expand=expand)
                for expand in expands
            ]
            middles = {convolution(build_shapes(build, a), "layer1.0.conv1").weight.shape[0] for a in archs}
            assert len(middles) == len(expands), (stage, width)


def test_the_space_for_32_pixels_is_small_and_wide() -> None:
    space = load_space(SPACES / "resnet_cifar.toml").with_constants({"classes": 10})
    low, high = (cost(build_shapes(build, arch), 32).macs / 1e6 for arch in (space.smallest, space.largest))
    assert 1 < low < 2
    assert 9 * low < high < 13
    at_its_resolution = cost(build_shapes(build, space.smallest), 16).macs / 1e6
    assert high > 30 * at_its_resolution
    assert space.size > 1e6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s2__widht": 8}, "no choice 's2.widht'; a stage has block, width"),
        ({"s2__b1__width": 8}, "no choice 's2.b1.width'"),
        ({"hed__precision": "fp32"}, "no choice 'hed.precision'"),
        ({"s2__width": 12}, "s2.width is 12; a width is a positive multiple of 8"),
        ({"stem__width": 0}, "stem.width is 0"),
        ({"s1__depth": 0}, "s1.depth is 0; a stage has at least one block"),
        ({"s1__expand": 0.0}, "s1.expand is 0.0; it is a positive number"),
        ({"s2__b2__expand": -1}, "s2.b2.expand is -1.0"),
        ({"s2__se": -0.1}, "s2.se is -0.1; it is a fraction"),
        ({"s2__stride": 3}, "s2.stride is 3; it can be 1 or 2"),
        ({"stem__kind": "tiered"}, "stem.kind is 'tiered'; known: 7x7, 3x3, deep, residual"),
        ({"stem__kind": "3x3"}, "stem.middle changes nothing where stem.kind is '3x3'"),
        ({"stem__kind": "deep"}, "stem.depth changes nothing where stem.kind is 'deep'"),
        ({"stem__depth": 1}, "stem.depth is 1; it can be 2 or 3"),
        ({"s1__block": "dense"}, "s1.block is 'dense'; known: bottleneck, basic"),
        ({"s4__width": 8}, "a resnet has one to 4 stages"),
    ],
)
def test_a_choice_that_no_network_has_is_refused_by_name(
    space: SearchSpace, values: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(change(space.largest, **values))


def test_a_fifth_stage_is_refused() -> None:
    arch = stages("basic", widths=(8, 8, 8, 8, 8), depths=(1, 1, 1, 1, 1), stem__width=8)
    with pytest.raises(ValueError, match="s1 to s4, each with a width"):
        build(arch)


def test_choices_that_change_no_tensor_are_read_over(space: SearchSpace) -> None:
    arch = change(space.smallest, pretrained=True, head__precision="w8a8", s1__b1__precision="w8a8")
    assert shapes(build(arch)) == shapes(build(space.smallest))
