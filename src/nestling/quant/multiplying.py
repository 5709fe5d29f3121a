"""Float convolutions that ONNX Runtime computes as products of matrices, added in its order: to the last bit.

A convolution whose weights are integers, spread out at each run, or whose channels come in no multiples of 4,
is not computed by blocks of channels (see `nestling.quant.accumulating`). The runtime's CPU provider (1.31)
then multiplies the kernels of a group, (outputs, inputs x window), by the windows of an image, side by side:

- several outputs: a panel of the inner axis at a time, in fused multiply-adds one after another, and panel is
  added to panel. A panel has 128 numbers; more where the image has fewer pixels than the inner axis is long;
- one output: four products at a time, then two, then one, each rounded; their sum is added to those before;
- one pixel: in an order that is not known here.

The bias comes last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.models.operators import Operator

PANEL, COLUMNS, LEAST_COLUMNS = 128, 128, 16
"""Numbers of the inner axis, and columns, that the runtime multiplies at a time, and the fewest columns."""
TOGETHER = (4, 2, 1)
"""Products that it adds up before they join the sum, where there is one output."""
_LONGEST = 384
"""So many numbers PyTorch adds one after another; of more it begins a second sum."""
_HELD = 2**24
"""Numbers of windows that are laid out at a time."""


def is_multiplied(operator: Operator, shape: tuple[int, ...]) -> bool:
    """Whether `multiplied` gives what the runtime computes.

    Args:
        operator: a convolution of floats that is not computed by blocks of channels, or any other operator.
        shape: of what it writes.
    """
    if operator.kind != "Conv" or operator.weight is None or operator.weight.dtype != torch.float32:
        return False
    return operator.weight.ndim == 4 and shape[2] * shape[3] > 1


def multiplied(operator: Operator, images: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """What the convolution `operator`, which `is_multiplied`, makes of `images` (N, C, H, W).

    Args:
        operator: the convolution.
        images: on the device of its weight.
        shape: of what it writes.
    """
    weight, groups = operator.constant(), operator.integer("group")
    outputs, inner = weight.shape[0] // groups, weight[0].numel()
    kernels = weight.reshape(groups, outputs, inner)
    top, left, bottom, right = operator.integers("pads")
    images = F.pad(images.contiguous(), (left, right, top, bottom))
    pixels = shape[2] * shape[3]
    at_a_time = max(1, _HELD // (groups * inner * pixels))
    results = []
    for batch in torch.split(images, at_a_time):
        laid_out = F.unfold(
            batch,
            tuple(weight.shape[2:]),
            dilation=operator.integers("dilations"),
            stride=operator.integers("strides"),
        )
        windows = laid_out.reshape(len(batch), groups, inner, pixels)
        if outputs == 1:
            results.append(_by_products(kernels[:, 0], windows))
        else:
            columns = windows.permute(1, 2, 0, 3).flatten(2)
            products = _by_panels(kernels, columns, _panel(pixels, inner))
            by_image = products.reshape(groups, outputs, len(batch), pixels).permute(2, 0, 1, 3)
            results.append(by_image.flatten(1, 2))
    total = torch.cat(results).reshape(len(images), -1, *shape[2:])
    return total if operator.bias is None else total + operator.bias.reshape(-1, 1, 1)


def _panel(columns: int, inner: int) -> int:
    """How much of the inner axis the runtime adds up at a time."""
    panel, wide = PANEL, COLUMNS
    if columns >= inner:
        while panel // 2 >= inner:
            panel //= 2
    else:
        while wide > LEAST_COLUMNS and wide // 2 >= columns:
            panel, wide = panel * 2, wide // 2
    return panel


def _by_panels(kernels: Tensor, columns: Tensor, panel: int) -> Tensor:
    """The products (groups, outputs, columns) of `kernels` (groups, outputs, inner) and `columns`."""
    parts = zip(torch.split(kernels, panel, 2), torch.split(columns, panel, 1), strict=True)
    total = _in_sequence(*next(parts))
    for kernel, column in parts:
        total = total + _in_sequence(kernel, column)
    return total


def _in_sequence(kernels: Tensor, columns: Tensor) -> Tensor:
    """The product of matrices, every sum of it in fused multiply-adds one after another."""
    total = kernels[..., :_LONGEST] @ columns[:, :_LONGEST]
    more = _LONGEST // 2
    for begin in range(_LONGEST, kernels.shape[2], more):
        kernel, column = kernels[..., begin : begin + more], columns[:, begin : begin + more]
        rows = zip(torch.split(kernel, more, 1), torch.split(total, more, 1), strict=True)
        total = torch.cat([_continued(there, row, column) for row, there in rows], 1)
    return total


def _continued(there: Tensor, kernels: Tensor, columns: Tensor) -> Tensor:
    """The sums `there` (groups, outputs, columns), each going on with the products of its row and column.

    A sum goes on from what is there where its first term is that, times one. The other sums have that times
    zero, which would make them no numbers of an infinite one: such a sum stays out, and is added to.
    """
    one = torch.eye(kernels.shape[1], dtype=kernels.dtype, device=kernels.device)
    first = torch.cat((one.expand(len(kernels), -1, -1), kernels), 2)
    finite = there.isfinite()
    going_on = first @ torch.cat((torch.where(finite, there, 0.0), columns), 1)
    return torch.where(finite, going_on, there + going_on)


def _by_products(kernels: Tensor, windows: Tensor) -> Tensor:
    """The sums (N, groups, pixels) over `windows` (N, groups, inner, pixels) by `kernels` (groups, inner)."""
    total: Tensor | None = None
    for begin, count in _products_together(kernels.shape[1]):
        part = kernels[:, begin, None] * windows[:, :, begin]
        for place in range(begin + 1, begin + count):
            part = part + kernels[:, place, None] * windows[:, :, place]
        total = part if total is None else total + part
    assert total is not None
    return total


def _products_together(inner: int) -> Iterator[tuple[int, int]]:
    begin = 0
    while begin < inner:
        count = next(count for count in TOGETHER if count <= inner - begin)
        yield begin, count
        begin += count
