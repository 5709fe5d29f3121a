from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from nestling.models.building import build_shapes
from nestling.models.convnext import build, layers, rebuild
from nestling.models.graph import trace
from nestling.models.supernet import Supernet, at_resolution
from nestling.space import Arch, Choice, SearchSpace, Value, load_space

SPACES = Path(__file__).parents[3] / "search_spaces"
ROWS: list[tuple[str, tuple[Value, ...]]] = [
    ("resolution", (16, 24)),
    ("classes", (5,)),
    ("stem.stride", (2,)),
    ("layer_scale", (0.1,)),
    ("s1.width", (8, 16)),
    ("s1.depth", (1, 2)),
    ("s1.b1.kernel", (3, 5, 7)),
    ("s1.b2.kernel", (3, 5, 7)),
    ("s1.b1.expand", (2, 4)),
    ("s1.b2.expand", (2, 4)),
    ("s1.precision", ("fp32",)),
    ("s2.width", (16, 24)),
    ("s2.depth", (1, 2, 3)),
    ("s2.kernel", (3, 7)),
    ("s2.expand", (1.5, 3)),
]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """Two stages, the first with a kernel and an expansion for each block."""
    return SearchSpace("convnext", tuple(Choice(name, values) for name, values in ROWS))


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    """A supernet whose norms, scales and biases are all different from one another."""
    torch.manual_seed(0)
    supernet = Supernet(space, build)
    randomize(supernet.largest)
    return supernet


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Four images (4, 3, 24, 24)."""
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)


def change(arch: Arch, **values: Value) -> Arch:
    return Arch(tuple({**arch, **{k.replace("__", "."): v for k, v in values.items()}}.items()))


def convolution(network: nn.Module, name: str) -> nn.Conv2d:
    found = network.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_a_network_that_timm_has_is_timms() -> None:
    widths, depths = (8, 16, 24, 32), (1, 2, 1, 1)
    decisions: dict[str, Value] = {"classes": 5, "stem.stride": 4}
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        decisions |= {f"s{number}.width": width, f"s{number}.depth": depth, f"s{number}.kernel": 5}
    torch.manual_seed(0)
    network = build(Arch(tuple(decisions.items())))
    theirs = ConvNeXt(num_classes=5, depths=depths, dims=widths, kernel_sizes=5)
    assert str(network) == str(theirs)
    assert network.feature_info == theirs.feature_info
    randomize(theirs)
    network.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), theirs.eval()(images))


def test_the_largest_of_the_tiny_space_is_timms_convnext_tiny() -> None:
    space = load_space(SPACES / "convnext_tiny.toml").with_constants({"classes": 1000})
    ours = build_shapes(build, space.largest)
    theirs = build_shapes(lambda _: timm.create_model("convnext_tiny"), space.largest)
    assert str(ours) == str(theirs)
    assert shapes(ours) == shapes(theirs)


def test_the_network_starts_as_timms_does(space: SearchSpace) -> None:
    torch.manual_seed(0)
    network = build(change(space.largest, s2__width=64, s2__expand=4, layer_scale=1e-6))
    linear = network.get_parameter("stages.1.blocks.0.mlp.fc1.weight")
    kernel = network.get_parameter("stages.1.downsample.1.weight")
    for weight in (linear, kernel):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not network.get_parameter("stages.1.blocks.0.mlp.fc1.bias").any()
    assert network.get_parameter("stages.1.blocks.0.gamma").tolist() == pytest.approx([1e-6] * 64)


def test_a_block_decides_its_own_kernel_and_inner_channels(space: SearchSpace) -> None:
    network = build_shapes(build, change(space.largest, s1__b2__kernel=3, s1__b1__expand=2))
    assert convolution(network, "stages.0.blocks.0.conv_dw").weight.shape == (16, 1, 7, 7)
    assert convolution(network, "stages.0.blocks.1.conv_dw").weight.shape == (16, 1, 3, 3)
    assert network.get_parameter("stages.0.blocks.0.mlp.fc1.weight").shape == (32, 16)
    assert network.get_parameter("stages.0.blocks.1.mlp.fc1.weight").shape == (64, 16)


@pytest.mark.parametrize(
    ("width", "expand", "inner"), [(24, 1.5, 40), (80, 3, 240), (88, 0.35, 32), (8, 0.5, 8)]
)
def test_the_inner_channels_are_a_multiple_of_8(
    space: SearchSpace, width: int, expand: float, inner: int
) -> None:
    network = build_shapes(build, change(space.largest, s2__width=width, s2__expand=expand))
    assert network.get_parameter("stages.1.blocks.0.mlp.fc2.weight").shape == (width, inner)


def test_every_stage_but_the_first_halves_the_map(space: SearchSpace, images: Tensor) -> None:
    # even where the widths are equal
    network = build(change(space.smallest, s2__width=8, s3__width=8))
    _, maps = network.forward_intermediates(images)
    assert [m.shape[-1] for m in maps] == [12, 6, 3]
    told: Any = network.feature_info
    assert [24 // info["reduction"] for info in told] == [12, 6, 3]


def test_without_a_layer_scale_there_is_no_gamma(space: SearchSpace) -> None:
    network = build_shapes(build, change(space.smallest, layer_scale=0))
    assert not [name for name in network.state_dict() if name.endswith("gamma")]
    assert "stages.0.blocks.0.gamma" in build_shapes(build, space.smallest).state_dict()


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


def test_a_subnet_has_the_leading_channels_and_the_centre_of_the_kernel(supernet: Supernet) -> None:
    large = supernet.largest
    small = supernet.materialize(supernet.space.smallest)
    for name in ("norm.weight", "norm.bias", "gamma", "mlp.fc2.bias"):
        whole = large.get_parameter(f"stages.0.blocks.0.{name}")
        assert torch.equal(small.get_parameter(f"stages.0.blocks.0.{name}"), whole[:8]), name
    kernel = large.get_parameter("stages.0.blocks.0.conv_dw.weight")
    assert torch.equal(small.get_parameter("stages.0.blocks.0.conv_dw.weight"), kernel[:8, :, 2:5, 2:5])


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


def test_stochastic_depth_has_its_places(space: SearchSpace) -> None:
    supernet = Supernet(space, build, drop_path=0.5).train()
    network = supernet._borrower(space.largest, is_largest=True).network
    assert len([m for m in network.modules() if isinstance(m, DropPath)]) == 5


def test_the_layers_of_all_stages_are_the_layers_of_the_network(space: SearchSpace) -> None:
    network = build_shapes(build, space.largest)
    prefixes = [p for stage in ("stem", "s1", "s2", "head") for p in layers(stage)]
    for name, found in network.named_modules():
        if not list(found.children()):
            owners = [p for p in prefixes if name == p or name.startswith(f"{p}.")]
            assert len(owners) == 1, name
    assert layers("s2.b3") == ("stages.1.blocks.2",)
    network.get_submodule("stages.1.blocks.2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s2__widht": 8}, "no choice 's2.widht'; a stage has width, depth"),
        ({"s2__b1__width": 8}, "no choice 's2.b1.width'"),
        ({"stem__width": 8}, "no choice 'stem.width'"),
        ({"s2__width": 12}, "s2.width is 12; a width is a positive multiple of 8"),
        ({"s1__depth": 0}, "s1.depth is 0; a stage has at least one block"),
        ({"s1__b2__kernel": 4}, "s1.b2.kernel is 4; a kernel has an odd side"),
        ({"s2__expand": 0}, "s2.expand is 0.0; it is a positive number"),
        ({"stem__stride": 0}, "stem.stride is 0; a patch has a side of at least 1 pixel"),
        ({"layer_scale": -1}, "layer_scale is -1.0; it is positive, or 0 for none"),
        ({"s4__width": 8}, "stages s1, s2 and so on"),
    ],
)
def test_a_choice_that_no_network_has_is_refused_by_name(
    space: SearchSpace, values: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(change(space.largest, **values))


def test_choices_that_change_no_tensor_are_read_over(space: SearchSpace) -> None:
    arch = change(space.smallest, pretrained=True, head__precision="w8a8", s1__b1__precision="w8a8")
    assert shapes(build(arch)) == shapes(build(space.smallest))
