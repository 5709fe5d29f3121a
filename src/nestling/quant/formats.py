"""How numbers are stored in few bits: integers, and the codes that papers propose and no runtime computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Format:
    """How a tensor is rounded to integers.

    Attributes:
        bits: bits of an integer.
        signed: integers run from `-2 ** (bits - 1)`, otherwise from 0.
        symmetric: zero is integer 0, otherwise any integer may stand for zero.
        per_channel: a scale for each output channel, otherwise one for the tensor.
        group: so many weights of one output channel share a scale, the last group of a channel the rest; None
            for all of a channel.

    Raises:
        ValueError: a group that ONNX Runtime has no kernel for.
    """

    bits: int
    signed: bool
    symmetric: bool
    per_channel: bool
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None and (self.group < 16 or self.group.bit_count() != 1):
            raise ValueError(f"groups of {self.group} weights; it must be a power of two, 16 or more")

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> str:
        """The integer type that holds it, such as `uint8`."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    def size_bits(self, *, channels: int, per_channel: int) -> int:
        """The bits that a weight takes, with its scales (32 bits each) and zero points.

        Args:
            channels: output channels.
            per_channel: weights of each.
        """
        scales = channels * math.ceil(per_channel / self.group) if self.group else channels
        if not self.per_channel:
            scales = 1
        zero_point = 0 if self.symmetric else self.bits
        return channels * per_channel * self.bits + scales * (32 + zero_point)

    def filled_bits(self, *, channels: int, per_channel: int) -> int:
        """The same of a weight in groups of a product of matrices.

        There the last group of a channel is filled up, and the zero points of a channel are whole bytes.

        Args:
            channels: output channels.
            per_channel: weights of each.

        Raises:
            ValueError: a format without groups.
        """
        if self.group is None:
            raise ValueError("only groups are filled up")
        groups = math.ceil(per_channel / self.group)
        zero_points = 0 if self.symmetric else 8 * math.ceil(groups * self.bits / 8)
        return channels * (groups * (self.group * self.bits + 32) + zero_points)


@dataclass(frozen=True, slots=True)
class Minifloat:
    """Floats of 8 bits and less, with a 32-bit scale for each output channel.

    Attributes:
        exponent: bits of the exponent; its bias is `2 ** (exponent - 1) - 1`.
        mantissa: bits after the leading one.
        largest: the largest finite number, onto which the scale brings a channel's largest weight.
    """

    exponent: int
    mantissa: int
    largest: float

    def nearest(self, weight: Tensor, *, axis: int) -> Tensor:
        """`weight` with every number replaced by the nearest one, half to even."""
        scale = _largest(weight, axis) / self.largest
        return self._round(weight / scale).mul_(scale)

    def size_bits(self, *, channels: int, per_channel: int) -> int:
        """The bits that a weight of `channels` times `per_channel` numbers takes, with its scales."""
        return channels * (per_channel * (1 + self.exponent + self.mantissa) + 32)

    def _round(self, numbers: Tensor) -> Tensor:
        smallest_normal = 2 - (1 << (self.exponent - 1))
        exponents = torch.frexp(numbers).exponent.sub(1).clamp(min=smallest_normal)
        step = torch.ldexp(torch.ones_like(numbers), exponents - self.mantissa)
        return (numbers / step).round_().mul_(step).clamp_(-self.largest, self.largest)


@dataclass(frozen=True, slots=True)
class Ternary:
    """Minus one, zero or one, times one scale for the tensor (BitNet b1.58, arXiv 2402.17764).

    Attributes:
        scale: `mean` of the weights' magnitudes, or their `median` (BitNet b1.58 Reloaded, arXiv 2407.09527).
    """

    scale: Literal["mean", "median"] = "mean"

    @property
    def integers(self) -> Format:
        """The integers that hold exactly what `nearest` gives."""
        return Format(bits=2, signed=True, symmetric=True, per_channel=False)

    def nearest(self, weight: Tensor, *, axis: int) -> Tensor:  # noqa: ARG002 the signature of every code
        """`weight` with every number replaced by the nearest of the three."""
        sizes = weight.abs()
        scale = sizes.mean() if self.scale == "mean" else sizes.median()
        # More than half of a tensor may be zeros.
        scale = torch.where(scale > 0, scale, sizes.max())
        return (weight / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-1, 1).mul_(scale)

    def size_bits(self, *, channels: int, per_channel: int) -> int:
        """The bits that a weight of `channels` times `per_channel` numbers takes: five numbers to a byte."""
        return math.ceil(channels * per_channel / 5) * 8 + 32


@dataclass(frozen=True, slots=True)
class Powers:
    """Uniform steps of `sign(x) * |x| ** a` (PowerQuant, arXiv 2301.09858; NUPES, arXiv 2308.05600).

    There is a scale for each output channel and one exponent `a` for the tensor: the one among 17 with the
    least squared error of the weights. NUPES goes on to learn it by gradient descent; this does not.

    Attributes:
        bits: bits of a number.
    """

    bits: int

    def nearest(self, weight: Tensor, *, axis: int) -> Tensor:
        """`weight` with every number replaced by the one to which its power is rounded."""
        largest = _largest(weight, axis)
        sizes, signs = (weight / largest).abs_(), weight.sign()
        levels = (1 << (self.bits - 1)) - 1

        def rounded(exponent: float) -> Tensor:
            return sizes.pow(exponent).mul_(levels).round_().div_(levels).pow_(1 / exponent)

        def error(exponent: float) -> float:
            return float((rounded(exponent) - sizes).mul_(largest).square_().sum())

        return rounded(min((step / 20 for step in range(4, 21)), key=error)).mul_(signs).mul_(largest)

    def size_bits(self, *, channels: int, per_channel: int) -> int:
        """The bits that a weight of `channels` times `per_channel` numbers takes, with its exponent."""
        return channels * (per_channel * self.bits + 32) + 32


@dataclass(frozen=True, slots=True)
class Codebook:
    """A number from a list that is learned for each tensor, times a scale for each output channel.

    The list is found by k-means over the weights, each divided by its channel's largest. JLCM (arXiv
    2309.17361) begins like this, with groups of alike channels in place of single ones, and goes on to learn
    lists and assignments by gradient descent; this does not.

    Attributes:
        bits: bits of a position in the list.
    """

    bits: int

    def nearest(self, weight: Tensor, *, axis: int) -> Tensor:
        """`weight` with every number replaced by the nearest one of its list."""
        scale = _largest(weight, axis)
        numbers = weight / scale
        codes = _clusters(numbers.flatten().double(), 1 << self.bits).to(weight.dtype)
        nearest = torch.bucketize(numbers, (codes[1:] + codes[:-1]) / 2)
        return codes[nearest] * scale

    def size_bits(self, *, channels: int, per_channel: int) -> int:
        """The bits that a weight of `channels` times `per_channel` numbers takes, with scales and list."""
        return channels * (per_channel * self.bits + 32) + (32 << self.bits)


Code = Minifloat | Ternary | Powers | Codebook
"""What no runtime computes with, so that it is simulated."""


def _largest(weight: Tensor, axis: int) -> Tensor:
    """The largest magnitude of each channel, aligned with `weight`; 1 where all of a channel is zero."""
    others = [other for other in range(weight.ndim) if other != axis % weight.ndim]
    largest = weight.abs().amax(others, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _clusters(numbers: Tensor, count: int) -> Tensor:
    """The means of `count` clusters of `numbers`, ascending, by Lloyd's algorithm; or all, if few."""
    ordered = numbers.sort().values
    distinct = ordered[torch.cat([ordered.new_ones(1), ordered.diff()]) != 0]
    if len(distinct) <= count:
        return distinct
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    positions = (torch.arange(count, dtype=torch.float64, device=numbers.device) + 0.5) / count
    centers = distinct[(positions * len(distinct)).long()]
    for _ in range(_LLOYD_STEPS):
        ends = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2, right=True)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        sizes = ends.diff()
        moved = torch.where(sizes > 0, sums[ends].diff() / sizes.clamp(min=1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


_LLOYD_STEPS = 100
