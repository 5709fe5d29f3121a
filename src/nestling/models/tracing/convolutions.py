"""Linear layers and convolutions in operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.models.kernels import touching
from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder
from nestling.models.tracing.shapes import reshaped

Size = int | Sequence[int]


def convolution(
    to: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> str:
    """Conv over lines, maps or volumes, without the taps of its kernel that can only meet padding."""
    rank = _rank(to, input, weight)
    kernel = tuple(weight.shape[2:])
    strides, dilations = every(stride, rank), every(dilation, rank)
    if isinstance(padding, str):
        span = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        low = tuple(s // 2 for s in span)
        high = tuple(s - half for s, half in zip(span, low, strict=True))
    else:
        low = high = every(padding, rank)
        if set(dilations) == {1}:
            for axis in range(rank):
                size, pad = input.shape[2 + axis], low[axis]
                before, after = touching(kernel[axis], stride=strides[axis], padding=pad, size=size)
                weight = weight.narrow(2 + axis, pad - before, before + after + 1)
                low = high = tuple(before if place == axis else p for place, p in enumerate(low))
    attributes: dict[str, Attribute] = {
        "strides": strides,
        "pads": (*low, *high),
        "dilations": dilations,
        "group": groups,
    }
    return to.emit("Conv", [to.read(input)], weight=weight, bias=bias, attributes=attributes)


def transposed_convolution(
    to: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> str:
    """ConvTranspose."""
    rank = _rank(to, input, weight)
    attributes: dict[str, Attribute] = {
        "strides": every(stride, rank),
        "pads": every(padding, rank) * 2,
        "dilations": every(dilation, rank),
        "group": groups,
        "output_padding": every(output_padding, rank),
    }
    return to.emit("ConvTranspose", [to.read(input)], weight=weight, bias=bias, attributes=attributes)


def linear(to: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """Gemm; tensors of more axes are made rows before it, which is how ONNX Runtime computes it in 8 bits."""
    name = to.read(input)
    if to.name(weight) or to.name(bias):
        raise to.untraceable("a linear layer whose weights depend on the images")
    if input.ndim != 2:
        name = to.emit("Reshape", [name], attributes={"shape": (-1, input.shape[-1])})
    product = to.emit("Gemm", [name], weight=weight, bias=bias, attributes={"transB": 1})
    if input.ndim == 2:
        return product
    return to.emit("Reshape", [product], attributes={"shape": (-1, *input.shape[1:-1], weight.shape[0])})


def patches(
    to: Recorder,
    input: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> str:
    """Conv with a kernel of one tap for each pixel of a patch (`F.unfold`), and Reshape."""
    channels = input.shape[1]
    kernel = every(kernel_size, 2)
    attributes: dict[str, Attribute] = {
        "strides": every(stride, 2),
        "pads": every(padding, 2) * 2,
        "dilations": every(dilation, 2),
        "group": channels,
    }
    rows = to.emit("Conv", [to.read(input)], weight=_taps(channels, kernel, input), attributes=attributes)
    size = _places(input.shape[2:], kernel, dilation, padding, stride)
    return to.emit(
        "Reshape", [rows], attributes={"shape": (-1, channels * math.prod(kernel), math.prod(size))}
    )


def patched(
    to: Recorder,
    input: Tensor,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> str:
    """Reshape, and ConvTranspose with a kernel of one tap for each pixel of a patch (`F.fold`)."""
    kernel, wanted = every(kernel_size, 2), every(output_size, 2)
    steps, pads, dilations = every(stride, 2), every(padding, 2), every(dilation, 2)
    channels = input.shape[1] // math.prod(kernel)
    places = _places(wanted, kernel, dilation, padding, stride)
    maps = reshaped(to, to.read(input), input.shape, (input.shape[0], input.shape[1], *places))
    reached = [
        (places[axis] - 1) * steps[axis] - 2 * pads[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        for axis in (0, 1)
    ]
    attributes: dict[str, Attribute] = {
        "strides": steps,
        "pads": pads * 2,
        "dilations": dilations,
        "group": channels,
        "output_padding": (wanted[0] - reached[0], wanted[1] - reached[1]),
    }
    return to.emit("ConvTranspose", [maps], weight=_taps(channels, kernel, input), attributes=attributes)


def every(value: Size, rank: int) -> tuple[int, ...]:
    """`value` for each of `rank` axes."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def _rank(to: Recorder, input: Tensor, weight: Tensor) -> int:
    if to.name(weight):
        raise to.untraceable("a convolution whose kernel depends on the images")
    if input.ndim != weight.ndim:
        raise to.untraceable("a convolution of one image without its axis of images")
    return weight.ndim - 2


def _taps(channels: int, kernel: tuple[int, ...], input: Tensor) -> Tensor:
    pixels = math.prod(kernel)
    taps = torch.eye(pixels, dtype=input.dtype, device=input.device).reshape(pixels, 1, *kernel)
    return taps.repeat(channels, 1, 1, 1)


def _places(
    size: Sequence[int], kernel: Sequence[int], dilation: Size, padding: Size, stride: Size
) -> tuple[int, ...]:
    return tuple(
        (side + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for side, taps, step, pad, jump in zip(
            size, kernel, every(dilation, 2), every(padding, 2), every(stride, 2), strict=True
        )
    )
