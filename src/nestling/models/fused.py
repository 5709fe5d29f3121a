"""Projections that hold several things one after the other: queries, keys and values, gates, heads.

For each of timm's and torch's modules that fuses projections, how its rows are laid out: of a smaller
attention the queries, keys and values are each cut on their own, head by head (AutoFormer, Chen et al. 2021,
arXiv 2107.00651).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from timm.models import nest
from torch import Tensor, nn

from nestling.models.parts import Blocks, Joined, Part, Uncuttable

Parts = dict[tuple[str, int], Part]
"""Of one module: its tensors are named from it on."""

_ROWS = {
    "qkv": 3, "kv": 2, "qk": 2, "q": 1, "k": 1, "v": 1, "wq": 1, "wk": 1, "wv": 1,
    "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1,
}  # fmt: skip
"""How many projections an attention's child of that name holds, one after the other."""
_HEADS = {
    "layers.attention.Attention": "num_heads",
    "layers.attention.AttentionRope": "num_heads",
    "layers.attention_pool.AttentionPoolLatent": "num_heads",
    "layers.attention_pool2d.AttentionPool2d": "num_heads",
    "layers.attention_pool2d.RotAttentionPool2d": "num_heads",
    "models.beit.Attention": "num_heads",
    "models.cait.ClassAttn": "num_heads",
    "models.cait.TalkingHeadAttn": "num_heads",
    "models.coat.FactorAttnConvRelPosEnc": "num_heads",
    "models.convit.GPSA": "num_heads",
    "models.convit.MHSA": "num_heads",
    "models.crossvit.CrossAttention": "num_heads",
    "models.davit.ChannelAttention": "num_heads",
    "models.davit.ChannelAttentionV2": "groups",
    "models.davit.WindowAttention": "num_heads",
    "models.edgenext.CrossCovarianceAttn": "num_heads",
    "models.eva.EvaAttention": "num_heads",
    "models.fastvit.Attention": "num_heads",
    "models.gcvit.WindowAttentionGlobal": "num_heads",
    "models.hiera.MaskUnitAttention": "heads",
    "models.hieradet_sam2.MultiScaleAttention": "num_heads",
    "models.metaformer.Attention": "num_heads",
    "models.mvitv2.MultiScaleAttention": "num_heads",
    "models.mvitv2.MultiScaleAttentionPoolFirst": "num_heads",
    "models.nest.Attention": "num_heads",
    "models.pvt_v2.Attention": "num_heads",
    "models.swin_transformer.WindowAttention": "num_heads",
    "models.swin_transformer_v2.WindowAttention": "num_heads",
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": "num_heads",
    "models.tnt.Attention": "num_heads",
    "models.twins.GlobalSubSampleAttn": "num_heads",
    "models.twins.LocallyGroupedAttn": "num_heads",
    "models.visformer.Attention": "num_heads",
    "models.vision_transformer_relpos.RelPosAttention": "num_heads",
    "models.vision_transformer_sam.Attention": "num_heads",
    "models.volo.Attention": "num_heads",
    "models.volo.ClassAttention": "num_heads",
    "models.xcit.XCA": "num_heads",
}
"""timm's attentions, projection by projection and head by head, and what they call the number of heads."""
_SCALED = ("layers.attention.Attention", "layers.attention.AttentionRope", "models.eva.EvaAttention")
"""Those whose `norm` is of the heads' outputs, not of the input."""
_FUSED = re.compile(r"(to_?|w)?(qkvs?|kv|qk|in)(_proj)?|v_gate|[Bb][Cc]dt_proj|hz_proj")


def is_made_of_parts(kinds: Sequence[str]) -> bool:
    """Whether a module of a class of these names may have parts: any but torch's own plain layers."""
    known = any(kind in _HEADS or kind in _JOINED for kind in kinds)
    return known or not kinds[0].startswith("torch.")


def rows_of(module: nn.Module, kinds: Sequence[str]) -> Parts:
    """How the rows of the module's projections, and the columns of what follows them, are laid out.

    `kinds` are the names of its class and of that's parents. A projection that looks fused by its name, in a
    module of a class that is not known, may not be cut.
    """
    heads = next((_HEADS[kind] for kind in kinds if kind in _HEADS), None)
    joined = next((_JOINED[kind] for kind in kinds if kind in _JOINED), None)
    if heads is not None:
        return _attention(module, int(vars(module)[heads]), scaled=any(kind in _SCALED for kind in kinds))
    if joined is not None:
        return joined(module)
    parts: Parts = {}
    if not kinds[0].startswith("torch."):
        why = "{} of " + kinds[0] + " may hold several projections; how they are laid out is not known"
        for name, child in module.named_children():
            if _FUSED.fullmatch(name):
                parts |= _rows(name, child, Uncuttable(why.format(name)))
        for name, tensor in module._parameters.items():
            own = re.sub("_?(weight|bias)$", "", name)
            if tensor is not None and tensor.ndim > 0 and _FUSED.fullmatch(own):
                parts[name, 0] = Uncuttable(why.format(name))
    return parts


def _attention(module: nn.Module, heads: int, *, scaled: bool) -> Parts:
    """Projections head by head: the rows of those in, the columns of the one out."""
    parts: Parts = {}
    children = {name: child for name, child in module.named_children() if name in _ROWS}
    # where queries come from elsewhere, what is called qkv is keys and values alone
    copies = _ROWS | ({"qkv": 2} if vars(module).get("use_global") is True else {})
    sizes = {name: size // copies[name] for name, child in children.items() if (size := _height(child))}
    if not sizes:
        return parts
    first = next(name for name in _ROWS if name in sizes)
    size = sizes[first] // heads
    for name, width in sizes.items():
        if size == 0 or sizes[first] % heads or width % size:
            reason = f"its {width} channels are not those of {heads} heads"
            parts |= _rows(name, children[name], Uncuttable(reason))
        else:  # keys and values may have fewer heads than queries
            level = (copies[name],) if copies[name] > 1 else ()
            parts |= _rows(name, children[name], Blocks((*level, width // size, size)))
    joined = Blocks((heads, size))
    # a NesT attention writes its heads' channels interleaved
    out = Blocks((size, heads)) if type(module) is nest.Attention else joined
    for name in ("q_bias", "k_bias", "v_bias"):
        parts[name, 0] = joined
    for name, child in module.named_children():
        if name in ("proj", "o_proj"):
            parts |= _columns(name, child, out, size=heads * size)
        elif name == "norm" and scaled and _height(child) == heads * size:
            parts |= _rows(name, child, joined)
        elif name == "crpe":  # its convolutions are each over the channels of some of the heads
            parts |= {
                (f"crpe.{tensor}", 0): Blocks((held.shape[0] // size, size))
                for tensor, held in _tensors(child)
            }
    return parts


def _joined(repeats: int, *sizes: int | tuple[int, ...]) -> Joined:
    return Joined(repeats, tuple(Blocks(s if isinstance(s, tuple) else (s,)) for s in sizes))


def _key_value(module: nn.Module) -> Parts:
    """For each head its queries, its keys, and its values, which may be more."""
    held, heads = vars(module), int(vars(module)["num_heads"])
    key, value = int(held["key_dim"]), int(held["val_dim"])
    children = dict(module.named_children())
    parts: Parts = {}
    if "qkv" in children:
        parts |= _rows("qkv", children["qkv"], _joined(heads, key, key, value))
    if "kv" in children:
        parts |= _rows("kv", children["kv"], _joined(heads, key, value))
        parts |= _rows("q", children["q"], Blocks((heads, key)), size=heads * key)
    for name, child in children.get("qkvs", nn.Module()).named_children():
        parts |= _rows(f"qkvs.{name}", child, _joined(1, key, key, value))
    if "qkvs" not in children:
        parts |= _columns("proj", children["proj"], Blocks((heads, value)), size=heads * value)
    return parts


def _linear_attention(module: nn.Module) -> Parts:
    """One query, then keys, then values."""
    width = int(vars(module)["embed_dim"])
    return _rows("qkv_proj", dict(module.named_children())["qkv_proj"], _joined(1, 1, width, width))


def _maxxvit(module: nn.Module) -> Parts:
    heads, size = int(vars(module)["num_heads"]), int(vars(module)["dim_head"])
    order = (heads, 3, size) if vars(module)["head_first"] else (3, heads, size)
    children = dict(module.named_children())
    return _rows("qkv", children["qkv"], Blocks(order)) | _columns(
        "proj", children["proj"], Blocks((heads, size)), size=heads * size
    )


def _multi_query(module: nn.Module) -> Parts:
    held, heads = vars(module), int(vars(module)["num_heads"])
    queries, values = Blocks((heads, int(held["key_dim"]))), Blocks((heads, int(held["value_dim"])))
    parts: Parts = {("query.proj.weight", 0): queries, ("query.proj.bias", 0): queries}
    return parts | {("output.proj.weight", 1): values}


def _parallel(module: nn.Module) -> Parts:
    heads, size = int(vars(module)["num_heads"]), int(vars(module)["head_dim"])
    rows = _joined(1, int(vars(module)["in_split"][0]), (3, heads, size))
    out = Blocks((heads, size))
    parts: Parts = {("in_proj.weight", 0): rows, ("in_proj.bias", 0): rows}
    return parts | {("qkv_bias", 0): Blocks((3, heads, size)), ("attn_out_proj.weight", 1): out}


def _multihead(module: nn.Module) -> Parts:
    assert isinstance(module, nn.MultiheadAttention)
    heads, size = module.num_heads, module.head_dim
    fused, out = Blocks((3, heads, size)), Blocks((heads, size))
    parts: Parts = {("in_proj_weight", 0): fused, ("in_proj_bias", 0): fused, ("out_proj.weight", 1): out}
    return parts | {(f"{name}_proj_weight", 0): out for name in "qkv"}


def _recurrent(module: nn.Module) -> Parts:
    """The rows are gate by gate."""
    assert isinstance(module, nn.RNNBase)
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    return {(name, 0): Blocks((gates, tensor.shape[0] // gates)) for name, tensor in _tensors(module)}


def _two_halves(name: str) -> Callable[[nn.Module], Parts]:
    def find(module: nn.Module) -> Parts:
        child = dict(module.named_children())[name]
        return _rows(name, child, Blocks((2, _height(child) // 2)))

    return find


def _gated(module: nn.Module) -> Parts:
    halves = type(dict(module.named_children())["gate"]).__name__ == "SpatialGatingUnit"
    return _two_halves("fc1")(module) if halves else {}


def _split_by(name: str, sizes: str) -> Callable[[nn.Module], Parts]:
    def find(module: nn.Module) -> Parts:
        return _rows(name, dict(module.named_children())[name], _joined(1, *vars(module)[sizes]))

    return find


def _scales(module: nn.Module) -> Parts:
    """Res2Net's channels are scale by scale."""
    scales = Blocks((int(vars(module)["scale"]), int(vars(module)["width"])))
    children = dict(module.named_children())
    parts = _rows("conv1", children["conv1"], scales) | _rows("bn1", children["bn1"], scales)
    return parts | {("conv3.weight", 1): scales}


def _sequencer(module: nn.Module) -> Parts:
    fc, hidden = dict(module.named_children()).get("fc"), int(vars(module)["hidden_size"])
    if not isinstance(fc, nn.Linear) or fc.in_features % hidden:
        return {}
    return {("fc.weight", 1): Blocks((fc.in_features // hidden, hidden))}


def _merging(module: nn.Module) -> Parts:
    """Four neighbours' channels, one after the other."""
    children = dict(module.named_children())
    reduction = children["reduction"]
    assert isinstance(reduction, nn.Linear)
    four = Blocks((4, reduction.in_features // 4))
    norm = _rows("norm", children["norm"], four) if _height(children["norm"]) == reduction.in_features else {}
    return norm | _columns("reduction", reduction, four, size=reduction.in_features)


_JOINED: Mapping[str, Callable[[nn.Module], Parts]] = {
    "layers.attention2d.MultiQueryAttention2d": _multi_query,
    "layers.mlp.GatedMlp": _gated,
    "layers.mlp.GluMlp": _two_halves("fc1"),
    "models.efficientformer.Attention": _key_value,
    "models.efficientvit_msra.CascadedGroupAttention": _key_value,
    "models.focalnet.FocalModulation": _split_by("f", "input_split"),
    "models.iformer.SHMA": _two_halves("v_gate"),
    "models.levit.Attention": _key_value,
    "models.levit.AttentionDownsample": _key_value,
    "models.mambaout.GatedConvBlock": _split_by("fc1", "split_indices"),
    "models.maxxvit.Attention2d": _maxxvit,
    "models.maxxvit.AttentionCl": _maxxvit,
    "models.mobilevit.LinearSelfAttention": _linear_attention,
    "models.res2net.Bottle2neck": _scales,
    "models.sequencer.RNN2dBase": _sequencer,
    "models.swin_transformer.PatchMerging": _merging,
    "models.swin_transformer_v2.PatchMerging": _merging,
    "models.swin_transformer_v2_cr.PatchMerging": _merging,
    "models.tiny_vit.Attention": _key_value,
    "models.vision_transformer.ParallelScalingBlock": _parallel,
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "torch.nn.modules.rnn.RNNBase": _recurrent,
}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _height(child: nn.Module) -> int:
    """How many channels the child writes; 0 where it has no weight."""
    sizes = [
        tensor.shape[0] for name, tensor in _tensors(child) if name.endswith("weight") and tensor.ndim > 0
    ]
    return sizes[-1] if sizes else 0


def _rows(name: str, child: nn.Module, part: Part, *, size: int | None = None) -> Parts:
    """The channels that the child writes; a normalization behind its layer has as many."""
    size = _height(child) if size is None else size
    return {(f"{name}.{t}", 0): part for t, held in _tensors(child) if held.ndim and held.shape[0] == size}


def _columns(name: str, child: nn.Module, part: Part, *, size: int) -> Parts:
    """The channels that the child reads."""
    return {
        (f"{name}.{t}", 1): part for t, held in _tensors(child) if held.ndim > 1 and held.shape[1] == size
    }
