"""ResNets of any width, depth and bottleneck, out of timm's own blocks.

The networks of He et al. 2015 (arXiv 1512.03385) and the ResNet-D of He et al. 2018 (arXiv 1812.01187),
elastic as once-for-all's ResNet50D is (Cai et al. 2020, arXiv 1908.09791). `build(arch)` gives timm's
`ResNet` with one to four stages; a subnet's weights load into that class without Nestling.

Choices that `build` reads, each `s<stage>.<column>`, or `s<stage>.b<block>.<column>` where a block decides
alone:

=============  =======================================================================================
`block`        `bottleneck` (1x1, 3x3, 1x1) or `basic` (3x3, 3x3); the same for all blocks of a stage
`width`        output channels, a multiple of 8
`depth`        blocks in the stage
`expand`       channels between a block's convolutions per output channel; rounded to a multiple of 8, down
               by a tenth at most
`stride`       step of the first block, 1 or 2
`se`           squeeze-and-excitation: reduced channels per output channel; 0 for none
`act`          activation of the stage, as timm names it; the global `act` where it is not given
=============  =======================================================================================

Global: `act`, `classes`, `avg_down` (a strided shortcut averages before its 1x1 convolution), and of the stem
`stem.width`, `stem.stride`, `stem.pool` (a max pooling of stride 2 at its end) and `stem.kind`:

=============  =======================================================================================
`7x7`, `3x3`   one convolution
`deep`         three 3x3 convolutions, the first two of `stem.middle` channels: timm's ResNet-D stem
`residual`     the same with a residual connection around the second, which is there where `stem.depth`
               is 3 and not where it is 2: once-for-all's stem
=============  =======================================================================================

The first block of a stage always has a convolution in its shortcut, whatever its widths: else whether there
is one would depend on the subnet.
"""

from __future__ import annotations

import inspect
import pprint
from fractions import Fraction
from functools import partial
from typing import Any

from timm.layers.create_act import get_act_layer
from timm.layers.helpers import make_divisible
from timm.layers.squeeze_excite import SEModule
from timm.models.convmixer import Residual
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_avg, downsample_conv
from torch import nn

from nestling.models.stages import Columns, decider, depth_of, layer_prefixes, stages_of, width_of
from nestling.space import Arch, Value

COLUMNS = Columns(
    "resnet",
    stage=("block", "width", "depth", "expand", "stride", "se", "act", "precision"),
    block=("expand", "se", "precision"),
    network=(
        "resolution", "classes", "act", "avg_down", "pretrained", "head.precision",
        "stem.kind", "stem.width", "stem.middle", "stem.depth", "stem.stride", "stem.pool", "stem.precision",
    ),
)  # fmt: skip
ENDS = {
    "stem": ("conv1", "bn1", "act1", "maxpool"),
    "head": ("global_pool", "fc"),
}
BLOCKS = ("bottleneck", "basic")
STEMS = ("7x7", "3x3", "deep", "residual")
MOST_STAGES = 4
_IMPORTS = """\
from fractions import Fraction
from functools import partial
from typing import Any

from timm.layers.create_act import get_act_layer
from timm.layers.squeeze_excite import SEModule
from timm.models.convmixer import Residual
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_avg, downsample_conv
from torch import nn
"""


def build(arch: Arch) -> ResNet:
    """The plain timm network of `arch`, its logits of shape (N, classes).

    Raises:
        KeyError: the arch lacks a choice that has no default.
        ValueError: a choice that this family does not know, or a value that no network can have.
    """
    network = assemble(**plan(arch))
    network.init_weights()
    return network


def plan(arch: Arch) -> dict[str, Any]:
    """The arguments of `assemble` for `arch`: plain values, to be written down and read without Nestling.

    Raises:
        KeyError, ValueError: see `build`.
    """
    COLUMNS.check(arch)
    act = str(arch.get("act", "relu"))
    count = len(stages_of(arch))
    if not 1 <= count <= MOST_STAGES or any(f"s{stage}.width" not in arch for stage in range(1, count + 1)):
        raise ValueError(f"a resnet has one to {MOST_STAGES} stages, s1 to s{MOST_STAGES}, each with a width")
    return {
        "stem": _stem(arch) | {"act": act},
        "stages": [_stage(arch, f"s{stage}", act=act) for stage in range(1, count + 1)],
        "classes": arch.integer("classes"),
        "avg_down": bool(arch.get("avg_down", False)),
    }


def layers(place: str) -> tuple[str, ...]:
    """The prefixes of the names of the layers of `stem`, `head`, a stage (`s2`), a block (`s2.b1`) or a part.

    Raises:
        ValueError: no such place, see `nestling.models.stages.layer_prefixes`.
    """
    return layer_prefixes(place, ends=ENDS, blocks=lambda stage: f"layer{stage}")


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm and torch alone.

    Raises:
        KeyError, ValueError: see `build`.
    """
    functions = "\n\n".join(inspect.getsource(function) for function in (assemble, make_stem, make_stage))
    arguments = pprint.pformat(plan(arch), width=100, sort_dicts=False)
    return f"{_IMPORTS}\n\n{functions}\n\narguments = {arguments}\nnetwork = assemble(**arguments)\n"


def assemble(*, stem: dict[str, Any], stages: list[dict[str, Any]], classes: int, avg_down: bool) -> ResNet:
    """timm's `ResNet` with this stem and these stages; those that it would have beyond them are empty."""
    # a basic block's width is its number of planes: so the classifier fits the last stage
    network = ResNet(BasicBlock, (), num_classes=classes, channels=(stages[-1]["width"],))  # type: ignore[arg-type]
    network.add_module("conv1", make_stem(stem))
    network.add_module("bn1", nn.BatchNorm2d(stem["width"]))
    network.add_module("act1", get_act_layer(stem["act"])(inplace=True))
    if not stem["pool"]:
        network.add_module("maxpool", nn.Identity())
    inputs, reduction = stem["width"], stem["stride"]
    network.feature_info = [{"num_chs": inputs, "reduction": reduction, "module": "act1"}]
    reduction *= 2 if stem["pool"] else 1
    for number, stage in enumerate(stages, start=1):
        network.add_module(f"layer{number}", make_stage(stage, inputs=inputs, avg_down=avg_down))
        inputs, reduction = stage["width"], reduction * stage["stride"]
        network.feature_info.append({"num_chs": inputs, "reduction": reduction, "module": f"layer{number}"})
    for number in range(len(stages) + 1, 5):
        network.add_module(f"layer{number}", nn.Sequential())
    return network


def make_stem(stem: dict[str, Any]) -> nn.Module:
    """The stem's convolutions up to its last normalization."""
    width, middle, stride = stem["width"], stem["middle"], stem["stride"]
    if stem["kind"] in ("7x7", "3x3"):
        kernel = int(stem["kind"][0])
        return nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    act = get_act_layer(stem["act"])
    first = nn.Conv2d(3, middle, 3, stride=stride, padding=1, bias=False)
    second = [nn.Conv2d(middle, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), act(inplace=True)]
    last = nn.Conv2d(middle, width, 3, padding=1, bias=False)
    if stem["kind"] == "residual":
        # a layer that is left out leaves its place, so that those behind it keep their names
        second = [Residual(nn.Sequential(*second)) if stem["depth"] == 3 else nn.Identity()]
    return nn.Sequential(first, nn.BatchNorm2d(middle), act(inplace=True), *second, last)


def make_stage(stage: dict[str, Any], *, inputs: int, avg_down: bool) -> nn.Sequential:
    """The blocks of a stage; the first takes `inputs` channels."""
    width = stage["width"]
    blocks: list[nn.Module] = []
    for number, (middle, se) in enumerate(zip(stage["middles"], stage["se"], strict=True)):
        shortcut, stride = None, 1
        if number == 0:
            stride = stage["stride"]
            shortcut = (downsample_avg if avg_down else downsample_conv)(inputs, width, 1, stride=stride)
        arguments: dict[str, Any] = {
            "stride": stride,
            "downsample": shortcut,
            "act_layer": get_act_layer(stage["act"]),
            "attn_layer": partial(SEModule, rd_ratio=se) if se else None,
            # a place for stochastic depth
            "drop_path": nn.Identity(),
        }
        # timm reckons the channels in the middle from the width; with fractions they come out exactly
        if stage["block"] == "basic":
            arguments["reduce_first"] = Fraction(width, middle)
            blocks.append(BasicBlock(inputs, width, **arguments))
        else:
            planes = width // Bottleneck.expansion
            arguments["base_width"] = Fraction(64 * middle, planes)
            blocks.append(Bottleneck(inputs, planes, **arguments))
        inputs = width
    return nn.Sequential(*blocks)


def _stem(arch: Arch) -> dict[str, Any]:
    kind = str(arch.get("stem.kind", "7x7"))
    if kind not in STEMS:
        raise ValueError(f"stem.kind is {kind!r}; known: {', '.join(STEMS)}")
    width = width_of(arch, "stem.width")
    middle = _multiple_of_8(width / 2)
    if "stem.middle" in arch:
        _refuse_beside("stem.middle", kind, ("deep", "residual"))
        middle = width_of(arch, "stem.middle")
    depth = 3
    if "stem.depth" in arch:
        _refuse_beside("stem.depth", kind, ("residual",))
        depth = _one_of(arch, "stem.depth", (2, 3), default=3)
    return {
        "kind": kind,
        "width": width,
        "middle": middle,
        "depth": depth,
        "stride": _one_of(arch, "stem.stride", (1, 2), default=2),
        "pool": bool(arch.get("stem.pool", True)),
    }


def _stage(arch: Arch, stage: str, *, act: str) -> dict[str, Any]:
    kind = str(arch.get(f"{stage}.block", "bottleneck"))
    if kind not in BLOCKS:
        raise ValueError(f"{stage}.block is {kind!r}; known: {', '.join(BLOCKS)}")
    width = width_of(arch, f"{stage}.width")
    middles, squeezes = [], []
    for block in range(1, depth_of(arch, stage) + 1):
        name = decider(arch, stage, block=block, column="expand")
        expand = float(arch.get(name, 0.25 if kind == "bottleneck" else 1.0))
        if expand <= 0:
            raise ValueError(f"{name} is {expand}; it is a positive number of channels per output channel")
        middles.append(_multiple_of_8(width * expand))
        name = decider(arch, stage, block=block, column="se")
        se = float(arch.get(name, 0.0))
        if se < 0:
            raise ValueError(f"{name} is {se}; it is a fraction of the channels, 0 for none")
        squeezes.append(se)
    return {
        "block": kind,
        "width": width,
        "stride": _one_of(arch, f"{stage}.stride", (1, 2), default=1),
        "act": str(arch.get(f"{stage}.act", act)),
        "middles": middles,
        "se": squeezes,
    }


def _multiple_of_8(channels: float) -> int:
    # round first, as once-for-all does: its spaces then have the widths of the paper
    return int(make_divisible(round(channels)))  # type: ignore[no-untyped-call]


def _one_of(arch: Arch, name: str, known: tuple[int, ...], *, default: int) -> int:
    value: Value = arch.get(name, default)
    if isinstance(value, bool) or value not in known:
        raise ValueError(f"{name} is {value!r}; it can be {' or '.join(map(str, known))}")
    return int(value)


def _refuse_beside(name: str, kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        kinds_told = " and ".join(kinds)
        raise ValueError(f"{name} changes nothing where stem.kind is {kind!r}; it is for {kinds_told}")
