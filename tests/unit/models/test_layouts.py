from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import attention, attention2d, mlp
from timm.models import (
    beit,
    coat,
    convit,
    crossvit,
    davit,
    edgenext,
    efficientformer,
    eva,
    fastvit,
    mambaout,
    maxxvit,
    metaformer,
    mobilevit,
    nest,
    swin_transformer,
    swin_transformer_v2_cr,
    tiny_vit,
    twins,
    visformer,
    vision_transformer,
    volo,
    xcit,
)  # fmt: skip
from torch import Tensor, nn

from nestling.models.fused import _HEADS, _JOINED
from nestling.models.layouts import (
    Blocks,
    Grid,
    Joined,
    Layout,
    Part,
    Uncuttable,
    find_layout,
    leading,
)  # fmt: skip
from nestling.models.lending import cut
from nestling.space import Arch

NO_ARCH = Arch(())
TOKENS = (2, 16)
LARGE, SMALL = (24, 3), (16, 2)
"""Width and heads of 8 channels each."""


def layout_of(module: nn.Module) -> Layout:
    return find_layout(module, NO_ARCH)


def lent(large: nn.Module, small: nn.Module) -> nn.Module:
    """`small` with the weights that the layouts of both have `large` lend."""
    of_large, of_small, tensors = layout_of(large), layout_of(small), dict(large.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            cuts = {}
            for axis in range(parameter.ndim):
                part, whole = of_small.get((name, axis)), of_large.get((name, axis))
                if isinstance(part, Blocks | Joined) and isinstance(whole, Blocks | Joined):
                    cuts[axis] = leading(whole, part)
            parameter.copy_(cut(tensors[name], tuple(parameter.shape), name=name, cuts=cuts))
    small.eval()
    return small


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        positive = name.endswith("temperature")
        nn.init.uniform_(parameter, 0.5 if positive else -0.5, 1.5 if positive else 0.5)
    module.eval()
    return module


Make = Callable[[int, int], nn.Module]


def attentions() -> dict[str, tuple[Make, tuple[int, ...]]]:
    """timm's attentions of a width and a number of heads, and the shape of what they read (-1: channels)."""
    tokens, field = (2, 16, -1), (2, 4, 4, -1)
    image = (2, -1, 4, 4)
    size = (4, 4)
    return {
        "vit": (lambda c, h: attention.Attention(c, h, qkv_bias=True), tokens),
        "vit gated": (lambda c, h: attention.Attention(c, h, qkv_bias=True, gated=True), tokens),
        "rope": (lambda c, h: attention.AttentionRope(c, h, qkv_fused=True), tokens),
        "rope apart": (lambda c, h: attention.AttentionRope(c, h, qkv_fused=False), tokens),
        "multihead": (lambda c, h: Multihead(c, h), tokens),
        "beit": (lambda c, h: beit.Attention(c, h, qkv_bias=True), tokens),
        "eva": (lambda c, h: eva.EvaAttention(c, h, qkv_bias=True, scale_norm=False), tokens),
        "eva apart": (lambda c, h: eva.EvaAttention(c, h, qkv_fused=False, scale_norm=False), tokens),
        "xcit": (lambda c, h: xcit.XCA(c, h, qkv_bias=True), tokens),
        "edgenext": (lambda c, h: edgenext.CrossCovarianceAttn(c, h, qkv_bias=True), tokens),
        "davit": (lambda c, h: davit.ChannelAttention(c, h, qkv_bias=True), tokens),
        "davit groups": (lambda c, h: davit.ChannelAttentionV2(c, h, qkv_bias=True), tokens),
        "davit window": (lambda c, h: davit.WindowAttention(c, size, h), tokens),
        "convit": (lambda c, h: convit.MHSA(c, h, qkv_bias=True), tokens),
        "swin": (lambda c, h: swin_transformer.WindowAttention(c, h, window_size=size), tokens),
        "swin v2 cr": (lambda c, h: swin_transformer_v2_cr.WindowMultiHeadAttention(c, h, size), tokens),
        "nest": (lambda c, h: nest.Attention(c, h, qkv_bias=True), (1, 2, 16, -1)),
        "volo": (lambda c, h: volo.Attention(c, h, qkv_bias=True), field),
        "volo class": (lambda c, h: volo.ClassAttention(c, h, qkv_bias=True), tokens),
        "metaformer": (lambda c, h: metaformer.Attention(c, 8, h), tokens),
        "twins": (lambda c, h: Sized(twins.LocallyGroupedAttn(c, h, ws=2)), tokens),
        "fastvit": (lambda c, _: fastvit.Attention(c, 8, qkv_bias=True), image),
        "visformer": (lambda c, h: visformer.Attention(c, h), image),
        "maxxvit": (lambda c, _: maxxvit.Attention2d(c, c, dim_head=8, head_first=True), image),
        "maxxvit tf": (lambda c, _: maxxvit.Attention2d(c, c, dim_head=8, head_first=False), image),
        "maxxvit last": (lambda c, _: maxxvit.AttentionCl(c, c, dim_head=8, head_first=True), field),
        "efficientformer": (
            lambda c, h: efficientformer.Attention(c, 8, h, attn_ratio=2, resolution=4), tokens
        ),
        "multi-query": (
            lambda c, h: attention2d.MultiQueryAttention2d(c, c, num_heads=h, key_dim=8, value_dim=8), image
        ),
    }  # fmt: skip


class Multihead(nn.Module):
    """Self-attention by torch's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x, x, x)[0]
        return result


class Sized(nn.Module):
    """An attention that wants to be told the map's size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, (4, 4))
        return result


@pytest.mark.parametrize("name", attentions())
def test_fewer_heads_compute_what_the_large_attention_does_without_its_other_heads(name: str) -> None:
    make, shape = attentions()[name]
    large, small = randomized(make(*LARGE)), make(*SMALL)
    small = lent(large, small)
    axis = shape.index(-1)
    read = torch.randn([SMALL[0] if size == -1 else size for size in shape])
    rest = torch.zeros([LARGE[0] - SMALL[0] if size == -1 else size for size in shape])
    # silence what the small one lacks: the other channels read, and the other heads' way out
    with torch.no_grad():
        for tensor_name, tensor in large.named_parameters():
            if "proj" in tensor_name and tensor_name.endswith("weight") and len(tensor) == LARGE[0]:
                if "q_proj" in tensor_name or "k_proj" in tensor_name or "v_proj" in tensor_name:
                    continue
                if name == "nest":  # its heads' channels are interleaved
                    tensor[:, SMALL[1] :: LARGE[1]] = 0
                else:
                    tensor[:, tensor.shape[1] * SMALL[1] // LARGE[1] :] = 0
        expected = large(torch.cat([read, rest], axis)).narrow(axis, 0, SMALL[0])
        torch.testing.assert_close(small(read), expected)


@pytest.mark.parametrize("kind", [*_HEADS, *_JOINED])
def test_every_class_that_is_named_exists(kind: str) -> None:
    module, _, name = (kind if kind.startswith("torch.") else f"timm.{kind}").rpartition(".")
    assert isinstance(vars(importlib.import_module(module)).get(name), type)


def test_smaller_heads_are_the_leading_part_of_each_head_of_queries_keys_and_values() -> None:
    large, small = attention.Attention(24, 3), attention.Attention(12, 3)
    rows = leading(Blocks((3, 3, 8)), Blocks((3, 3, 4)))
    assert layout_of(large)["qkv.weight", 0] == Blocks((3, 3, 8))
    expected = large.qkv.weight.view(3, 3, 8, 24)[:, :, :4, :12].reshape(36, 12)
    assert torch.equal(large.qkv.weight[rows, :12], expected)
    lent(large, small)
    assert torch.equal(small.qkv.weight, expected)
    assert torch.equal(small.proj.weight, large.proj.weight.view(24, 3, 8)[:12, :, :4].reshape(12, 12))


def test_keys_and_values_of_other_sizes_are_cut_each_on_its_own() -> None:
    module = tiny_vit.Attention(24, key_dim=4, num_heads=2, attn_ratio=2, resolution=(2, 2))
    part = layout_of(module)["qkv.weight", 0]
    assert part == Joined(2, (Blocks((4,)), Blocks((4,)), Blocks((8,))))
    smaller = Joined(1, (Blocks((2,)), Blocks((2,)), Blocks((4,))))
    assert leading(part, smaller).tolist() == [0, 1, 4, 5, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (
            mobilevit.LinearSelfAttention(8),
            "qkv_proj.weight",
            Joined(1, (Blocks((1,)), Blocks((8,)), Blocks((8,)))),
        ),
        (
            mambaout.GatedConvBlock(8, expansion_ratio=2),
            "fc1.weight",
            Joined(1, (Blocks((16,)), Blocks((8,)), Blocks((8,)))),
        ),
        (mlp.GluMlp(4, 12), "fc1.weight", Blocks((2, 6))),
        (nn.LSTM(3, 5), "weight_hh_l0", Blocks((4, 5))),
        (nn.GRU(3, 5), "bias_ih_l0", Blocks((3, 5))),
        (
            vision_transformer.ParallelScalingBlock(8, 2, mlp_ratio=2),
            "in_proj.weight",
            Joined(1, (Blocks((16,)), Blocks((3, 2, 4)))),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_split_after_a_projection_is_a_part_of_its_rows(
    module: nn.Module, name: str, part: Part
) -> None:
    assert layout_of(module)[name, 0] == part


@pytest.mark.parametrize("hidden", [4, 6])
def test_a_gated_layer_of_fewer_channels_has_as_much_of_the_gate_as_of_the_value(hidden: int) -> None:
    large, small = mlp.GluMlp(8, 16), mlp.GluMlp(8, 2 * hidden)
    lent(randomized(large), small)
    read = torch.randn(3, 8)
    value, gate = large.fc1(read).chunk(2, -1)
    expected = nn.functional.linear((value * gate.sigmoid())[:, :hidden], *_of(large.fc2, hidden))
    torch.testing.assert_close(small(read), expected)


def _of(layer: nn.Module, inputs: int) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    return layer.weight[:, :inputs], layer.bias


def test_a_fused_projection_of_a_class_that_is_not_known_may_not_be_cut() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    part = layout_of(Own())["qkv.weight", 0]
    assert isinstance(part, Uncuttable)
    assert "Own" in part.reason


def test_a_table_of_relative_positions_loses_heads_but_no_positions() -> None:
    layout = layout_of(swin_transformer.WindowAttention(8, 2, window_size=(3, 3)))
    assert isinstance(layout["relative_position_bias_table", 0], Uncuttable)
    assert ("relative_position_bias_table", 1) not in layout


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (
            lambda: vision_transformer.VisionTransformer(32, 8, embed_dim=8, depth=1, num_heads=1),
            "pos_embed",
            {1: Grid(1, 4, 4)},
        ),
        (
            lambda: timm.create_model("pit_ti_224", img_size=64),
            "pos_embed",
            {1: Blocks((64,)), 2: Grid(0, 1, 7), 3: Grid(0, 1, 7)},
        ),
        (
            lambda: volo.VOLO([1] * 4, img_size=64, embed_dims=[8] * 4, num_heads=[1] * 4),
            "pos_embed",
            {1: Grid(0, 1, 4), 2: Grid(0, 1, 4), 3: Blocks((8,))},
        ),
        (
            lambda: crossvit.CrossVit(img_size=120, img_scale=(1.0, 224 / 240), depth=((1, 1, 0),)),
            "pos_embed_1",
            {1: Grid(1, 7, 7)},
        ),
    ],
    ids=["vit", "pit", "volo", "crossvit"],
)  # fmt: skip
def test_tables_of_positions_are_grids(
    make: Callable[[], nn.Module], name: str, expected: dict[int, Part]
) -> None:
    with torch.device("meta"):
        layout = layout_of(make())
    assert {axis: part for (tensor, axis), part in layout.items() if tensor == name} == expected


def test_a_tensor_that_layers_share_is_laid_out_alike_by_each_of_its_names() -> None:
    with torch.device("meta"):
        network = coat.CoaT(embed_dims=(16,) * 4, num_heads=2, serial_depths=(2, 1, 1, 1), parallel_depth=0)
    layout = layout_of(network)
    shared = [name for name, axis in layout if name.endswith("crpe1.conv_list.0.weight") and axis == 0]
    assert shared == ["crpe1.conv_list.0.weight"]
    assert layout[shared[0], 0] == layout["serial_blocks1.1.factoratt_crpe.crpe.conv_list.0.weight", 0]


@pytest.mark.parametrize(
    ("large", "small"),
    [
        (Blocks((3, 2)), Blocks((3, 3))),
        (Blocks((3, 2)), Blocks((6,))),
        (Joined(2, (Blocks((2,)),)), Joined(3, (Blocks((2,)),))),
        (Joined(2, (Blocks((2,)),)), Joined(2, (Blocks((2,)), Blocks((1,))))),
        (Joined(2, (Blocks((2,)),)), Blocks((2,))),
    ],
)
def test_parts_that_do_not_fit_are_refused(large: Blocks | Joined, small: Blocks | Joined) -> None:
    with pytest.raises(ValueError, match=r"do not fit|cannot be cut"):
        leading(large, small)
