"""A range: which numbers a tensor's integers stand for, read by PyTorch and ONNX alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Which numbers a tensor's integers stand for: `scale * (integer - zero_point)`.

    Attributes:
        scale: float32; a scalar, or (channels,).
        zero_point: int32; shaped as `scale`.
        dtype: `int8`, `uint8` or `int32`.
        axis: the axis of channels; None for one scale for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor
    dtype: str
    axis: int | None

    def integers(self, tensor: Tensor) -> Tensor:
        """The integers nearest to `tensor`, as floats: half to even, cut off at the ends of `dtype`.

        This is the arithmetic of ONNX's QuantizeLinear, operation by operation.
        """
        scale, zero_point = self._aligned(tensor)
        limits = _LIMITS[self.dtype]
        if self.dtype == "int32":  # a float32 cannot hold these
            return tensor.double().div(scale).round_().clamp_(*limits)
        return tensor.div(scale).round_().add_(zero_point).clamp_(*limits)

    def nearest(self, tensor: Tensor) -> Tensor:
        """`tensor` with every number replaced by the nearest one in this range."""
        scale, zero_point = self._aligned(tensor)
        return self.integers(tensor).sub_(zero_point).mul_(scale).to(tensor.dtype)

    def _aligned(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.scale.to(tensor.device), self.zero_point.to(tensor.device)
        if self.axis is None:
            return scale, zero_point
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return scale.reshape(shape), zero_point.reshape(shape)


_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}
