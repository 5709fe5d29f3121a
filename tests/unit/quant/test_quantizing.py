from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Recipe, insert_qdq, quantize, simulate

Computed = tuple[NDArray[np.float32], Counter[str]]
MIXED = QuantPolicy((("0", "w8a8"), ("2", "fp16"), ("6", "w4"), ("7", "w4")))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 40), nn.Linear(40, 5)
    )
    return trace(network.eval(), resolution=8)


@pytest.fixture(scope="module")
def batches() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((16, 3, 8, 8), generator=generator) for _ in range(2))


RECIPES = {
    "plain": Recipe(),
    "percentiles": Recipe(calibration="percentile-99.9", weights="mse"),
    "all": Recipe(calibration="mse", equalize=True, awq=True, rounding="moments", correct_biases=True),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_file_of_several_precisions_computes_what_is_simulated(
    graph: Graph,
    batches: tuple[Tensor, ...],
    recipe: Recipe,
    compute_file: Callable[[onnx.ModelProto, Tensor], Computed],
) -> None:
    quantized = quantize(graph, MIXED, batches, recipe=recipe, reduce_range=True)
    model = insert_qdq(to_onnx(quantized.graph), quantized.ranges)
    got, operators = compute_file(model, batches[0][:1])
    expected = simulate(quantized.graph, quantized.ranges).run(batches[0][:1]).numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
    assert {"QLinearConv", "MatMulNBits"} <= {name.rpartition(".")[2] for name in operators}


def test_a_policy_of_floats_changes_nothing(graph: Graph, batches: tuple[Tensor, ...]) -> None:
    found = quantize(graph, QuantPolicy(), batches, recipe=RECIPES["all"])
    assert found.graph is graph
    assert not found.ranges


@pytest.mark.parametrize(
    "changed",
    [
        {"calibration": "percentile-99.9"}, {"equalize": True}, {"awq": True},
        {"rounding": "moments"}, {"correct_biases": True},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_each_part_of_the_recipe_has_an_effect(
    graph: Graph, batches: tuple[Tensor, ...], changed: dict[str, Any]
) -> None:
    policy = QuantPolicy((("", "w8a8"), ("6", "w4"), ("7", "w4")))
    plain, other = (
        quantize(graph, policy, batches, recipe=recipe) for recipe in (Recipe(), Recipe(**changed))
    )
    logits = [simulate(found.graph, found.ranges).run(batches[1]) for found in (plain, other)]
    assert not torch.equal(*logits)


def test_rounding_by_moments_and_corrected_biases_come_nearer_to_the_float_network(
    graph: Graph, batches: tuple[Tensor, ...]
) -> None:
    policy = QuantPolicy((("", "w3a8"),))
    exact = graph.run(torch.cat(batches))

    def error(recipe: Recipe) -> float:
        found = quantize(graph, policy, batches, recipe=recipe)
        return float((simulate(found.graph, found.ranges).run(torch.cat(batches)) - exact).square().mean())

    assert error(Recipe(rounding="moments", correct_biases=True)) < 0.7 * error(Recipe())


def test_kept_statistics_of_another_policy_give_the_same_ranges(
    graph: Graph, batches: tuple[Tensor, ...]
) -> None:
    first, second = QuantPolicy((("0", "w8a8"), ("2", "w8a8"))), QuantPolicy((("2", "w8a8"), ("6", "w8a8")))
    kept = quantize(graph, first, batches).statistics
    fresh, hit = quantize(graph, second, batches), quantize(graph, second, batches, kept=kept)
    assert fresh.ranges.keys() == hit.ranges.keys()
    for name, found in fresh.ranges.items():
        assert torch.equal(found.scale, hit.ranges[name].scale)
        assert torch.equal(found.zero_point, hit.ranges[name].zero_point)
    assert hit.statistics is not None
    assert (
        quantize(graph, first, (), kept=hit.statistics).ranges.keys()
        == quantize(graph, first, batches).ranges.keys()
    )


def test_statistics_of_weights_on_other_codes_are_not_kept(graph: Graph, batches: tuple[Tensor, ...]) -> None:
    exact = QuantPolicy((("0", "w8a8"), ("2", "w8a8")))
    coded = QuantPolicy((("0", "ternary"), ("2", "w8a8")))
    kept = quantize(graph, exact, batches).statistics
    fresh, after = quantize(graph, coded, batches), quantize(graph, coded, batches, kept=kept)
    (read,) = next(operator.inputs for operator in graph.operators if operator.layer == "2")
    assert torch.equal(fresh.ranges[read].scale, after.ranges[read].scale)
    assert not torch.equal(fresh.ranges[read].scale, quantize(graph, exact, batches).ranges[read].scale)
    assert after.statistics is kept
