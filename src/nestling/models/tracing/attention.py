"""Attention in operators."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.models.tracing.recorder import UNWRITTEN, Recorder, like
from nestling.models.tracing.shapes import known


def attention(
    to: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Softmax of the scaled and masked products of queries and keys, times the values."""
    if dropout_p > 0 or (enable_gqa and key.shape[-3] != query.shape[-3]):
        raise to.untraceable("attention with dropout or grouped queries")
    traced = next((tensor for tensor in (query, key, value) if to.name(tensor)), None)
    if traced is None:
        raise to.untraceable("attention that depends on the images by its mask alone")
    names = [known(to, tensor, traced) for tensor in (query, key, value)]
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _weighted(to, *names, mask=attn_mask, query=query, scale=scale)


def multi_head_attention(
    to: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001 torch's signature
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,  # noqa: ARG001
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,  # noqa: ARG001
    is_causal: bool = False,
    **unused: Tensor | None,
) -> tuple[str, str]:
    """Projections, attention and a projection for `torch.nn.MultiheadAttention`; its weights stay unknown."""
    odd = (key_padding_mask, bias_k, bias_v, *unused.values())
    if (
        any(tensor is not None for tensor in odd)
        or use_separate_proj_weight
        or add_zero_attn
        or query.ndim != 3
    ):
        raise to.untraceable("multi-head attention with padding, extra keys or separate projections")
    if (training and dropout_p > 0) or (is_causal and attn_mask is None) or in_proj_weight is None:
        raise to.untraceable("multi-head attention with dropout, or causal without its mask,")
    if attn_mask is not None and (attn_mask.ndim != 2 or to.name(attn_mask)):
        raise to.untraceable("multi-head attention with a mask for each image")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # here yes means hidden
    width = query.shape[-1]
    weights = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    heads = []
    for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True):
        # Tokens come first and images second, here as in PyTorch; inside, images come first.
        name = to.emit("Transpose", [to.read(tensor)], attributes={"perm": (1, 0, 2)})
        name = _projected(to, name, weight, bias)
        shape = (-1, tensor.shape[0], num_heads, width // num_heads)
        name = to.emit("Reshape", [name], attributes={"shape": shape})
        heads.append(to.emit("Transpose", [name], attributes={"perm": (0, 2, 1, 3)}))
    scale = (width // num_heads) ** -0.5
    mixed = _weighted(to, *heads, mask=attn_mask, query=query[None], scale=scale)
    mixed = to.emit("Transpose", [mixed], attributes={"perm": (0, 2, 1, 3)})
    mixed = to.emit("Reshape", [mixed], attributes={"shape": (-1, query.shape[0], width)})
    result = _projected(to, mixed, out_proj_weight, out_proj_bias)
    return to.emit("Transpose", [result], attributes={"perm": (1, 0, 2)}), UNWRITTEN


def _projected(to: Recorder, name: str, weight: Tensor, bias: Tensor | None) -> str:
    product = to.emit("MatMul", [name], weight=weight.T.contiguous())
    return product if bias is None else to.emit("Add", [product], weight=bias)


def _weighted(
    to: Recorder,
    queries: str,
    keys: str,
    values: str,
    *,
    mask: Tensor | None,
    query: Tensor,
    scale: float | None,
) -> str:
    """The values, weighted; `query` is the tensor of queries, for its number of axes and its width."""
    axes = query.ndim
    factor = like(query, query.shape[-1] ** -0.5 if scale is None else scale)
    scaled = to.emit("Mul", [queries], weight=factor)
    turned = to.emit("Transpose", [keys], attributes={"perm": (*range(axes - 2), axes - 1, axes - 2)})
    scores = to.emit("MatMul", [scaled, turned])
    if mask is not None:
        scores = _masked(to, scores, mask, query)
    weights = to.emit("Softmax", [scores], attributes={"axis": axes - 1})
    return to.emit("MatMul", [weights, values])


def _masked(to: Recorder, scores: str, mask: Tensor, query: Tensor) -> str:
    """Add of a mask; where it says yes and no, no is infinitely little."""
    name = to.name(mask)
    if name:
        return to.emit("Add", [scores, name])
    if mask.dtype == torch.bool:
        mask = torch.where(mask, like(query, 0.0), like(query, float("-inf")))
    return to.emit("Add", [scores], weight=mask.to(query.dtype))
