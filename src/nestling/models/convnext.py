"""ConvNeXts of any width, depth, kernel and expansion, out of timm's own blocks.

The networks of Liu et al. 2022, A ConvNet for the 2020s (arXiv 2201.03545). `build(arch)` gives timm's
`ConvNeXt`, of any number of stages; a subnet's weights load into that class without Nestling.

Choices that `build` reads, each `s<stage>.<column>`, or `s<stage>.b<block>.<column>` where a block decides
alone:

=============  =======================================================================================
`width`        channels, a multiple of 8
`depth`        blocks in the stage
`kernel`       side of the depthwise convolution, odd
`expand`       inner channels of a block per channel; rounded to a multiple of 8, down by a tenth at most
=============  =======================================================================================

Global: `stem.stride` (side of the patches, in pixels, that the stem makes one position of), `act`, `classes`,
and `layer_scale`, what a block's branch is scaled by at first: 1e-6 as in the paper, 0 for no scale at all.
The stem is as wide as the first stage; every later stage begins with a step of 2.
"""

from __future__ import annotations

import inspect
import pprint
from fractions import Fraction
from typing import Any

from timm.layers.helpers import make_divisible
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import nn

from nestling.models.stages import Columns, decider, depth_of, layer_prefixes, stages_of, width_of
from nestling.space import Arch

COLUMNS = Columns(
    "convnext",
    stage=("width", "depth", "kernel", "expand", "precision"),
    block=("kernel", "expand", "precision"),
    network=(
        "resolution", "classes", "act", "layer_scale", "pretrained",
        "stem.stride", "stem.precision", "head.precision",
    ),
)  # fmt: skip
ENDS = {
    "stem": ("stem",),
    "head": ("norm_pre", "head"),
}
_IMPORTS = """\
from fractions import Fraction
from typing import Any

from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import nn
"""


def build(arch: Arch) -> ConvNeXt:
    """The plain timm network of `arch`, its logits of shape (N, classes).

    Raises:
        KeyError: the arch lacks a choice that has no default.
        TypeError: a value that must be a whole number is not.
        ValueError: a choice that this family does not know, or a value that no network can have.
    """
    network = assemble(**plan(arch))
    for module in network.stages.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # what timm's constructor does to the stages that it makes
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return network


def plan(arch: Arch) -> dict[str, Any]:
    """The arguments of `assemble` for `arch`: plain values, to be written down and read without Nestling.

    Raises:
        KeyError, TypeError, ValueError: see `build`.
    """
    COLUMNS.check(arch)
    count = len(stages_of(arch))
    if not count or any(f"s{stage}.width" not in arch for stage in range(1, count + 1)):
        raise ValueError("a convnext has stages s1, s2 and so on, at least one, each with a width")
    patch = arch.integer("stem.stride") if "stem.stride" in arch else 4
    if patch < 1:
        raise ValueError(f"stem.stride is {patch}; a patch has a side of at least 1 pixel")
    scale = float(arch.get("layer_scale", 1e-6))
    if scale < 0:
        raise ValueError(f"layer_scale is {scale}; it is positive, or 0 for none")
    return {
        "stages": [_stage(arch, f"s{stage}") for stage in range(1, count + 1)],
        "patch": patch,
        "classes": arch.integer("classes"),
        "act": str(arch.get("act", "gelu")),
        "scale": scale or None,
    }


def layers(place: str) -> tuple[str, ...]:
    """The prefixes of the names of the layers of `stem`, `head`, a stage (`s2`), a block (`s2.b1`) or a part.

    Raises:
        ValueError: no such place, see `nestling.models.stages.layer_prefixes`.
    """
    return layer_prefixes(
        place, ends=ENDS, blocks=lambda stage: f"stages.{stage - 1}.blocks", beside="downsample"
    )


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm and torch alone.

    Raises:
        KeyError, TypeError, ValueError: see `build`.
    """
    functions = "\n\n".join(inspect.getsource(function) for function in (assemble, make_stage))
    arguments = pprint.pformat(plan(arch), width=100, sort_dicts=False)
    return f"{_IMPORTS}\n\n{functions}\n\narguments = {arguments}\nnetwork = assemble(**arguments)\n"


def assemble(
    *, stages: list[dict[str, Any]], patch: int, classes: int, act: str, scale: float | None
) -> ConvNeXt:
    """timm's `ConvNeXt` with these stages and a stem that takes patches of `patch` x `patch` pixels."""
    widths = [stage["width"] for stage in stages]
    # timm makes four stages; here they are without blocks, and only the stem and the head are kept
    network = ConvNeXt(
        num_classes=classes,
        depths=(0, 0, 0, 0),
        dims=(widths[0], widths[0], widths[0], widths[-1]),
        patch_size=patch,
        act_layer=act,
    )
    inputs = [widths[0], *widths]
    made = [
        make_stage(stage, inputs=inputs[index], stride=1 if index == 0 else 2, act=act, scale=scale)
        for index, stage in enumerate(stages)
    ]
    network.stages = nn.Sequential(*made)
    network.feature_info = [
        {"num_chs": width, "reduction": patch * 2**index, "module": f"stages.{index}"}
        for index, width in enumerate(widths)
    ]
    return network


def make_stage(
    stage: dict[str, Any], *, inputs: int, stride: int, act: str, scale: float | None
) -> ConvNeXtStage:
    """A stage whose every block has a kernel and inner channels of its own."""
    width = stage["width"]
    blocks = []
    for kernel, inner in zip(stage["kernels"], stage["inners"], strict=True):
        # timm reckons the inner channels from the width; with a fraction they come out exactly
        ratio: Any = Fraction(inner, width)
        blocks.append(
            ConvNeXtBlock(
                width,
                kernel_size=kernel,
                mlp_ratio=ratio,
                ls_init_value=scale,
                act_layer=act,
                norm_layer=LayerNorm,
            )
        )
    made = ConvNeXtStage(inputs, width, stride=stride, depth=0, norm_layer=LayerNorm2d)
    made.blocks = nn.Sequential(*blocks)
    return made


def _stage(arch: Arch, stage: str) -> dict[str, Any]:
    width = width_of(arch, f"{stage}.width")
    kernels, inners = [], []
    for block in range(1, depth_of(arch, stage) + 1):
        name = decider(arch, stage, block=block, column="kernel")
        kernel = arch.integer(name) if name in arch else 7
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"{name} is {kernel}; a kernel has an odd side")
        kernels.append(kernel)
        name = decider(arch, stage, block=block, column="expand")
        expand = float(arch.get(name, 4))
        if expand <= 0:
            raise ValueError(f"{name} is {expand}; it is a positive number of inner channels per channel")
        inners.append(int(make_divisible(width * expand)))  # type: ignore[no-untyped-call]
    return {"width": width, "kernels": kernels, "inners": inners}
