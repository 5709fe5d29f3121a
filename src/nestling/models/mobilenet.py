"""MobileNetV3 and EfficientNet networks of any width, depth, kernel and expansion, out of timm's own blocks.

The spaces of BigNAS (Yu et al. 2020, arXiv 2003.11142), once-for-all (Cai et al. 2020, arXiv 1908.09791),
AttentiveNAS (Wang et al. 2021, arXiv 2011.09011) and DepS (Annavajjala et al. 2024, arXiv 2407.06167), each a
file of `search_spaces`. `build(arch)` gives timm's `MobileNetV3` (pooling before the
last 1x1 convolution) or `EfficientNet` (after it); a subnet's weights load into that class without Nestling.

Choices that `build` reads, each `s<stage>.<column>`, or `s<stage>.b<block>.<column>` where a block decides
alone:

=============  =======================================================================================
`block`        `mbconv` (inverted residual), `ds` (depthwise separable) or `conv` (plain convolution)
`width`        output channels, a multiple of 8
`depth`        blocks in the stage
`kernel`       side of the convolution, odd
`expand`       `mbconv`: expanded channels per input channel; `conv` without `width`: output channels per
               channel of the stage before, so that the two widths are one decision
`groups`       channels per group of the depthwise convolution (1: depthwise)
`stride`       step of the first block, 1 or 2
`skip`         whether the first block has a residual connection too; false where it is not given
`se`           squeeze-and-excitation: reduced channels per expanded channel; 0 for none
`act`          activation of the stage, as timm names it; the global `act` where it is not given
=============  =======================================================================================

Global: `head.kind` (`mobilenetv3`, `efficientnet`), `stem.width`, `stem.stride`, `head.width`, `act`,
`classes`, and for squeeze-and-excitation `se.gate` (`sigmoid` where it is not given), `se.act` (the stage's)
and `se.divisor` (the reduced channels are a multiple of it; 1).

The first block of a stage has no residual connection, whatever its widths, unless `skip` says so: else
whether there is one would depend on the subnet. `skip` is refused where the block changes width or side.
"""

from __future__ import annotations

import pprint
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers.create_act import get_act_layer
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from nestling.models.stages import (
    Columns,
    checked_width,
    decider,
    depth_of,
    layer_prefixes,
    stages_of,
    width_of,
)
from nestling.space import Arch, Value

COLUMNS = Columns(
    "mobilenet",
    stage=(
        "block", "width", "depth", "kernel", "expand", "groups", "stride", "skip", "se", "act", "precision",
    ),
    block=("kernel", "expand", "groups", "se", "precision"),
    network=(
        "resolution", "classes", "pretrained", "act", "stem.width", "stem.stride", "stem.precision",
        "head.kind", "head.width", "head.precision", "se.gate", "se.act", "se.divisor",
    ),
)  # fmt: skip
ENDS = {
    "stem": ("conv_stem", "bn1"),
    "head": ("conv_head", "norm_head", "bn2", "act2", "global_pool", "flatten", "classifier"),
}
HEADS = {"mobilenetv3": MobileNetV3, "efficientnet": EfficientNet}
BLOCKS = {"mbconv": "ir", "ds": "ds", "conv": "cn"}
DEFAULTS: dict[str, Value] = {"kernel": 3, "expand": 4, "groups": 1, "se": 0.0}


def build(arch: Arch) -> nn.Module:
    """The plain timm network of `arch`, its logits of shape (N, classes).

    Raises:
        KeyError: the arch lacks a choice that has no default.
        ValueError: a choice that this family does not know, or a value that no network can have.
    """
    kind, arguments, stem_stride = timm_arguments(arch)
    arguments["act_layer"] = get_act_layer(arguments["act_layer"])
    if "se_layer" in arguments:
        arguments["se_layer"] = _squeeze(**arguments["se_layer"])
    network: nn.Module = HEADS[kind](**arguments)
    if stem_stride == 1:
        stem = network.get_submodule("conv_stem")
        assert isinstance(stem, nn.Conv2d)
        stem.stride = (1, 1)
    return network


def timm_arguments(arch: Arch) -> tuple[str, dict[str, Any], int]:
    """What the arch is in timm's words: the kind of head, the class's arguments, the stem's stride.

    The arguments are plain values: they can be written down and read without Nestling.

    Raises:
        KeyError, ValueError: see `build`.
    """
    COLUMNS.check(arch)
    kind = str(arch.get("head.kind", "mobilenetv3"))
    if kind not in HEADS:
        raise ValueError(f"head.kind is {kind!r}; known: {', '.join(HEADS)}")
    act = str(arch.get("act", "hard_swish"))
    stem = width = width_of(arch, "stem.width")
    stages = []
    for stage in stages_of(arch):
        before, width = width, _stage_width(arch, stage, before=width)
        stages.append(_stage(arch, stage, act=act, before=before, width=width))
    arguments: dict[str, Any] = {
        "block_args": stages,
        "num_classes": arch.integer("classes"),
        "stem_size": stem,
        "num_features": width_of(arch, "head.width"),
        "act_layer": act,
    }
    squeeze = {
        argument: arch[name]
        for name, argument in (("se.gate", "gate"), ("se.act", "act"), ("se.divisor", "divisor"))
        if name in arch
    }
    if squeeze:
        arguments["se_layer"] = squeeze
    return kind, arguments, int(arch.get("stem.stride", 2))


def layers(place: str) -> tuple[str, ...]:
    """The prefixes of the names of the layers of `stem`, `head`, a stage (`s2`), a block (`s2.b1`) or a part.

    Raises:
        ValueError: no such place, see `nestling.models.stages.layer_prefixes`.
    """
    return layer_prefixes(place, ends=ENDS, blocks=lambda stage: f"blocks.{stage - 1}")


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm alone.

    Raises:
        KeyError, ValueError: see `build`.
    """
    kind, arguments, stem_stride = timm_arguments(arch)
    act = arguments.pop("act_layer")
    squeeze = arguments.pop("se_layer", None)
    lines = [
        f"from {HEADS[kind].__module__} import {HEADS[kind].__name__}",
        "from timm.layers import get_act_layer",
        "",
        f"arguments = {pprint.pformat(arguments, width=100, sort_dicts=False)}",
    ]
    if squeeze is not None:
        lines[2:2] = [
            "from functools import partial",
            "from timm.models._efficientnet_blocks import SqueezeExcite",
            "from timm.models._efficientnet_builder import round_channels",
        ]
        lines.append(f"arguments['se_layer'] = {_squeeze_source(**squeeze)}")
    lines.append(f"network = {HEADS[kind].__name__}(**arguments, act_layer=get_act_layer({act!r}))")
    if stem_stride == 1:
        lines.append("network.conv_stem.stride = (1, 1)")
    return "\n".join(lines) + "\n"


def _squeeze(
    *, gate: str = "sigmoid", act: str | None = None, divisor: int = 1
) -> Callable[..., SqueezeExcite]:
    rounded = partial(round_channels, divisor=divisor)
    return partial(SqueezeExcite, gate_layer=gate, force_act_layer=act, rd_round_fn=rounded)


def _squeeze_source(*, gate: str = "sigmoid", act: str | None = None, divisor: int = 1) -> str:
    """What `_squeeze` gives, as Python source."""
    return (
        f"partial(SqueezeExcite, gate_layer={gate!r}, force_act_layer={act!r}, "
        f"rd_round_fn=partial(round_channels, divisor={divisor!r}))"
    )


def _stage(arch: Arch, stage: str, *, act: str, before: int, width: int) -> list[dict[str, Any]]:
    stage_act = str(arch.get(f"{stage}.act", act))
    skip = bool(arch.get(f"{stage}.skip", False))
    stride = arch.get(f"{stage}.stride", 1)
    if skip and (before != width or stride != 1):
        raise ValueError(
            f"{stage}.skip is true, but the first block goes from {before} to {width} channels with stride "
            f"{stride}; a residual connection needs one width and stride 1"
        )
    blocks = []
    for block in range(1, depth_of(arch, stage) + 1):

        def value(column: str, *, block: int = block) -> Any:
            return arch.get(decider(arch, stage, block=block, column=column), DEFAULTS.get(column))

        kind = str(arch.get(f"{stage}.block", "mbconv"))
        if kind not in BLOCKS:
            raise ValueError(f"{stage}.block is {kind!r}; known: {', '.join(BLOCKS)}")
        first = block == 1
        residual = skip or not first
        arguments: dict[str, Any] = {
            "block_type": BLOCKS[kind],
            "out_chs": width,
            "stride": stride if first else 1,
            "act_layer": stage_act,
        }
        if kind == "conv":
            arguments |= {"kernel_size": value("kernel"), "skip": residual}
        else:
            arguments |= {
                "dw_kernel_size": value("kernel"),
                "group_size": value("groups"),
                "se_ratio": float(value("se")),
                "noskip": not residual,
            }
        if kind == "mbconv":
            # EfficientNet's builder reckons the squeeze from the block's input, MobileNetV3's from the
            # expanded channels
            expand = float(value("expand"))
            efficientnet = arch.get("head.kind") == "efficientnet"
            arguments |= {"exp_ratio": expand}
            arguments["se_ratio"] *= expand if efficientnet else 1.0
        blocks.append(arguments)
    return blocks


def _stage_width(arch: Arch, stage: str, *, before: int) -> int:
    name = f"{stage}.width"
    if arch.get(f"{stage}.block") != "conv" or f"{stage}.expand" not in arch:
        return width_of(arch, name)
    if name in arch:
        raise ValueError(f"{stage} is a convolution with both width and expand; give one of them")
    return checked_width(before * arch.integer(f"{stage}.expand"), name=name)
