from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, Operator, trace
from nestling.quant.awq import awq


class Block(nn.Module):
    """A norm, a gated pair of linear layers over a ReLU, and one behind a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.one = nn.Linear(16, 32)
        self.act = nn.ReLU()
        self.two = nn.Linear(32, 16)
        self.gelu = nn.GELU()
        self.three = nn.Linear(16, 5)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        result = self.three(self.gelu(self.two(self.act(self.one(tokens))))).mean(1)
        assert isinstance(result, Tensor)
        return result


@pytest.fixture(scope="module")
def network() -> Graph:
    """With a few channels that are far larger than the others, as trained transformers have them."""
    torch.manual_seed(0)
    block = Block()
    block.norm.weight.data[[3, 7]] *= 20
    block.one.weight.data[[5, 11]] *= 15
    return trace(nn.Sequential(nn.Conv2d(3, 16, 4, 4), block).eval(), resolution=12)


def in_groups(operator: Operator) -> Tensor | None:
    """The linear layers' weights in groups of 8 with 4 bits."""
    if operator.kind != "Gemm":
        return None
    weight = operator.constant()
    groups = weight.reshape(len(weight), -1, 8)
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() * scale).reshape(weight.shape)


def rounded(graph: Graph) -> Graph:
    weights = [in_groups(operator) for operator in graph.operators]
    return replace(
        graph,
        operators=tuple(
            operator if weight is None else replace(operator, weight=weight)
            for operator, weight in zip(graph.operators, weights, strict=True)
        ),
    )


def test_scaling_changes_no_logit(network: Graph, images: Tensor) -> None:
    scaled = awq(network, images.chunk(4), rounding=in_groups)
    expected = network.run(images)
    assert torch.allclose(scaled.run(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_scaled_weights_lose_less_by_rounding_on_other_images(network: Graph, images: Tensor) -> None:
    seen, unseen = images[:48], images[48:]

    def error(graph: Graph) -> float:
        return float((rounded(graph).run(unseen) - network.run(unseen)).square().mean())

    assert error(awq(network, [seen], rounding=in_groups)) < 0.7 * error(network)


def test_what_cannot_be_scaled_and_what_is_not_rounded_stay(network: Graph, images: Tensor) -> None:
    scaled = awq(network, [images], rounding=in_groups)
    changed = {
        new.layer
        for new, old in zip(scaled.operators, network.operators, strict=True)
        if new.weight is not None and not torch.equal(new.weight, old.constant())
    }
    assert changed == {"1.norm", "1.one", "1.two"}  # behind the GELU, `three` stays as it is
    same = awq(network, [images], rounding=lambda _: None)
    assert same.operators == network.operators


def test_images_are_needed(network: Graph) -> None:
    with pytest.raises(ValueError, match="no calibration images"):
        awq(network, [], rounding=in_groups)
