from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from nestling.quant.logistic import FARTHEST, logistic


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="without fused multiply-adds"
)
def test_sigmoids_are_the_runtimes_to_the_last_bit() -> None:
    numbers = 5 * torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    numbers[:6] = torch.tensor([0.0, -0.0, FARTHEST, -FARTHEST, 1e9, -1e9])
    value = helper.make_tensor_value_info
    node = helper.make_node("Sigmoid", ["x"], ["y"])
    body = helper.make_graph(
        [node], "one", [value("x", TensorProto.FLOAT, None)], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": numbers.numpy()})

    assert np.array_equal(logistic(numbers).numpy(), expected)
    assert not np.array_equal(torch.sigmoid(numbers).numpy(), expected)
    torch.testing.assert_close(logistic(numbers), torch.sigmoid(numbers), rtol=0, atol=2e-7)
