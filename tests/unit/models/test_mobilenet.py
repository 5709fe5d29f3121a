from __future__ import annotations

import pytest
import torch
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from nestling.models.building import build_shapes
from nestling.models.families import FAMILIES, family
from nestling.models.mobilenet import build, layers, rebuild
from nestling.space import Arch, SearchSpace, Value


def change(arch: Arch, **values: Value) -> Arch:
    return Arch(tuple({**arch, **{k.replace("__", "."): v for k, v in values.items()}}.items()))


def module(network: nn.Module, name: str) -> nn.Module:
    return network.get_submodule(name)


def convolution(network: nn.Module, name: str) -> nn.Conv2d:
    found = network.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def test_the_network_is_what_the_choices_say(space: SearchSpace) -> None:
    network = build_shapes(build, space.largest)
    assert isinstance(network, MobileNetV3)
    assert convolution(network, "conv_stem").weight.shape == (16, 3, 3, 3)
    assert convolution(network, "blocks.1.0.conv_pw").weight.shape == (48, 16, 1, 1)
    depthwise = convolution(network, "blocks.1.0.conv_dw")
    assert (depthwise.kernel_size, depthwise.stride, depthwise.groups) == ((7, 7), (2, 2), 48)
    assert convolution(network, "blocks.1.1.conv_dw").stride == (1, 1)
    assert convolution(network, "blocks.1.2.se.conv_reduce").weight.shape[1] == 72
    grouped = convolution(network, "blocks.2.1.conv_dw")
    assert (grouped.groups, grouped.kernel_size) == (8, (7, 7))
    assert convolution(network, "blocks.2.0.conv_dw").kernel_size == (5, 5)
    assert convolution(network, "blocks.3.0.conv").weight.shape == (48, 32, 1, 1)
    assert convolution(network, "conv_head").weight.shape == (64, 48, 1, 1)
    assert network.get_parameter("classifier.weight").shape == (5, 64)


def test_only_the_first_block_of_a_stage_has_no_residual_connection(space: SearchSpace) -> None:
    # widths and strides that would allow one in every first block
    arch = change(space.largest, s1__width=16, s2__width=16, s2__stride=1, s3__width=16, s3__stride=1)
    network = build_shapes(build, arch)
    stages = network.get_submodule("blocks")
    assert isinstance(stages, nn.Sequential)
    for stage in stages:
        assert isinstance(stage, nn.Sequential)
        assert [vars(block)["has_skip"] for block in stage] == [False] + [True] * (len(stage) - 1)


def test_a_stage_with_skip_has_a_residual_connection_in_its_first_block(space: SearchSpace) -> None:
    arch = change(space.largest, s1__width=16, s1__skip=True, s4__width=32, s4__skip=True)
    stages = build_shapes(build, arch).get_submodule("blocks")
    assert [vars(stages.get_submodule(f"{i}.0"))["has_skip"] for i in range(4)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s1__width": 8}, "s1.skip is true, but the first block goes from 16 to 8 channels with stride 1"),
        ({"s1__stride": 2}, "s1.skip is true, but the first block goes from 16 to 16 channels with stride 2"),
    ],
)
def test_a_residual_connection_that_timm_would_drop_is_refused(
    space: SearchSpace, values: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(change(space.largest, **{"s1__skip": True, **values}))


def test_a_convolution_may_be_as_many_times_as_wide_as_the_stage_before(space: SearchSpace) -> None:
    for width in (24, 32):
        decided = dict(change(space.largest, s3__width=width, s4__expand=6))
        del decided["s4.width"]
        last = convolution(build_shapes(build, Arch(tuple(decided.items()))), "blocks.3.0.conv")
        assert last.weight.shape == (6 * width, width, 1, 1)


def test_a_choice_of_a_block_goes_before_that_of_its_stage(space: SearchSpace) -> None:
    arch = change(space.largest, s2__b2__kernel=3)
    network = build_shapes(build, arch)
    kernels = [convolution(network, f"blocks.1.{i}.conv_dw").kernel_size[0] for i in range(3)]
    assert kernels == [7, 3, 7]


def test_a_stem_of_stride_one_keeps_the_map(space: SearchSpace) -> None:
    images = torch.zeros(1, 3, 16, 16, device="meta")
    for stride, side in ((1, 16), (2, 8)):
        stem = convolution(build_shapes(build, change(space.smallest, stem__stride=stride)), "conv_stem")
        assert stem(images).shape[-1] == side


@pytest.mark.parametrize(("kind", "expected"), [("mobilenetv3", MobileNetV3), ("efficientnet", EfficientNet)])
def test_squeeze_and_excitation_is_a_part_of_the_expanded_channels_in_both_classes(
    space: SearchSpace, kind: str, expected: type[nn.Module]
) -> None:
    network = build_shapes(build, change(space.largest, head__kind=kind, s2__width=64, s2__expand=4))
    assert isinstance(network, expected)
    # 256 expanded channels, a quarter of them
    assert convolution(network, "blocks.1.1.se.conv_reduce").weight.shape == (64, 256, 1, 1)


SQUEEZE: dict[str, Value] = {"se__gate": "hard_sigmoid", "se__act": "relu", "se__divisor": 8}


@pytest.mark.parametrize("kind", ["mobilenetv3", "efficientnet"])
def test_the_gate_the_activation_and_the_rounding_of_squeeze_and_excitation_are_choices(
    space: SearchSpace, kind: str
) -> None:
    # 72 expanded channels, a quarter of which is 18; 16 would be more than a tenth less
    arch = change(space.largest, head__kind=kind, s2__expand=3)
    for values, channels, act, gate in (
        ({}, 18, nn.Hardswish, nn.Sigmoid),
        (SQUEEZE, 24, nn.ReLU, nn.Hardsigmoid),
        ({"se__divisor": 16}, 32, nn.Hardswish, nn.Sigmoid),
    ):
        network = build_shapes(build, change(arch, **values))
        assert convolution(network, "blocks.1.1.se.conv_reduce").weight.shape[:2] == (channels, 72)
        inner = type(module(network, "blocks.1.1.se.act1")), type(module(network, "blocks.1.1.se.gate"))
        assert [kind.__name__.lower() for kind in inner] == [act.__name__.lower(), gate.__name__.lower()]


def test_the_layers_of_all_stages_are_the_layers_of_the_network(space: SearchSpace) -> None:
    network = build_shapes(build, space.largest)
    prefixes = [p for stage in ("stem", "s1", "s2", "s3", "s4", "head") for p in layers(stage)]
    for name, found in network.named_modules():
        if not list(found.children()):
            owners = [p for p in prefixes if name == p or name.startswith(f"{p}.")]
            assert len(owners) == 1, name


@pytest.mark.parametrize("values", [{}, SQUEEZE, {"se__gate": "hard_sigmoid"}])
def test_a_network_computes_the_same_when_it_is_rebuilt_from_source(
    space: SearchSpace, values: dict[str, Value]
) -> None:
    arch = change(space.smallest, **values)
    names: dict[str, nn.Module] = {}
    exec(rebuild(arch), names)
    network = build(arch).eval()
    names["network"].load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(names["network"].eval()(images), network(images))


def test_the_source_that_rebuilds_a_network_says_its_stem_and_head(space: SearchSpace) -> None:
    arch = change(space.largest, head__kind="efficientnet", stem__stride=1)
    names: dict[str, nn.Module] = {}
    exec(rebuild(arch), names)
    network = names["network"]
    assert isinstance(network, EfficientNet)
    assert convolution(network, "conv_stem").stride == (1, 1)
    theirs = {k: v.shape for k, v in network.state_dict().items()}
    assert theirs == {k: v.shape for k, v in build(arch).state_dict().items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s2__widht": 8}, "no choice 's2.widht'; a stage has block, width"),
        ({"s2__b1__width": 8}, "no choice 's2.b1.width'; .* (a block kernel, expand"),
        ({"hed__width": 8}, "no choice 'hed.width'"),
        ({"s2__width": 12}, "s2.width is 12; a width is a positive multiple of 8"),
        ({"head__width": 0}, "head.width is 0"),
        ({"head__kind": "resnet"}, "head.kind is 'resnet'; known: mobilenetv3, efficientnet"),
        ({"s4__expand": 6}, "s4 is a convolution with both width and expand; give one of them"),
        ({"s1__block": "dense"}, "s1.block is 'dense'; known: mbconv, ds, conv"),
    ],
)
def test_a_choice_that_no_network_has_is_refused_by_name(
    space: SearchSpace, values: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build(change(space.smallest, **values))


def test_a_missing_choice_is_named() -> None:
    with pytest.raises(KeyError, match=r"stem\.width"):
        build(Arch((("s1.depth", 1),)))


def test_an_unknown_family_names_the_nearest() -> None:
    assert family("mobilenet") is FAMILIES["mobilenet"]
    with pytest.raises(ValueError, match="no family 'mobilnet'; did you mean 'mobilenet'"):
        family("mobilnet")
    with pytest.raises(ValueError, match="no family 'x'; known: mobilenet"):
        family("x")
