"""Activations in operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder, Translation, like


def unary(kind: str, **fixed: Attribute) -> Translation:
    """What records an operator of this kind with one input and these attributes."""

    def translate(to: Recorder, input: Tensor, inplace: bool = False) -> str:  # noqa: ARG001
        return to.emit(kind, [to.read(input)], attributes=dict(fixed))

    return translate


def dropout(
    to: Recorder, input: Tensor, p: float = 0.5, training: bool = True, *_: object, **__: object
) -> str:
    """Nothing: only a network in eval mode is traced."""
    if training and p > 0:
        raise to.untraceable("dropout in training mode")
    return to.read(input)


def clip(to: Recorder, input: Tensor, min_val: float, max_val: float, inplace: bool = False) -> str:  # noqa: ARG001
    """Clip."""
    return to.emit("Clip", [to.read(input)], attributes={"min": float(min_val), "max": float(max_val)})


def clamp(to: Recorder, input: Tensor, min: Any = None, max: Any = None) -> str:
    """Clip, where a limit that is not given is the largest float."""
    limit = torch.finfo(torch.float32).max
    for end in (min, max):
        if isinstance(end, Tensor) and (to.name(end) or end.numel() != 1):
            raise to.untraceable("clipping by limits that are not one number each")
    return clip(to, input, -limit if min is None else min, limit if max is None else max)


def silu(to: Recorder, input: Tensor, inplace: bool = False) -> str:  # noqa: ARG001
    """Mul of the input and its Sigmoid; ONNX has no operator of its own for it."""
    name = to.read(input)
    return to.emit("Mul", [name, to.emit("Sigmoid", [name])])


def mish(to: Recorder, input: Tensor, inplace: bool = False) -> str:  # noqa: ARG001
    """Mul of the input and the Tanh of its Softplus."""
    name = to.read(input)
    return to.emit("Mul", [name, to.emit("Tanh", [to.emit("Softplus", [name])])])


def softplus(to: Recorder, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> str:  # noqa: ARG001
    """Softplus; the threshold beyond which PyTorch gives its input is not needed: the two are equal there."""
    name = to.read(input)
    if beta == 1:
        return to.emit("Softplus", [name])
    steep = to.emit("Softplus", [to.emit("Mul", [name], weight=like(input, beta))])
    return to.emit("Mul", [steep], weight=like(input, 1 / beta))


def gelu(to: Recorder, input: Tensor, approximate: str = "none") -> str:
    """Gelu."""
    return to.emit("Gelu", [to.read(input)], attributes={"approximate": approximate})


def leaky_relu(to: Recorder, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> str:  # noqa: ARG001
    """LeakyRelu."""
    return to.emit("LeakyRelu", [to.read(input)], attributes={"alpha": float(negative_slope)})


def prelu(to: Recorder, input: Tensor, weight: Tensor) -> str:
    """PRelu with a slope for each channel."""
    slopes = weight.reshape(-1, *(1 for _ in range(max(input.ndim - 2, 0))))
    return to.emit("PRelu", [to.read(input)], weight=slopes)


def elu(to: Recorder, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> str:  # noqa: ARG001
    """Elu."""
    return to.emit("Elu", [to.read(input)], attributes={"alpha": float(alpha)})


def softmax(to: Recorder, input: Tensor, dim: int, *_: object, **__: object) -> str:
    """Softmax."""
    return to.emit("Softmax", [to.read(input)], attributes={"axis": dim % input.ndim})
