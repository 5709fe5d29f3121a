from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, Range, halve, insert_qdq, observe, place, simulate
from nestling.quant.fake import rounded
from nestling.quant.learning import LearnedGraph, Learning, Scales

Compute = Callable[[onnx.ModelProto, Tensor], tuple[np.ndarray, Mapping[str, int]]]


def policy(precision: str) -> QuantPolicy:
    return QuantPolicy((("", precision),))


def learned(
    graph: Graph,
    images: Tensor,
    precision: str | QuantPolicy,
    *,
    scales: Scales = "learned",
    margin: float | None = None,
    reduce_range: bool = False,
) -> LearnedGraph:
    mix = policy(precision) if isinstance(precision, str) else precision
    exact = halve(graph, mix)
    ranges = observe(place(exact, mix), mix, [images], reduce_range=reduce_range)
    how = Learning(mix, scales=scales, margin=margin, reduce_range=reduce_range)
    return LearnedGraph(exact, ranges, how)


def train(network: LearnedGraph, images: Tensor, *, steps: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(network(images[:16]), torch.arange(16) % 5)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@torch.no_grad()
def in_floats(graph: Graph, ranges: Mapping[str, Range], images: Tensor) -> Tensor:
    """The logits with every constant and tensor rounded, and what lies between computed on floats."""
    operators = tuple(rounded(operator, ranges) for operator in graph.operators)

    def nearest(name: str, tensor: Tensor) -> Tensor:
        return ranges[name].nearest(tensor) if name in ranges else tensor

    return replace(graph, operators=operators).run(images, after=nearest)


def settled_logits(network: LearnedGraph, images: Tensor) -> Tensor:
    """What the settled network gives; on integers that is the same but for ties."""
    settled = network.settled()
    floats = in_floats(settled.graph, settled.ranges, images)
    integers = simulate(settled.graph, settled.ranges).run(images)
    steps = (floats - integers).abs() / (floats.max() - floats.min())
    assert float(steps.median()) < 0.01
    assert float(steps.max()) < 0.1
    return floats


@pytest.mark.parametrize(
    ("precision", "scales"),
    [
        ("w8a8", "learned"),
        ("w8a8-tensor", "learned"),
        ("w4a4", "learned"),
        ("w4a4", "statistical"),
        ("w8a8", "statistical"),
        ("w4", "learned"),
        ("w4", "statistical"),
        ("ternary", "learned"),
        ("fp4", "learned"),
        ("bf16", "learned"),
    ],
)
def test_what_is_trained_is_what_is_written_but_for_ties(
    precision: str, scales: Scales, graph: Graph, images: Tensor
) -> None:
    network = learned(graph, images, precision, scales=scales)
    train(network, images, steps=2)
    assert torch.equal(network(images), settled_logits(network, images))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


class Beside(nn.Module):
    """A layer whose maps two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.on_integers, self.stored = nn.Linear(400, 9), nn.Linear(400, 9)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).relu().flatten(1)
        logits: Tensor = self.on_integers(maps) + self.stored(maps)
        return logits


@pytest.mark.parametrize("scales", ["learned", "statistical"])
@pytest.mark.parametrize("stored", ["w4", "w8"])
def test_weights_in_groups_learn_beside_a_layer_that_reads_the_same_in_integers(
    stored: str, scales: Scales, images: Tensor
) -> None:
    mix = QuantPolicy((("", "w8a8"), ("stored", stored)))
    network = learned(trace(Beside().eval(), resolution=12), images, mix, scales=scales)
    train(network, images, steps=2)
    assert torch.equal(network(images), settled_logits(network, images))
    settled = network.settled()
    (layer,) = [operator for operator in settled.graph.operators if operator.layer == "stored"]
    assert layer.inputs[0] in settled.ranges
    assert settled.ranges[f"{layer.name}.weight"].block is not None
    assert f"{layer.name}.bias" not in settled.ranges


def test_learned_scales_begin_where_they_were_observed(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, policy("w4a4"), [images])
    network = LearnedGraph(graph, ranges, Learning(policy("w4a4")))
    assert torch.equal(network(images), in_floats(graph, ranges, images))
    settled = network.settled().ranges
    assert settled.keys() == ranges.keys()
    for name, found in settled.items():
        assert torch.equal(found.scale, ranges[name].scale), name


def test_training_in_few_bits_beats_rounding_afterwards(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w3a3")
    exact = graph.run(images[:16])

    def error() -> Tensor:
        return F.mse_loss(network(images[:16]), exact)

    before = error().item()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(7):
        optimizer.zero_grad()
        torch.autograd.backward(error())
        optimizer.step()
    assert error().item() < 0.7 * before


def test_the_file_computes_what_was_trained(graph: Graph, images: Tensor, compute_file: Compute) -> None:
    network = learned(graph, images, "w8a8")
    train(network, images, steps=2)
    settled = network.settled()
    logits, used = compute_file(insert_qdq(to_onnx(settled.graph), settled.ranges), images[:1])
    expected = simulate(settled.graph, settled.ranges).run(images[:1]).numpy()
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()
    assert used["QLinearConv"] > 0
    assert used["Conv"] == 0


def test_what_moves_numbers_keeps_their_range(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, policy("w8a8"), [images])
    network = learned(graph, images, "w8a8")
    train(network, images, steps=3)
    settled = network.settled().ranges
    movers = [o for o in graph.operators if o.kind in ("MaxPool", "Flatten") and o.name in ranges]
    assert movers
    for operator in movers:
        assert torch.equal(settled[operator.name].scale, settled[operator.inputs[0]].scale)
        assert not torch.equal(settled[operator.name].scale, ranges[operator.name].scale)


def test_sums_with_one_scale_keep_it(graph: Graph, images: Tensor) -> None:
    ranges = observe(graph, policy("w8a8"), [images], shared=["Add"])
    network = LearnedGraph(graph, ranges, Learning(policy("w8a8")))
    train(network, images, steps=3)
    settled = network.settled().ranges
    sums = [o for o in graph.operators if o.kind == "Add" and len(o.inputs) == 2]
    assert sums
    for operator in sums:
        one, other = (settled[name].scale for name in operator.inputs)
        assert torch.equal(one, other)


def test_the_scale_of_a_bias_is_that_of_its_products(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w8a8")
    train(network, images, steps=3)
    settled = network.settled()
    for operator in settled.graph.operators:
        bias = settled.ranges.get(f"{operator.name}.bias")
        if bias is not None:
            of_weight = settled.ranges[f"{operator.name}.weight"].scale
            assert torch.equal(bias.scale, of_weight * settled.ranges[operator.inputs[0]].scale)


def test_large_biases_keep_to_32_bits(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w8a8")
    with torch.no_grad():
        network.get_parameter("head/Conv:bias").fill_(1e9)
        network.get_parameter("head/Conv:weight:scale").fill_(1e-6)
    settled = network.settled()
    (bias,) = [operator.bias for operator in settled.graph.operators if operator.name == "head/Conv"]
    assert bias is not None
    assert torch.allclose(settled.ranges["head/Conv.bias"].nearest(bias), bias, rtol=1e-6)
    assert torch.equal(network(images), settled_logits(network, images))


def test_seven_bits_are_kept_where_products_saturate(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w8a8", reduce_range=True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(":weight"):
                parameter.mul_(1.5)  # beyond 63 integers of scales that stay
    settled = network.settled()
    assert torch.equal(network(images), settled_logits(network, images))
    for operator in settled.graph.operators:
        found = settled.ranges.get(f"{operator.name}.weight")
        if found is not None:
            assert found.stored == "int8"
            integers = found.integers(operator.constant())
            assert integers.max() == 63
            assert integers.min() >= -64


def test_a_scale_stays_above_zero(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w8a8")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(":scale"):
                parameter.fill_(-1.0)
    assert bool(network(images).isfinite().all())
    assert all(bool((found.scale > 0).all()) for found in network.settled().ranges.values())
    before = {n: p.detach().clone() for n, p in network.named_parameters() if n.endswith(":scale")}
    train(network, images, steps=1)
    parameters = dict(network.named_parameters())
    assert any(not torch.equal(parameters[name], old) for name, old in before.items())


def test_scales_of_8_bits_that_follow_from_weights_do_as_weights_says() -> None:
    layer, generator = nn.Conv2d(3, 2, 40), torch.Generator().manual_seed(0)
    with torch.no_grad():  # many are near zero
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    graph = trace(nn.Sequential(layer, nn.Flatten()).eval(), resolution=40)
    images = torch.randn(2, 3, 40, 40, generator=generator)
    ranges = observe(graph, policy("w8a8"), [images], weights="mse")
    how = Learning(policy("w8a8"), scales="statistical", weights="mse")
    settled = LearnedGraph(graph, ranges, how).settled().ranges
    for name, found in ranges.items():
        assert torch.equal(settled[name].scale, found.scale), name
    spanning = LearnedGraph(graph, ranges, replace(how, weights="minmax")).settled().ranges
    assert any(not torch.equal(spanning[name].scale, found.scale) for name, found in ranges.items())


def test_with_a_margin_sure_weights_stay(graph: Graph, images: Tensor) -> None:
    network = learned(graph, images, "w4a4", scales="statistical", margin=0.02)
    train(network, images, steps=1)
    gradient = network.get_parameter("head/Conv:weight").grad
    assert gradient is not None
    assert 0 < (gradient != 0).float().mean() < 0.2


class Scaled(nn.Module):
    """A layer, and a product with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 12)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 0.5 * self.layer(images).flatten(1)
        return logits


def test_constants_that_are_no_weights_stay(images: Tensor) -> None:
    graph = trace(Scaled().eval(), resolution=12)
    (product,) = [operator for operator in graph.operators if operator.kind == "Mul"]
    assert product.weight is not None
    network = learned(graph, images, "w8a8")
    named = {name.split(":")[0] for name, _ in network.named_parameters() if not name.endswith(":scale")}
    assert named == {"layer/Conv"}


def test_a_margin_without_statistics_or_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="goes with statistical"):
        Learning(policy("w4a4"), margin=0.1)
    with pytest.raises(ValueError, match="above 0 and at most"):
        Learning(policy("w4a4"), scales="statistical", margin=0.0)


def test_numbers_that_are_not_finite_are_no_parameters(graph: Graph) -> None:
    first, *others = graph.operators
    table = replace(first, bias=torch.full_like(first.bias, torch.inf) if first.bias is not None else None)
    ranges: dict[str, Range] = {}
    network = LearnedGraph(replace(graph, operators=(table, *others)), ranges, Learning(QuantPolicy()))
    names = {name for name, _ in network.named_parameters()}
    assert f"{first.name}:weight".replace(".", ":") in names
    assert f"{first.name}:bias".replace(".", ":") not in names
