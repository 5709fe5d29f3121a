"""A subnet of a supernet called with its numbers rounded, so that shared weights learn to bear it.

Precisions are choices of an arch like any other. A supernet of quantized networks was trained by OQAT (Shen
et al. 2021, arXiv 2010.04354), in one number of bits and with scales that are learned and shared; here every
subnet's scales follow from its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from nestling.models.compiling import Call, call_lent
from nestling.quant.calibration import WeightMethod
from nestling.quant.constants import stored_range, stored_weight
from nestling.quant.formats import Format
from nestling.quant.policy import PRECISIONS, Precision, QuantPolicy
from nestling.quant.ranges import Range
from nestling.quant.straight import instead, nearest_by_statistics

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def rounded_call(policy: QuantPolicy, *, weights: WeightMethod = "minmax") -> Call | None:
    """Calls a network with the weights of `policy`'s layers, and what they read, rounded; None if none are.

    The weights of convolutions and linear layers are rounded as they are after training: each channel's
    integers as `weights` says, or with the least error below 8 bits, groups of weights each for itself,
    research precisions to their codes. That normalization follows only later folds into channels, which
    changes no rounding where each channel has its scale. What a layer reads is rounded to a range that spans
    the batch: there are no running averages, so that a step depends on its batch alone. Gradients pass as if
    nothing was rounded.

    Other operators, sums and products of attention among them, read what they are given; 16-bit floats are
    trained as 32-bit ones; and weights have all bits where a device would be given 7.

    Args:
        policy: which layers.
        weights: see `ranges` of `nestling.quant.observing`.
    """
    if all(_is_float(PRECISIONS[name]) for _, name in policy.rules):
        return None

    def call(network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
        held = dict(lent)
        with ExitStack() as hooks:
            for name, module in network.named_modules():
                if not isinstance(module, _LAYERS):
                    continue
                precision = policy.precision(name)
                if precision.weight is not None:
                    held[f"{name}.weight"] = rounded_weight(
                        held[f"{name}.weight"], precision, weights=weights
                    )
                if precision.activation is not None:
                    hook = module.register_forward_pre_hook(_reading(precision.activation))
                    hooks.callback(hook.remove)
            return call_lent(network, held, images)

    return call


def rounded_weight(weight: Tensor, precision: Precision, *, weights: WeightMethod = "minmax") -> Tensor:
    """`weight` of a convolution or linear layer as `precision` holds it; gradients pass unchanged.

    Args:
        weight: its channels first.
        precision: of the layer.
        weights: see `ranges` of `nestling.quant.observing`.

    Raises:
        ValueError: a format for weights alone that has no groups.
    """
    if precision.weight is None:
        return weight
    exact = weight.detach().float()
    if not isinstance(precision.weight, Format):
        return instead(weight, stored_weight(exact, precision, axis=0).to(weight.dtype))
    found = stored_range(exact, precision, axis=0, weights=weights)
    assert found is not None
    return nearest_by_statistics(weight, found)


def spanning_range(tensor: Tensor, format: Format) -> Range:
    """The range of `format` that spans `tensor`, as `activation_range` has it, without leaving the device."""
    low, high = tensor.detach().float().aminmax()
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if format.symmetric:
        high = torch.maximum(-low, high)
        scale = high / format.high
        scale = torch.where(scale > 0, scale, 1.0)
        return Range(scale, torch.zeros_like(scale, dtype=torch.int32), format.dtype, None)
    scale = (high - low) / (format.high - format.low)
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (format.low + (-low / scale).round()).clamp(format.low, format.high)
    return Range(scale, zero_point.int(), format.dtype, None)


def _reading(format: Format) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        tensor, *others = inputs
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()  # halves have too few bits to tell 256 integers apart
        return (nearest_by_statistics(tensor, spanning_range(tensor, format)), *others)

    return rounded


def _is_float(precision: Precision) -> bool:
    return precision.weight is None and precision.activation is None
