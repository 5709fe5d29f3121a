from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from nestling.models.operators import Attribute, Operator, compute
from nestling.quant.activations import ACTIVATIONS, FARTHEST

ATTRIBUTES: dict[str, dict[str, Attribute]] = {
    "Sigmoid": {},
    "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "HardSwish": {},
}


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="without fused multiply-adds"
)
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_activations_are_the_runtimes_to_the_last_bit(kind: str) -> None:
    numbers = 5 * torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    numbers[:6] = torch.tensor([0.0, -0.0, FARTHEST, -FARTHEST, 1e9, -1e9])
    value = helper.make_tensor_value_info
    node = helper.make_node(kind, ["x"], ["y"])
    node.attribute.extend(helper.make_attribute(*item) for item in ATTRIBUTES[kind].items())
    body = helper.make_graph(
        [node], "one", [value("x", TensorProto.FLOAT, None)], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": numbers.numpy()})
    operator = Operator(kind, "y", ("x",), "", ATTRIBUTES[kind])
    found, plain = ACTIVATIONS[kind](operator, numbers), compute(operator, numbers)

    assert np.array_equal(found.numpy(), expected)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
