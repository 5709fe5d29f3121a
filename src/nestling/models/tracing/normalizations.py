"""Normalizations in operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder, like
from nestling.models.tracing.shapes import reshaped


def batch_norm(
    to: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001 torch's signature
    eps: float = 1e-5,
) -> str:
    """Mul and Add by a scale and a shift for each channel, from the running statistics."""
    if training or running_mean is None or running_var is None:
        raise to.untraceable("batch normalization by the statistics of the batch")
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return _scaled(to, to.read(input), input, scale.to(input.dtype), shift.to(input.dtype))


def layer_norm(
    to: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> str:
    """LayerNormalization."""
    if weight is None:
        weight = torch.ones(tuple(normalized_shape), dtype=input.dtype, device=input.device)
    attributes: dict[str, Attribute] = {"axis": input.ndim - len(normalized_shape), "epsilon": float(eps)}
    return to.emit("LayerNormalization", [to.read(input)], weight=weight, bias=bias, attributes=attributes)


def rms_norm(
    to: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> str:
    """Div by the Sqrt of the mean square, and Mul by the weight."""
    name = to.read(input)
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    square = to.emit("Mul", [name, name])
    middle = to.emit("ReduceMean", [square], attributes={"axes": axes, "keepdims": 1})
    least = torch.finfo(input.dtype).eps if eps is None else eps
    length = to.emit("Sqrt", [to.emit("Add", [middle], weight=like(input, least))])
    normal = to.emit("Div", [name, length])
    return normal if weight is None else to.emit("Mul", [normal], weight=weight)


def group_norm(
    to: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> str:
    """InstanceNormalization of groups laid out as channels, and Mul and Add for each channel."""
    apart = (input.shape[0], num_groups, math.prod(input.shape[1:]) // num_groups)
    name = reshaped(to, to.read(input), input.shape, apart)
    ones = torch.ones(num_groups, dtype=input.dtype, device=input.device)
    attributes: dict[str, Attribute] = {"epsilon": float(eps)}
    name = to.emit(
        "InstanceNormalization", [name], weight=ones, bias=torch.zeros_like(ones), attributes=attributes
    )
    return _scaled(to, reshaped(to, name, apart, input.shape), input, weight, bias)


def instance_norm(
    to: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> str:
    """InstanceNormalization, or Mul and Add where it uses running statistics."""
    if not use_input_stats:
        return batch_norm(to, input, running_mean, running_var, weight, bias, False, momentum, eps)
    ones = torch.ones(input.shape[1], dtype=input.dtype, device=input.device)
    return to.emit(
        "InstanceNormalization",
        [to.read(input)],
        weight=ones if weight is None else weight,
        bias=torch.zeros_like(ones) if bias is None else bias,
        attributes={"epsilon": float(eps)},
    )


def _scaled(to: Recorder, name: str, input: Tensor, scale: Tensor | None, shift: Tensor | None) -> str:
    """Mul and Add for each channel of the tensor called `name`, which has the shape of `input`."""
    shape = (-1, *(1 for _ in range(input.ndim - 2)))
    if scale is not None:
        name = to.emit("Mul", [name], weight=scale.reshape(shape))
    return name if shift is None else to.emit("Add", [name], weight=shift.reshape(shape))
