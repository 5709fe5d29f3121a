from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, Operator, trace
from nestling.quant import PRECISIONS, QuantPolicy, Recipe, insert_qdq, quantize, simulate, weight_bits
from nestling.quant.calibration import WeightMethod
from nestling.quant.constants import stored_range
from nestling.quant.layers import layers
from nestling.quant.sensitivity import measure_sensitivity

Computed = tuple[NDArray[np.float32], Counter[str]]


class Odd(nn.Module):
    """A linear layer, a product with three matrices at once, and one with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 8, 40))
        self.query = nn.Parameter(torch.randn(40))
        self.linear = nn.Linear(40, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images @ self.matrices
        logits: Tensor = (self.linear(tokens) * (tokens @ self.query).softmax(-1)[..., None]).sum((1, 2))
        return logits


@pytest.fixture(scope="module")
def odd() -> Graph:
    torch.manual_seed(0)
    return trace(Odd().eval(), resolution=8)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def products(graph: Graph) -> list[Operator]:
    """Those with a vector or several matrices."""
    return [o for o in graph.operators if o.kind == "MatMul" and o.weight is not None and o.weight.ndim != 2]


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_vector_and_several_matrices_are_no_layers_and_stay_floats(odd: Graph, precision: str) -> None:
    policy, alone = QuantPolicy((("", precision),)), QuantPolicy((("linear", precision),))
    few = products(odd)
    assert sorted(operator.constant().ndim for operator in few) == [1, 3]
    quantized = quantize(odd, policy, [IMAGES])
    assert not quantized.ranges.keys() & {f"{operator.name}.weight" for operator in few}
    assert [layer.name for layer in layers(odd, policy)] == ["linear"]
    now = {operator.name: operator.constant() for operator in products(quantized.graph)}
    found = measure_sensitivity(odd, [precision], [IMAGES])
    if PRECISIONS[precision].floats == "float32":
        assert weight_bits(odd, policy) == weight_bits(odd, alone)
        assert quantized.ranges.keys() == quantize(odd, alone, [IMAGES]).ranges.keys()
        assert all(torch.equal(now[operator.name], operator.constant()) for operator in few)
        assert found.divergence(policy) == found.divergence(alone)
    else:
        assert {(f"{operator.name}.weight", PRECISIONS[precision]) for operator in few} <= found.parts.keys()
    assert list(found.by_layer()) == ["linear"]


@pytest.mark.parametrize("recipe", [Recipe(), *(Recipe(rounding=how) for how in ("moments", "gradients"))])
def test_files_with_a_vector_and_several_matrices_compute_what_is_simulated(
    odd: Graph, recipe: Recipe, compute_file: Callable[[onnx.ModelProto, Tensor], Computed]
) -> None:
    recipe = replace(recipe, rounding_iterations=3, correct_biases=True)
    quantized = quantize(odd, QuantPolicy((("", "w8a8"),)), [IMAGES], recipe=recipe, reduce_range=True)
    got, kinds = compute_file(
        insert_qdq(to_onnx(quantized.graph, dynamic_batch=True), quantized.ranges), IMAGES
    )
    expected = simulate(quantized.graph, quantized.ranges).run(IMAGES).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert kinds["MatMul"] == 2


def test_weight_only_layers_are_scaled_beside_a_vector_and_several_matrices(odd: Graph) -> None:
    policy = QuantPolicy((("", "w4"),))
    plain, scaled = (quantize(odd, policy, [IMAGES], recipe=Recipe(awq=on)) for on in (False, True))
    assert plain.ranges.keys() == scaled.ranges.keys() == {"linear/Gemm.weight"}


@pytest.mark.parametrize("weights", ["minmax", "mse"])
def test_groups_span_their_weights_whatever_channels_do(weights: WeightMethod) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    spanning = stored_range(weight, PRECISIONS["w4"], axis=0)
    found = stored_range(weight, PRECISIONS["w4"], axis=0, weights=weights)
    assert found is not None
    assert spanning is not None
    assert found.equals(spanning)
