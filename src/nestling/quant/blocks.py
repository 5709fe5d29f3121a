"""Weights of 4 or 8 bits in blocks, in ONNX: stored in as many bits, computed with in 32-bit floats."""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from nestling.quant.ranges import Range, in_blocks, rows

Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]
"""Nodes, and the constants that they read."""

DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""


def blocked_layer(node: onnx.NodeProto, weight: Tensor, found: Range) -> Part:
    """What takes the place of `node`, whose second operand is `weight`, stored in the blocks of `found`.

    A linear layer becomes ONNX Runtime's MatMulNBits, which reads the packed weights as they are. For any
    other the blocks are unpacked by a DequantizeLinear whenever the network runs: its file is as small, and
    gains nothing else.
    """
    if node.op_type in ("Gemm", "MatMul"):
        return _packed_product(node, weight, found)
    return _unpacked(node, weight, found)


def _packed_product(node: onnx.NodeProto, weight: Tensor, found: Range) -> Part:
    """`node`, a Gemm with a transposed weight or a MatMul, as one MatMulNBits."""
    assert found.axis is not None
    assert found.block is not None
    name = node.input[1]
    bits = 4 if found.dtype.endswith("4") else 8
    # The operator's integers are unsigned; those that are signed are moved up, and zero with them.
    offset = -found.limits[0]
    integers = in_blocks(rows(found.integers(weight), found.axis) + offset, found.block)
    channels, per_channel = rows(weight, found.axis).shape
    constants = [
        numpy_helper.from_array(_packed(integers, bits), f"{name}.quantized"),
        numpy_helper.from_array(found.scale.numpy(), f"{name}.scale"),
    ]
    zero_point = ""
    if not offset:  # otherwise it is the operator's own, in the middle
        zero_point = f"{name}.zero_point"
        constants.append(numpy_helper.from_array(_packed(found.zero_point, bits), zero_point))
    bias = node.input[2] if len(node.input) > 2 else ""
    operands = [node.input[0], f"{name}.quantized", f"{name}.scale", zero_point, "", bias]
    while not operands[-1]:
        operands.pop()
    product = helper.make_node(
        "MatMulNBits",
        operands,
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        K=per_channel,
        N=channels,
        bits=bits,
        block_size=found.block,
        # Products of 32-bit floats; at level 4 the runtime would round what the layer reads to 8 bits.
        accuracy_level=1,
    )
    return [product], constants


def _packed(integers: Tensor, bits: int) -> NDArray[np.uint8]:
    """`integers` as bytes; of 4 bits two to a byte along the last axis, the first one low."""
    if bits == 4:
        integers = F.pad(integers.float(), (0, integers.shape[-1] % 2))
        integers = integers[..., ::2] + 16 * integers[..., 1::2]
    return integers.numpy().astype(np.uint8)


def _unpacked(node: onnx.NodeProto, weight: Tensor, found: Range) -> Part:
    """`node` behind a DequantizeLinear of rows of blocks, brought into the weight's shape."""
    assert found.axis is not None
    name = node.input[1]
    moved = weight.movedim(found.axis, 0)
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(found.stored.upper()))
    constants = [
        numpy_helper.from_array(
            rows(found.integers(weight), found.axis).numpy().astype(dtype), f"{name}.quantized"
        ),
        numpy_helper.from_array(found.scale.numpy(), f"{name}.scale"),
    ]
    if found.zero_point.any():
        zero_point = found.zero_point.numpy().astype(dtype)
        constants.append(numpy_helper.from_array(zero_point, f"{name}.zero_point"))
    operands = [constant.name for constant in constants]
    constants.append(numpy_helper.from_array(np.asarray(moved.shape, dtype=np.int64), f"{name}.shape"))
    shaped = f"{name}.moved" if found.axis else name
    nodes = [
        helper.make_node(
            "DequantizeLinear",
            operands,
            [f"{name}.rows"],
            name=f"{name}.rows",
            axis=1,
            block_size=found.block,
        ),
        helper.make_node("Reshape", [f"{name}.rows", f"{name}.shape"], [shaped], name=shaped),
    ]
    if found.axis:
        order = torch.arange(weight.ndim).tolist()
        order.insert(found.axis, order.pop(0))
        nodes.append(helper.make_node("Transpose", [shaped], [name], name=name, perm=order))
    return [*nodes, node], constants
