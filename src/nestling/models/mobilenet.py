"""MobileNetV3 and EfficientNet networks of any width, depth, kernel and expansion, out of timm's own blocks.

The space of BigNAS (Yu et al. 2020, arXiv 2003.11142), once-for-all (Cai et al. 2020, arXiv 1908.09791) and
DepS (Annavajjala et al. 2024, arXiv 2407.06167). `build(arch)` gives timm's `MobileNetV3` (pooling before the
last 1x1 convolution) or `EfficientNet` (after it); a subnet's weights load into that class without Nestling.

Choices that `build` reads, each `s<stage>.<column>`, or `s<stage>.b<block>.<column>` where a block decides
alone:

=============  =======================================================================================
`block`        `mbconv` (inverted residual), `ds` (depthwise separable) or `conv` (plain convolution)
`width`        output channels, a multiple of 8
`depth`        blocks in the stage
`kernel`       side of the convolution, odd
`expand`       `mbconv`: expanded channels per input channel
`groups`       channels per group of the depthwise convolution (1: depthwise)
`stride`       step of the first block, 1 or 2
`se`           squeeze-and-excitation: reduced channels per expanded channel; 0 for none
`act`          activation of the stage, as timm names it; the global `act` where it is not given
=============  =======================================================================================

Global: `head.kind` (`mobilenetv3`, `efficientnet`), `stem.width`, `stem.stride`, `head.width`, `act`,
`classes`. The first block of a stage never has a residual connection, whatever its widths: else whether there
is one would depend on the subnet.
"""

from __future__ import annotations

import pprint
from typing import Any

from timm.layers.create_act import get_act_layer
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from nestling.space import Arch, Value

STAGE_COLUMNS = ("block", "width", "depth", "kernel", "expand", "groups", "stride", "se", "act", "precision")
GLOBALS = (
    "resolution", "classes", "act", "stem.width", "stem.stride", "stem.precision",
    "head.kind", "head.width", "head.precision",
)  # fmt: skip
HEADS = {"mobilenetv3": MobileNetV3, "efficientnet": EfficientNet}
BLOCKS = {"mbconv": "ir", "ds": "ds", "conv": "cn"}
DEFAULTS: dict[str, Value] = {"kernel": 3, "expand": 4, "groups": 1, "stride": 1, "se": 0.0}


def build(arch: Arch) -> nn.Module:
    """The plain timm network of `arch`, its logits of shape (N, classes).

    Raises:
        KeyError: the arch lacks a choice that has no default.
        ValueError: a choice that this family does not know, or a value that no network can have.
    """
    kind, arguments, stem_stride = timm_arguments(arch)
    arguments["act_layer"] = get_act_layer(arguments["act_layer"])
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
    _check_names(arch)
    kind = str(arch.get("head.kind", "mobilenetv3"))
    if kind not in HEADS:
        raise ValueError(f"head.kind is {kind!r}; known: {', '.join(HEADS)}")
    act = str(arch.get("act", "hard_swish"))
    stages = sorted({int(name[1:].split(".")[0]) for name in arch if _is_stage(name)})
    arguments: dict[str, Any] = {
        "block_args": [_stage(arch, f"s{stage}", act=act) for stage in stages],
        "num_classes": arch.integer("classes"),
        "stem_size": _width(arch, "stem.width"),
        "num_features": _width(arch, "head.width"),
        "act_layer": act,
    }
    return kind, arguments, int(arch.get("stem.stride", 2))


def layers(stage: str) -> tuple[str, ...]:
    """The prefixes of the names of the layers of `stem`, `head`, the stage `s2` or its block `s2.b1`."""
    if stage == "stem":
        return ("conv_stem", "bn1")
    if stage == "head":
        return ("conv_head", "norm_head", "bn2", "act2", "global_pool", "flatten", "classifier")
    numbers = [int(part[1:]) - 1 for part in stage.split(".")]
    return (".".join(["blocks", *map(str, numbers)]),)


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm alone.

    Raises:
        KeyError, ValueError: see `build`.
    """
    kind, arguments, stem_stride = timm_arguments(arch)
    act = arguments.pop("act_layer")
    lines = [
        f"from {HEADS[kind].__module__} import {HEADS[kind].__name__}",
        "from timm.layers import get_act_layer",
        "",
        f"arguments = {pprint.pformat(arguments, width=100, sort_dicts=False)}",
        f"network = {HEADS[kind].__name__}(**arguments, act_layer=get_act_layer({act!r}))",
    ]
    if stem_stride == 1:
        lines.append("network.conv_stem.stride = (1, 1)")
    return "\n".join(lines) + "\n"


def _stage(arch: Arch, stage: str, *, act: str) -> list[dict[str, Any]]:
    width = _width(arch, f"{stage}.width")
    depth = arch.integer(f"{stage}.depth") if f"{stage}.depth" in arch else 1
    stage_act = str(arch.get(f"{stage}.act", act))
    blocks = []
    for block in range(1, depth + 1):

        def value(column: str, *, block: int = block) -> Any:
            own = f"{stage}.b{block}.{column}"
            return arch[own] if own in arch else arch.get(f"{stage}.{column}", DEFAULTS.get(column))

        kind = str(arch.get(f"{stage}.block", "mbconv"))
        if kind not in BLOCKS:
            raise ValueError(f"{stage}.block is {kind!r}; known: {', '.join(BLOCKS)}")
        first = block == 1
        arguments: dict[str, Any] = {
            "block_type": BLOCKS[kind],
            "out_chs": width,
            "stride": value("stride") if first else 1,
            "act_layer": stage_act,
        }
        if kind == "conv":
            arguments |= {"kernel_size": value("kernel"), "skip": not first}
        else:
            arguments |= {
                "dw_kernel_size": value("kernel"),
                "group_size": value("groups"),
                "se_ratio": float(value("se")),
                "noskip": first,
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


def _width(arch: Arch, name: str) -> int:
    width = arch.integer(name)
    if width < 8 or width % 8:
        raise ValueError(f"{name} is {width}; a width is a positive multiple of 8")
    return width


def _is_stage(name: str) -> bool:
    head = name.split(".")[0]
    return head[0] == "s" and head[1:].isdigit()


def _check_names(arch: Arch) -> None:
    for name in arch:
        known = name.split(".")[-1] in STAGE_COLUMNS if _is_stage(name) else name in GLOBALS
        if not known:
            raise ValueError(
                f"the mobilenet family has no choice {name!r}; a stage has {', '.join(STAGE_COLUMNS)}, "
                f"the network {', '.join(GLOBALS)}"
            )
