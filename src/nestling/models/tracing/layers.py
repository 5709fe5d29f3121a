"""Layers in operators: convolutions, normalizations, attention, activations, pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.models.kernels import touching
from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder, Translation


def conv2d(
    to: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    """Conv, without the taps of its kernel that can only meet padding."""
    strides, dilations = _pair(stride), _pair(dilation)
    kernel = (weight.shape[2], weight.shape[3])
    if isinstance(padding, str):
        span = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        low = [s // 2 if padding == "same" else 0 for s in span]
        pads = (*low, *(s - half if padding == "same" else 0 for s, half in zip(span, low, strict=True)))
    else:
        pads = (*_pair(padding), *_pair(padding))
        if dilations == (1, 1):
            for axis in (0, 1):
                size, pad = input.shape[2 + axis], pads[axis]
                low_side, high_side = touching(kernel[axis], stride=strides[axis], padding=pad, size=size)
                weight = weight.narrow(2 + axis, pad - low_side, low_side + high_side + 1)
                pads = tuple(low_side if side % 2 == axis else p for side, p in enumerate(pads))
    attributes: dict[str, Attribute] = {
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "group": groups,
    }
    return to.emit("Conv", [to.read(input)], weight=weight, bias=bias, attributes=attributes)


def linear(to: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """Gemm for rows; MatMul and Add for tensors of more axes."""
    name = to.read(input)
    if input.ndim == 2:
        return to.emit("Gemm", [name], weight=weight, bias=bias, attributes={"transB": 1})
    product = to.emit("MatMul", [name], weight=weight.T.contiguous())
    return product if bias is None else to.emit("Add", [product], weight=bias)


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
    shape = (-1, *(1 for _ in range(input.ndim - 2)))
    scaled = to.emit("Mul", [to.read(input)], weight=scale.to(input.dtype).reshape(shape))
    return to.emit("Add", [scaled], weight=shift.to(input.dtype).reshape(shape))


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
    """Softmax of the scaled products of queries and keys, times the values."""
    if attn_mask is not None or dropout_p > 0 or is_causal or enable_gqa:
        raise to.untraceable("attention with a mask, dropout or grouped queries")
    factor = torch.tensor(query.shape[-1] ** -0.5 if scale is None else scale, device=query.device)
    perm = (*range(key.ndim - 2), key.ndim - 1, key.ndim - 2)
    scaled = to.emit("Mul", [to.read(query)], weight=factor)
    turned = to.emit("Transpose", [to.read(key)], attributes={"perm": perm})
    scores = to.emit("MatMul", [scaled, turned])
    attention = to.emit("Softmax", [scores], attributes={"axis": query.ndim - 1})
    return to.emit("MatMul", [attention, to.read(value)])


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


def clamp(to: Recorder, input: Tensor, min: float | None = None, max: float | None = None) -> str:
    """Clip, where a limit that is not given is the largest float."""
    limit = torch.finfo(torch.float32).max
    return clip(to, input, -limit if min is None else min, limit if max is None else max)


def silu(to: Recorder, input: Tensor, inplace: bool = False) -> str:  # noqa: ARG001
    """Mul of the input and its Sigmoid; ONNX has no operator of its own for it."""
    name = to.read(input)
    return to.emit("Mul", [name, to.emit("Sigmoid", [name])])


def gelu(to: Recorder, input: Tensor, approximate: str = "none") -> str:
    """Gelu."""
    return to.emit("Gelu", [to.read(input)], attributes={"approximate": approximate})


def leaky_relu(to: Recorder, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> str:  # noqa: ARG001
    """LeakyRelu."""
    return to.emit("LeakyRelu", [to.read(input)], attributes={"alpha": float(negative_slope)})


def elu(to: Recorder, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> str:  # noqa: ARG001
    """Elu."""
    return to.emit("Elu", [to.read(input)], attributes={"alpha": float(alpha)})


def softmax(to: Recorder, input: Tensor, dim: int, *_: object, **__: object) -> str:
    """Softmax."""
    return to.emit("Softmax", [to.read(input)], attributes={"axis": dim % input.ndim})


def adaptive_average(to: Recorder, input: Tensor, output_size: int | Sequence[int | None]) -> str:
    """GlobalAveragePool, or AveragePool where the wanted size divides the map."""
    wanted = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    size = tuple(input.shape[-2:])
    target = tuple(have if want is None else want for want, have in zip(wanted, size, strict=True))
    if target == (1, 1):
        return to.emit("GlobalAveragePool", [to.read(input)])
    if any(have % want for have, want in zip(size, target, strict=True)):
        raise to.untraceable(f"adaptive pooling of {size} to {target}, which does not divide it,")
    window = (size[0] // target[0], size[1] // target[1])
    return average_pool(to, input, window)


def max_pool(
    to: Recorder,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    """MaxPool."""
    if return_indices or _pair(dilation) != (1, 1):
        raise to.untraceable("max pooling with dilation or indices")
    attributes = _window(kernel_size, stride, padding, ceil_mode)
    return to.emit("MaxPool", [to.read(input)], attributes=attributes)


def average_pool(
    to: Recorder,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    """AveragePool."""
    if divisor_override is not None:
        raise to.untraceable("average pooling with a divisor of its own")
    attributes = _window(kernel_size, stride, padding, ceil_mode)
    attributes["count_include_pad"] = int(count_include_pad)
    return to.emit("AveragePool", [to.read(input)], attributes=attributes)


def _window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    ceil_mode: bool,
) -> dict[str, Attribute]:
    kernel = _pair(kernel_size)
    return {
        "kernel_shape": kernel,
        "strides": _pair(stride) if stride else kernel,
        "pads": (*_pair(padding), *_pair(padding)),
        "ceil_mode": int(ceil_mode),
    }


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]
