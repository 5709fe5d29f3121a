"""A range: which numbers a tensor's integers stand for, read by PyTorch and ONNX alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.quant.formats import Format

SMALLEST_SCALE = 2.0**-60
"""No scale is smaller: the product of two must be a float, and not zero. Numbers below it count as zeros."""


class Unquantizable(ValueError):  # noqa: N818 the word says it
    """A network whose numbers a precision cannot hold; the message names the tensor or the layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Which numbers a tensor's integers stand for: `scale * (integer - zero_point)`.

    Attributes:
        scale: float32; a scalar, (channels,), or (channels, blocks).
        zero_point: int32; shaped as `scale`.
        dtype: `int8`, `uint4`, `int32` or another width of 2 to 8 bits.
        axis: the axis of channels; None for one scale for the whole tensor.
        block: so many numbers of a channel, in the order of `rows`, share a scale, the last block the rest;
            None for all of a channel.
    """

    scale: Tensor
    zero_point: Tensor
    dtype: str
    axis: int | None
    block: int | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        bits = int(self.dtype.removeprefix("u").removeprefix("int"))
        return (0, 2**bits - 1) if self.dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @property
    def stored(self) -> str:
        """The type that an ONNX file has for it.

        4 bits are 4 bits only in blocks, which runtimes read as such; what they compute on has 8.
        """
        if self.block is not None or self.dtype == "int32":
            return self.dtype
        return "uint8" if self.dtype.startswith("u") else "int8"

    def equals(self, other: Range) -> bool:
        """Whether the same integers stand for the same numbers."""
        same_kind = (self.dtype, self.axis, self.block) == (other.dtype, other.axis, other.block)
        return (
            same_kind
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )

    def integers(self, tensor: Tensor) -> Tensor:
        """The integers nearest to `tensor`, as floats: half to even, cut off at the ends of `dtype`.

        This is the arithmetic of ONNX's QuantizeLinear.
        """
        aligned, scale, zero_point = self._aligned(tensor)
        return self._restored(self._steps(aligned, scale, zero_point).add_(zero_point), tensor)

    def steps(self, tensor: Tensor) -> Tensor:
        """`integers` less the zero point, so that zero is 0."""
        return self._restored(self._steps(*self._aligned(tensor)), tensor)

    def numbers(self, steps: Tensor) -> Tensor:
        """What `steps` stand for, of a range with one scale for the whole tensor: ONNX's DequantizeLinear."""
        return steps * self.scale.to(steps.device)

    def nearest(self, tensor: Tensor) -> Tensor:
        """`tensor` with every number replaced by the nearest one in this range."""
        aligned, scale, zero_point = self._aligned(tensor)
        steps = self._steps(aligned, scale, zero_point)
        return self._restored(steps.mul_(scale), tensor).to(tensor.dtype)

    def _steps(self, aligned: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        low, high = self.limits
        if self.dtype == "int32":  # a float32 cannot hold these
            aligned = aligned.double()
        steps = aligned.div(scale).round_()
        if self.zero_point.ndim == 0 or not self.zero_point.any():  # several times as fast as the general way
            zero = int(self.zero_point.flatten()[0])
            return steps.clamp_(low - zero, high - zero)
        return steps.clamp_(low - zero_point, high - zero_point)

    def _aligned(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`tensor`, cut into blocks where there are any, with scale and zero point shaped to go with it."""
        scale, zero_point = self.scale.to(tensor.device), self.zero_point.to(tensor.device)
        if self.axis is None:
            return tensor, scale, zero_point
        if self.block is not None:
            blocks = in_blocks(rows(tensor, self.axis), self.block)
            return blocks, scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return tensor, scale.reshape(shape), zero_point.reshape(shape)

    def _restored(self, result: Tensor, tensor: Tensor) -> Tensor:
        """`result` in the shape of `tensor`."""
        if self.block is None or self.axis is None:
            return result
        moved = tensor.movedim(self.axis, 0)
        numbers = result.flatten(1)[:, : moved[0].numel()]
        return numbers.reshape(moved.shape).movedim(0, self.axis)


def rows(weight: Tensor, axis: int) -> Tensor:
    """`weight` as (channels, numbers of each): its axis of channels first, the others one after another."""
    return weight.movedim(axis, 0).flatten(1)


def in_blocks(numbers: Tensor, block: int) -> Tensor:
    """`numbers` (channels, numbers) as (channels, blocks, block), the last block filled up with zeros."""
    filled = F.pad(numbers, (0, -numbers.shape[1] % block))
    return filled.reshape(len(filled), -1, block)


def activation_range(low: float, high: float, format: Format) -> Range:
    """The range of a tensor whose numbers lie between `low` and `high`.

    Zero is exact, since padding is made of it and a ReLU ends on it.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if format.symmetric:
        high = max(-low, high)
        low, steps, zero_point = -high, 2 * format.high, 0
    else:
        steps = format.high - format.low
    wide = (high - low) / steps
    scale = torch.tensor(wide if wide >= SMALLEST_SCALE else 1.0, dtype=torch.float32)
    if not format.symmetric:
        zero_point = min(max(format.low + round(-low / float(scale)), format.low), format.high)
    return Range(scale, torch.tensor(zero_point, dtype=torch.int32), format.dtype, None)
