"""Entropy and effectiveness against their formulas, and what they say of networks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nestling.models.building import build_shapes
from nestling.models.resnet import build
from nestling.models.zero_cost import Shape, shape
from nestling.space import load_space

SPACES = Path(__file__).parents[3] / "search_spaces"


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def test_the_shape_is_that_of_the_convolutions_in_order() -> None:
    network = small().train()
    first = network[0]
    assert isinstance(first, nn.Conv2d)
    before = first.weight.detach().clone()
    assert shape(network, 8) == Shape(fan_in=(27, 18, 8), channels=(8, 8, 16), side=(8, 4, 4))
    assert network.training
    assert torch.equal(first.weight, before)
    assert not first._forward_hooks


def test_entropy_and_effectiveness_are_deepmads_formulas() -> None:
    told = shape(small(), 8)
    first = (math.log(8) + 2 * math.log(8)) * 0.5 * math.log(27)
    last = (math.log(16) + 2 * math.log(4)) * 0.5 * math.log(27 * 18 * 8)
    assert told.entropy == pytest.approx(first + 8 * last)
    assert told.effectiveness == pytest.approx(3 / (27 * 18 * 8) ** (1 / 3))


def test_the_largest_network_of_a_space_has_more_entropy_than_the_smallest() -> None:
    space = load_space(SPACES / "resnet_cifar.toml").with_constants({"classes": 10})
    scores = [shape(build_shapes(build, arch), 32).entropy for arch in (space.smallest, space.largest)]
    assert scores[0] < scores[1]


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential runs no convolution"):
        shape(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 8)
