from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from nestling.quant import Range


def range_of(scale: float, zero_point: int, *, dtype: str = "uint8") -> Range:
    return Range(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), dtype, None)


@pytest.mark.parametrize(
    ("dtype", "integer_type", "zero_point"),
    [("uint8", TensorProto.UINT8, 3), ("uint8", TensorProto.UINT8, 0), ("int8", TensorProto.INT8, 0)],
)
def test_rounding_is_that_of_quantize_linear(dtype: str, integer_type: int, zero_point: int) -> None:
    found = range_of(0.3, zero_point, dtype=dtype)
    halves = torch.arange(-300, 300, dtype=torch.float32) / 2  # every tie, and numbers beyond both ends
    tensor = torch.cat([halves * found.scale, torch.randn(1000) * 20])
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    model = helper.make_model(
        helper.make_graph(
            [node],
            "quantize",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("y", integer_type, [None])],
            [
                onnx.numpy_helper.from_array(found.scale.numpy(), "scale"),
                onnx.numpy_helper.from_array(np.array(zero_point, dtype=dtype), "zero"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"x": tensor.numpy()})
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(found.integers(tensor).numpy(), expected.astype(np.float32))


def test_rounding_leaves_its_operand_as_it_was() -> None:
    tensor = torch.tensor([0.1, 0.2])
    range_of(1.0, 0).nearest(tensor)
    assert torch.equal(tensor, torch.tensor([0.1, 0.2]))


def test_channels_are_rounded_by_their_own_scales() -> None:
    found = Range(torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int32), "int8", 1)
    assert torch.equal(found.nearest(torch.tensor([[0.7, 0.7]])), torch.tensor([[1.0, 0.5]]))
