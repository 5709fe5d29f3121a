from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import QuantPolicy, observe, simulate
from nestling.quant.equalization import equalize
from nestling.quant.scaling import by_input, joints

ALL = QuantPolicy((("", "w8a8"),))


@pytest.fixture(scope="module")
def equalized(uneven: Graph) -> Graph:
    return equalize(uneven)


def test_equalizing_changes_no_logit(uneven: Graph, equalized: Graph, images: Tensor) -> None:
    expected = uneven.run(images)
    assert torch.allclose(equalized.run(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_writes_a_channel_and_what_reads_it_become_equal(equalized: Graph, uneven: Graph) -> None:
    def apart(graph: Graph) -> float:
        operators = {operator.name: operator for operator in graph.operators}
        worst = 1.0
        for joint in joints(graph):
            writer, (reader,) = operators[joint.writer], (operators[name] for name in joint.readers)
            ratios = writer.constant().flatten(1).abs().amax(1) / by_input(reader).abs().amax(1)
            assert writer.bias is not None
            # A channel whose bias is as large as the layer's largest is held by that.
            free = writer.bias.abs() < 0.999 * writer.bias.abs().max()
            worst = max(worst, *(max(float(ratio), 1 / float(ratio)) for ratio in ratios[free]))
        return worst

    assert apart(uneven) > 20
    for old, new in zip(uneven.operators[:-1], equalized.operators, strict=False):
        if old.bias is not None:
            assert new.bias is not None
            assert new.bias.abs().max() <= 1.00001 * old.bias.abs().max()
    assert apart(equalized) < apart(uneven) / 4


def test_an_equalized_network_loses_less_in_eight_bits(
    uneven: Graph, equalized: Graph, images: Tensor
) -> None:
    def error(graph: Graph) -> float:
        got = simulate(graph, observe(graph, ALL, [images])).run(images)
        return float((got - uneven.run(images)).square().mean())

    assert error(equalized) < error(uneven) / 2


def test_a_channel_without_weights_keeps_its_size(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 10), nn.Flatten()).eval()
    first, last = network[0], network[2]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    first.weight.data[1] = 0
    last.weight.data[:, 2] = 0
    graph = trace(network, resolution=12)
    after = equalize(graph)
    for old, new in zip(graph.operators, after.operators, strict=True):
        assert new.weight is None or bool(new.weight.isfinite().all())
        assert (old.bias is None) == (new.bias is None)
    assert torch.equal(after.operators[0].constant()[2], first.weight[2])
    old_bias, new_bias = graph.operators[0].bias, after.operators[0].bias
    assert old_bias is not None
    assert new_bias is not None
    assert torch.equal(new_bias[1:3], old_bias[1:3])
    assert torch.allclose(after.run(images), graph.run(images), atol=1e-5)


def test_equalizing_leaves_other_types_of_numbers_as_they_are(uneven: Graph, images: Tensor) -> None:
    doubled = replace(
        uneven,
        operators=tuple(
            replace(
                operator,
                weight=None if operator.weight is None else operator.weight.double(),
                bias=None if operator.bias is None else operator.bias.double(),
            )
            for operator in uneven.operators
        ),
    )
    assert equalize(doubled).run(images.double()).dtype == torch.float64
