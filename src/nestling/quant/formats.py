"""How numbers are stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """How a tensor is rounded to integers.

    Attributes:
        bits: bits of an integer.
        signed: integers run from `-2 ** (bits - 1)`, otherwise from 0.
        symmetric: zero is integer 0, otherwise any integer may stand for zero.
        per_channel: a scale for each output channel, otherwise one for the tensor.
    """

    bits: int
    signed: bool
    symmetric: bool
    per_channel: bool

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
