"""Batch normalization by the statistics of all ranks' images together.

Without it each rank normalizes its part of a batch by that part's own mean and variance: the averaged
gradient of R ranks is, up to rounding, that of one rank which normalizes the R parts of its batch apart
("ghost batches", Hoffer et al. 2017, arXiv 1705.08741). With it R ranks have the gradient of one rank with
the whole batch, for two small exchanges a layer and visit. It pays where a rank's part has few images.

`torch.nn.SyncBatchNorm` does the same on GPUs, for networks that are changed to use it; here no network is
changed: within the block every `F.batch_norm`, of torch's layers and timm's, is joint. A network that was
compiled before no longer calls it: such a network normalizes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestling.train.distributed import Ranks


def joint_statistics(ranks: Ranks) -> AbstractContextManager[object]:
    """A block in which batch normalization in training uses the statistics of all ranks.

    Every rank must run the same layers in the same order, forward within the block and backward anywhere.
    Gradients are then to be averaged over images, as `average_gradients` does. Alone it does nothing.
    """
    return nullcontext() if ranks.world == 1 else _Joint(ranks)


class _Joint(TorchFunctionMode):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `func` returns; `F.batch_norm`, joint."""
        del types
        if func is F.batch_norm:
            return _batch_norm(self.ranks, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    ranks: Ranks,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, in training by the statistics of all ranks' `input` (N, C, ...)."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        mean, variance, count = _statistics(ranks, input)
        if running_mean is not None and running_var is not None:
            unbiased = variance * count / (count - 1)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        deviation = torch.sqrt(variance + eps)
    normalized: Tensor = _Normalize.apply(input, mean, deviation, count, ranks)
    shape = (1, -1, *[1] * (input.ndim - 2))
    if weight is not None:
        normalized = normalized * weight.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    return normalized.to(input.dtype)


def _statistics(ranks: Ranks, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,), and the number of values that they are of, over all ranks.

    Combined from the ranks' own, which loses no digits where the mean is large (Chan et al. 1979).
    """
    own_variance, own_mean = torch.var_mean(_wide(maps), _axes(maps), correction=0)
    own_count = own_mean.new_full((1,), maps.numel() / maps.shape[1])
    told = ranks.gather(torch.cat([own_mean, own_variance, own_count]))
    channels = maps.shape[1]
    means, variances, counts = torch.split(told, [channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total


class _Normalize(torch.autograd.Function):
    """(maps - mean) / deviation, whose gradient knows that mean and deviation come from all ranks' maps."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, mean: Tensor, deviation: Tensor, count: Tensor, ranks: Ranks
    ) -> Tensor:
        shape = (1, -1, *[1] * (maps.ndim - 2))
        normalized = (_wide(maps) - mean.view(shape)) / deviation.view(shape)
        ctx.save_for_backward(normalized, deviation, count)
        ctx.ranks, ctx.dtype = ranks, maps.dtype
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        normalized, deviation, count = ctx.saved_tensors
        shape, axes = (1, -1, *[1] * (gradient.ndim - 2)), _axes(gradient)
        own = gradient.numel() / gradient.shape[1]
        # each rank's loss is a mean over its own images: weighted by their number they are parts of one loss
        sums = own * torch.cat([gradient.sum(axes), (gradient * normalized).sum(axes)])
        along_mean, along_deviation = (ctx.ranks.sum(sums) / (own * count)).chunk(2)
        centred = gradient - along_mean.view(shape) - normalized * along_deviation.view(shape)
        return (centred / deviation.view(shape)).to(ctx.dtype), None, None, None, None


def _axes(maps: Tensor) -> tuple[int, ...]:
    """All but the channels'."""
    return (0, *range(2, maps.ndim))


def _wide(maps: Tensor) -> Tensor:
    """`maps` with the digits of float32 at least."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
