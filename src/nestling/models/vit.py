"""Vision transformers of any width, depth, heads and MLP ratio, out of timm's own blocks.

The space of AutoFormer (Chen et al. 2021, arXiv 2107.00651): one width for the whole network, and in every
block its own number of heads and MLP ratio. The size of a head is fixed, so queries, keys and values are
`heads * head_dim` wide, whatever the width of the network. `build(arch)` gives timm's `VisionTransformer`; a
subnet's weights load into that class without Nestling.

The network is one row of a space file. Choices that `build` reads, each `s1.<column>`, or
`s1.b<block>.<column>` where a block decides alone:

=============  =======================================================================================
`depth`        blocks; a shallower network lacks the last ones
`heads`        attention heads
`mlp`          inner channels of the MLP per channel of the network, rounded down
=============  =======================================================================================

Global: `embed.width` (channels of the network), `resolution` (side of the images), `patch` (side of a patch),
`head_dim`, `pool` (`token`: the class token, `avg`: the mean of the patches, as AutoFormer has it),
`class_token`, `qkv_bias`, `act`, `classes`. The last norm stands before pooling, whichever that is: so both
ways have the same weights. Unlike AutoFormer's, attention has no relative positions: timm's has none.
"""

from __future__ import annotations

import math
import pprint
from dataclasses import dataclass
from typing import Any

from timm.layers.attention import Attention
from timm.layers.create_act import get_act_layer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from nestling.models.stages import Columns, decider, layer_prefixes, stages_of
from nestling.space import Arch, Value

COLUMNS = Columns(
    "vit",
    stage=("depth", "heads", "mlp", "precision"),
    block=("heads", "mlp", "precision"),
    network=(
        "resolution", "classes", "pretrained", "embed.width", "patch", "head_dim", "pool", "class_token",
        "qkv_bias", "act", "stem.precision", "head.precision",
    ),
)  # fmt: skip
ENDS = {
    "stem": ("patch_embed", "pos_drop", "patch_drop", "norm_pre"),
    "head": ("norm", "fc_norm", "head_drop", "head"),
}
POOLS = ("token", "avg")


@dataclass(frozen=True, slots=True)
class VitArguments:
    """What an arch is in timm's words; plain values, which can be written down and read without Nestling.

    Attributes:
        network: arguments of `VisionTransformer`.
        heads: for each block, its attention heads.
        ratios: for each block, inner channels of the MLP per channel of the network.
        head_dim: channels of a head.
        qkv_bias: whether the projections to queries, keys and values have a bias.
    """

    network: dict[str, Any]
    heads: tuple[int, ...]
    ratios: tuple[float, ...]
    head_dim: int
    qkv_bias: bool


def build(arch: Arch) -> nn.Module:
    """The plain timm network of `arch`, its logits of shape (N, classes).

    Raises:
        KeyError: the arch lacks a choice that has no default.
        TypeError: a value that must be a whole number is not.
        ValueError: a choice that this family does not know, or a value that no network can have.
    """
    given = timm_arguments(arch)

    def block(dim: int, depth: int, **arguments: Any) -> Block:
        # timm's Block gives its attention no size of heads: the attention comes after it
        made = Block(dim, **arguments | {"mlp_ratio": given.ratios[depth], "attn_layer": nn.Identity})
        made.attn = Attention(dim, given.heads[depth], attn_head_dim=given.head_dim, qkv_bias=given.qkv_bias)
        return made

    # timm asks for a class, and calls it
    network: nn.Module = VisionTransformer(**given.network, block_fn=block)  # type: ignore[arg-type]
    return network


def timm_arguments(arch: Arch) -> VitArguments:
    """What the arch is in timm's words.

    Raises:
        KeyError, TypeError, ValueError: see `build`.
    """
    COLUMNS.check(arch)
    if stages_of(arch) != ["s1"]:
        raise ValueError(
            "a transformer's blocks are all alike, so the vit family has one row, s1, not "
            f"{', '.join(stages_of(arch)) or 'none'}; with a second one, blocks would change places with the "
            "depth of the first"
        )
    depth = _positive(arch, "s1.depth")
    blocks = range(1, depth + 1)
    resolution, patch = _positive(arch, "resolution"), _positive(arch, "patch")
    if resolution % patch:
        raise ValueError(f"resolution is {resolution}; with a patch of {patch} it is a multiple of that")
    pool, class_token = str(arch.get("pool", "token")), _truth(arch, "class_token", default=True)
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; known: {', '.join(POOLS)}")
    if pool == "token" and not class_token:
        raise ValueError("pool is 'token', but class_token is false; without that token, pool is 'avg'")
    network: dict[str, Any] = {
        "img_size": resolution,
        "patch_size": patch,
        "num_classes": _positive(arch, "classes"),
        "global_pool": pool,
        "embed_dim": _positive(arch, "embed.width"),
        "depth": depth,
        "class_token": class_token,
        "fc_norm": False,
    }
    if "act" in arch:
        network["act_layer"] = _activation(arch["act"])
    return VitArguments(
        network,
        heads=tuple(_positive(arch, decider(arch, "s1", block=block, column="heads")) for block in blocks),
        ratios=tuple(_ratio(arch, decider(arch, "s1", block=block, column="mlp")) for block in blocks),
        head_dim=_positive(arch, "head_dim"),
        qkv_bias=_truth(arch, "qkv_bias", default=True),
    )


def layers(place: str) -> tuple[str, ...]:
    """The prefixes of the names of the layers of `stem`, `head`, a stage (`s2`), a block (`s2.b1`) or a part.

    Raises:
        ValueError: no such place, see `nestling.models.stages.layer_prefixes`.
    """
    return layer_prefixes(place, ends=ENDS, blocks=lambda _: "blocks")


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm and torch alone.

    Raises:
        KeyError, TypeError, ValueError: see `build`.
    """
    given = timm_arguments(arch)
    return f"""\
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

heads = {pprint.pformat(list(given.heads), width=100, compact=True)}
mlp_ratios = {pprint.pformat(list(given.ratios), width=100, compact=True)}


def block(dim, depth, **arguments):
    made = Block(dim, **arguments | {{"mlp_ratio": mlp_ratios[depth], "attn_layer": nn.Identity}})
    made.attn = Attention(dim, heads[depth], attn_head_dim={given.head_dim}, qkv_bias={given.qkv_bias})
    return made


arguments = {pprint.pformat(given.network, width=100, sort_dicts=False)}
network = VisionTransformer(**arguments, block_fn=block)
"""


def _positive(arch: Arch, name: str) -> int:
    number = arch.integer(name)
    if number < 1:
        raise ValueError(f"{name} is {number}; it is a whole number of at least 1")
    return number


def _ratio(arch: Arch, name: str) -> float:
    ratio, width = arch[name], arch.integer("embed.width")
    if isinstance(ratio, bool | str) or not math.isfinite(ratio) or int(width * ratio) < 1:
        raise ValueError(f"{name} is {ratio!r}; it is a number of inner channels per channel, such as 4")
    return float(ratio)


def _truth(arch: Arch, name: str, *, default: bool) -> bool:
    value = arch.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it is true or false")
    return value


def _activation(name: Value) -> str:
    try:
        get_act_layer(str(name))
    except KeyError:
        raise ValueError(
            f"act is {name!r}; it is an activation of timm's, such as 'gelu' or 'relu'"
        ) from None
    return str(name)
