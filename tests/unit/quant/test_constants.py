from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, Recipe, observe, quantize
from nestling.quant.calibration import WeightMethod
from nestling.quant.constants import stored_range, stored_weight
from nestling.quant.sensitivity import measure_sensitivity


class Stack(nn.Module):
    """A linear layer, and a product with a stack of three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 8, 40))
        self.linear = nn.Linear(40, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images @ self.matrices).mean((1, 2))
        return logits


@pytest.fixture(scope="module")
def stack() -> Graph:
    torch.manual_seed(0)
    return trace(Stack().eval(), resolution=8)


def test_a_stack_of_matrices_stays_floats_in_groups_wherever_it_is_asked_for(stack: Graph) -> None:
    policy, images = QuantPolicy((("", "w4"),)), torch.randn(4, 3, 8, 8)
    (product,) = [o for o in stack.operators if o.weight is not None and o.constant().ndim == 3]
    weight = product.constant().detach()
    assert stored_range(weight, PRECISIONS["w4"], axis=1) is None
    assert torch.equal(stored_weight(weight, PRECISIONS["w4"], axis=1), weight)
    assert f"{product.name}.weight" not in observe(stack, policy, [])
    found = measure_sensitivity(stack, ["w4"], [images])
    assert not found.parts[f"{product.name}.weight", PRECISIONS["w4"]].any()
    plain, scaled = (quantize(stack, policy, [images], recipe=Recipe(awq=on)) for on in (False, True))
    assert plain.ranges.keys() == scaled.ranges.keys()


@pytest.mark.parametrize("weights", ["minmax", "mse"])
def test_groups_span_their_weights_whatever_channels_do(weights: WeightMethod) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    spanning = stored_range(weight, PRECISIONS["w4"], axis=0)
    found = stored_range(weight, PRECISIONS["w4"], axis=0, weights=weights)
    assert found is not None
    assert spanning is not None
    assert found.equals(spanning)
