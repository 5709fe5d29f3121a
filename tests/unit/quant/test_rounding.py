from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import get_args

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, Unquantizable, insert_qdq, observe, simulate
from nestling.quant.adaround import round_by_gradients
from nestling.quant.calibration import WeightMethod
from nestling.quant.rounding import grid_of, round_by_moments

ALL = QuantPolicy((("", "w8a8"),))


@pytest.fixture(scope="module")
def by_moments(uneven: Graph, coarse: Mapping[str, Range], images: Tensor) -> Graph:
    return round_by_moments(uneven, coarse, [images[:32], images[32:48]])


@pytest.fixture(scope="module")
def small() -> Graph:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4), nn.Hardswish(), nn.Conv2d(6, 6, 2, groups=3),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    return trace(network.eval(), resolution=12)


@pytest.fixture(scope="module")
def four_bits(small: Graph, images: Tensor) -> Mapping[str, Range]:
    return observe(small, QuantPolicy((("", "w4a8"),)), [images])


@pytest.fixture(scope="module")
def by_gradients(small: Graph, four_bits: Mapping[str, Range], images: Tensor) -> Graph:
    return round_by_gradients(small, four_bits, [images[:48]], iterations=40, learning_rate=0.05)


def error(graph: Graph, ranges: Mapping[str, Range], wanted: Tensor, images: Tensor) -> float:
    return float((simulate(graph, ranges).run(images) - wanted).square().mean())


def assert_on_grid(graph: Graph, ranges: Mapping[str, Range], original: Graph, *, most: int) -> None:
    moved = 0
    for operator, old in zip(graph.operators, original.operators, strict=True):
        if operator.weight is None:
            continue
        found = ranges[f"{operator.name}.weight"]
        assert torch.equal(found.nearest(operator.weight), operator.weight)
        integers = found.integers(operator.weight)
        assert -most - 1 <= integers.min() <= integers.max() <= most
        moved += int((integers != found.integers(old.constant())).sum())
        assert operator.bias is old.bias
    assert moved > 0


def test_weights_lie_on_the_grid_and_within_its_ends(
    by_moments: Graph, uneven: Graph, coarse: Mapping[str, Range]
) -> None:
    assert_on_grid(by_moments, coarse, uneven, most=7)


def test_rounding_by_moments_errs_less_than_to_the_nearest_on_other_images(
    by_moments: Graph, uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    unseen = images[48:]
    wanted = uneven.run(unseen)
    assert error(by_moments, coarse, wanted, unseen) < 0.5 * error(uneven, coarse, wanted, unseen)


def test_rounding_by_moments_comes_near_the_best_of_all_roundings() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8)).eval()
    images = (torch.randn(256, 12) @ torch.randn(12, 12)).reshape(256, 3, 2, 2)
    graph = trace(network, resolution=2)
    weight = graph.operators[-1].constant()
    scale = weight.abs().amax(1) / 3
    ranges = {"logits.weight": Range(scale, torch.zeros(8, dtype=torch.int32), "int3", 0)}
    moments = images.flatten(1).T @ images.flatten(1) / 256

    def errors(rounded: Tensor) -> Tensor:
        return (((rounded - weight) @ moments) * (rounded - weight)).sum(-1)

    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)))
    all_of_them = ((weight / scale[:, None]).floor() + ups[:, None]).clamp(-4, 3) * scale[:, None]
    best = errors(all_of_them).amin(0)
    nearest = errors(ranges["logits.weight"].nearest(weight))
    found = errors(round_by_moments(graph, ranges, [images]).operators[-1].constant())
    assert (found <= nearest).all()
    # 0 for rounding to the nearest, 1 for the best of 4096.
    assert (nearest - found).sum() / (nearest - best).sum() > 0.7


@pytest.mark.parametrize("which", ["by_moments", "by_gradients"])
def test_the_file_computes_what_the_simulation_computes(
    which: str, request: pytest.FixtureRequest, images: Tensor
) -> None:
    ranges = request.getfixturevalue({"by_moments": "coarse", "by_gradients": "four_bits"}[which])
    graph = request.getfixturevalue(which)
    model = insert_qdq(to_onnx(graph, dynamic_batch=True), ranges)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, {"images": images.numpy()})[0])
    expected = simulate(graph, ranges).run(images).numpy()
    assert np.median(np.abs(got - expected)) < 1e-5 * np.abs(expected).max()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("weights", get_args(WeightMethod))
def test_seven_bits_stay_seven_bits(uneven: Graph, images: Tensor, weights: WeightMethod) -> None:
    ranges = observe(uneven, ALL, [images], weights=weights, reduce_range=True)
    assert_on_grid(round_by_moments(uneven, ranges, [images]), ranges, uneven, most=63)


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", -128, 127), ("int7", -64, 63), ("int2", -2, 1)])
def test_a_grid_ends_where_its_range_does(dtype: str, low: int, high: int) -> None:
    weight = torch.tensor([[0.9, -4.0, 2.0], [0.1, 0.2, 0.6]])
    zeros = torch.zeros(2, dtype=torch.int32)
    grid = grid_of(Range(torch.tensor([0.5, 0.1]), zeros, dtype, 0), weight)
    assert torch.allclose(grid.step, torch.tensor([[0.5], [0.1]]).expand(2, 3))
    assert (grid.low == low).all()
    assert (grid.high == high).all()


def test_a_grid_is_counted_from_the_zero_point() -> None:
    found = Range(torch.tensor(0.02), torch.tensor(100, dtype=torch.int32), "uint8", None)
    grid = grid_of(found, torch.zeros(2, 3))
    assert (grid.low == -100).all()
    assert (grid.high == 155).all()


def test_inputs_that_are_always_zero_leave_their_weights_to_the_nearest(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 10), nn.Flatten()).eval()
    first = network[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    first.bias.data[2] = -1000
    graph = trace(network, resolution=12)
    ranges = observe(graph, ALL, [images])
    weight = round_by_moments(graph, ranges, [images]).operators[2].constant()
    nearest = ranges["2/Conv.weight"].nearest(graph.operators[2].constant())
    assert torch.equal(weight[:, 2], nearest[:, 2])
    assert not torch.equal(weight, nearest)


def test_a_layer_that_reads_what_is_not_finite_is_named(images: Tensor) -> None:
    first, last = nn.Linear(3 * 12 * 12, 8), nn.Linear(8, 4)
    with torch.no_grad():
        first.weight[2, 5] = torch.inf
    graph = trace(nn.Sequential(nn.Flatten(), first, nn.GELU(), last).eval(), resolution=12)
    ranges = observe(graph, QuantPolicy((("3", "w4"),)), [images])
    with pytest.raises(Unquantizable, match="what layer 3 reads is not finite"):
        round_by_moments(graph, ranges, [images])


def test_learned_rounding_goes_up_or_down_by_less_than_a_step(
    by_gradients: Graph, small: Graph, four_bits: Mapping[str, Range]
) -> None:
    assert_on_grid(by_gradients, four_bits, small, most=7)
    for new, old in zip(by_gradients.operators, small.operators, strict=True):
        if new.weight is not None:
            grid = grid_of(four_bits[f"{new.name}.weight"], old.constant())
            within = old.constant().clamp(grid.low * grid.step, grid.high * grid.step)
            assert ((new.weight - within).abs() < 1.001 * grid.step).all()


def test_learned_rounding_errs_less_than_to_the_nearest_on_other_images(
    by_gradients: Graph, small: Graph, four_bits: Mapping[str, Range], images: Tensor
) -> None:
    unseen = images[48:]
    wanted = small.run(unseen)
    assert error(by_gradients, four_bits, wanted, unseen) < 0.7 * error(small, four_bits, wanted, unseen)


def test_learned_rounding_needs_an_iteration(small: Graph, four_bits: Mapping[str, Range]) -> None:
    with pytest.raises(ValueError, match="0 iterations"):
        round_by_gradients(small, four_bits, [], iterations=0)


def test_the_same_seed_rounds_alike(
    by_moments: Graph, uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    again = round_by_moments(uneven, coarse, [images[:32], images[32:48]])
    for one, other in zip(by_moments.operators, again.operators, strict=True):
        assert one.weight is None or torch.equal(one.constant(), other.constant())
