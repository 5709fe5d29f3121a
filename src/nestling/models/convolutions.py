"""Convolutions of small maps on a CPU, in training: what oneDNN computes, in ways that take less time.

Two of its ways are slow where maps are small, as those of small images are from the first stages on:

- A 1x1 convolution of few positions, above all its backward pass. It is a product of matrices, and the
  products of PyTorch take a third of the time at 64 positions, the same from some 8,000 on.
- The gradient of a depthwise kernel that is wider than 3 taps, or higher than the map it slides over: it is
  computed as that of 16 channels each with each, of which the diagonal is kept. The gradient of a strip of 3
  columns is not, so a wide kernel's is put together from strips: a fifth of the time.

What is computed is the same up to rounding. Both are for gradients: without them the ordinary convolution is
called, so that a network gives what it gives anywhere else to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

POSITIONS = 4096
"""The largest number of positions (images x rows x columns) at which 1x1 convolutions are products.

Forward and backward, from 24 to 144, 40 to 240, 240 to 40 and 160 to 960 channels, they took of oneDNN's
time 0.25 to 0.32 at 64 positions, 0.6 to 0.75 at 1,024, 0.8 to 0.9 at 4,096, 0.75 to 1.15 at 8,192 and 0.85
to 1.2 at 16,384 (processor time of one thread, AVX512).
"""
_STRIP = 3
"""Columns of a depthwise kernel that oneDNN computes the gradient of in its own way for depthwise kernels."""

Pair = tuple[int, int]
"""Of the rows, and of the columns."""


def pointwise(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 convolution of `images` (N, C, H, W) with `weight` (C', C, 1, 1), its stride 1.

    The result (N, C', H, W) is channels last, as `images` should be: others are copied.
    """
    count, channels, height, width = images.shape
    positions = images.permute(0, 2, 3, 1).reshape(-1, channels)
    found = F.linear(positions, weight.flatten(1), bias)
    return found.view(count, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def depthwise(images: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Pair, padding: Pair) -> Tensor:
    """The convolution of each channel of `images` (N, C, H, W) with its kernel of `weight` (C, 1, h, w)."""
    if _is_slow(images, weight):
        found: Tensor = _Depthwise.apply(images, weight, bias, stride, padding)
        return found
    return F.conv2d(images, weight, bias, stride, padding, 1, weight.shape[0])


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that is computed as a product of matrices where that takes less time.

    Equal to `torch.nn.Conv2d` up to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input` (N, C, H, W)."""
        if _learns(input) and input.numel() <= POSITIONS * self.in_channels:
            return pointwise(input, self.weight, self.bias)
        return super().forward(input)


def compute_by_products(network: nn.Module) -> None:
    """Makes `network`'s 1x1 convolutions products of matrices where that takes less time, in place.

    The parameters stay as they are; only the class of the convolutions changes.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_pointwise(module):
            module.__class__ = PointwiseConv2d


def depthwise_weight_gradient(
    images: Tensor, gradient: Tensor, *, kernel: Pair, stride: Pair, padding: Pair
) -> Tensor:
    """The gradient (C, 1, *kernel) of a depthwise convolution's weight, put together from strips.

    Args:
        images: what the convolution read (N, C, H, W).
        gradient: of what it gave (N, C, H', W').
        kernel: rows and columns.
        stride: of the convolution.
        padding: zeros before the first row and column, and, as far as there are taps, behind the last.
    """
    rows = _Axis(images.shape[2], gradient.shape[2], stride[0])
    columns = _Axis(images.shape[3], gradient.shape[3], stride[1])
    high, top, bottom = rows.part(0, kernel[0], padding=padding[0])
    strips = []
    for first, taps in _strips(kernel[1]):
        wide, left, right = columns.part(first, taps, padding=padding[1])
        weight = images.new_zeros(images.shape[1], 1, kernel[0], taps)
        if columns.size + min(left, 0) + min(right, 0) <= 0:  # it only ever meets padding
            strips.append(weight)
            continue
        maps = F.pad(images, (left, right, top, bottom)) if left or right or top or bottom else images
        strips.append(_gradients(gradient, maps, weight, stride, (high, wide), of_images=False))
    return strips[0] if len(strips) == 1 else torch.cat(strips, 3)


class _Axis:
    """Rows or columns: `size` pixels read at every `stride`-th of which one of `found` is written."""

    def __init__(self, size: int, found: int, stride: int) -> None:
        self.size, self.found, self.stride = size, found, stride

    def part(self, first: int, taps: int, *, padding: int) -> tuple[int, int, int]:
        """How the `taps` from `first` on are a kernel of their own, of a kernel with `padding`.

        Zeros that the convolution adds on either side, then those that are to be added before it on the low
        and the high side; fewer than 0: pixels to be left out.
        """
        low = padding - first
        fits = 0 <= low <= taps // 2 and taps <= self.size and (low <= 1 or self.stride == 1)
        if fits and (self.size + 2 * low - taps) // self.stride + 1 == self.found:
            return low, 0, 0
        return 0, low, (self.found - 1) * self.stride + taps - self.size - low


class _Depthwise(torch.autograd.Function):
    """`F.conv2d` of each channel for itself, whose weight's gradient is put together from strips."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, bias, stride, padding, 1, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_images = _gradients(gradient, images, weight, ctx.stride, ctx.padding, of_images=True)
        if ctx.needs_input_grad[1]:
            of_weight = depthwise_weight_gradient(
                images, gradient, kernel=tuple(weight.shape[2:]), stride=ctx.stride, padding=ctx.padding
            )
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None


def _gradients(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: Pair, padding: Pair, *, of_images: bool
) -> Tensor:
    """What oneDNN finds: the gradient of the images, or of the weight."""
    wanted = [of_images, not of_images, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, (1, 1), False, (0, 0), weight.shape[0], wanted
    )
    return found[0] if of_images else found[1]


def _strips(width: int) -> list[Pair]:
    """The first column and the number of columns, 2 or 3, of each strip of a kernel that is `width` wide.

    A single column would be as slow as a wide kernel where the convolution takes steps of 2. Where it can be
    the middle strip of an odd kernel has 3, as the maps then need no padding for it.
    """
    sizes = [_STRIP] * (width // _STRIP)
    if width < _STRIP:
        sizes = [width]
    elif width % _STRIP == 2:
        sizes.append(2)
    elif width % _STRIP == 1:  # 4: 2, 2; 7: 2, 3, 2; 10: 2, 3, 3, 2
        sizes = [2, *sizes[:-1], 2]
    return [(sum(sizes[:place]), taps) for place, taps in enumerate(sizes)]


def _is_slow(images: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN would compute the gradient of the depthwise `weight` as that of a full one."""
    rows, columns = weight.shape[2:]
    return (columns > _STRIP or rows > images.shape[2] or columns > images.shape[3]) and _learns(images)


def _learns(images: Tensor) -> bool:
    """Whether a convolution of `images` is oneDNN's, and one whose gradients are asked for."""
    return (
        torch.is_grad_enabled()
        and bool(torch.backends.mkldnn.enabled)
        and images.device.type == "cpu"
        and images.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _is_pointwise(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride == (1, 1)
        and convolution.groups == 1
        and convolution.padding in ((0, 0), "same", "valid")
    )
