"""Constants of an ONNX model, made and read without a detour: a quantized network has a thousand of them."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
}
INTEGER_TYPES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}


def constant(name: str, value: NDArray[np.generic]) -> onnx.TensorProto:
    """`value` as an initializer called `name`.

    Args:
        name: of the initializer.
        value: float32, int8, uint8 or int32.

    Raises:
        KeyError: numbers of another type.
    """
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return TensorProto(name=name, data_type=_TYPES[value.dtype], dims=value.shape, raw_data=little.tobytes())


def renamed(initializer: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """A copy of `initializer` that is called `name`."""
    copy = TensorProto()
    copy.CopyFrom(initializer)
    copy.name = name
    return copy


def zeros(like: NDArray[np.generic]) -> onnx.TensorProto:
    """Zeros of the type and shape of `like`, scalar or (channels,), as an initializer to be shared."""
    times = f".x{like.size}" if like.ndim else ""
    return constant(f"zeros.{like.dtype}{times}", np.zeros_like(like))


def tensor(initializer: onnx.TensorProto) -> Tensor:
    """The numbers of `initializer`, copied."""
    return torch.from_numpy(numpy_helper.to_array(initializer).copy())
