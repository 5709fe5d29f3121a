from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant.scaling import by_input, joints, rescaled

KINDS = ("Conv", "Gemm", "LayerNormalization")


class Tokens(nn.Module):
    """A norm read by two linear layers, over a reshape and after dropping tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.one = nn.Linear(6, 4)
        self.other = nn.Linear(6, 4)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        result = self.one(tokens).mean(1) + self.other(tokens[:, 0])
        assert isinstance(result, Tensor)
        return result


def sequence(*layers: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace(nn.Sequential(*layers).eval(), resolution=8)


LINKED = {
    "relu": lambda: sequence(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()),
    "nothing": lambda: sequence(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten()),
    "depthwise": lambda: sequence(
        nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 12, 3, groups=6), nn.Flatten()
    ),
    "pools": lambda: sequence(
        nn.Conv2d(3, 6, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 1), nn.Flatten(),
    ),
    "flattened maps": lambda: sequence(nn.Conv2d(3, 6, 7), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)),
    "pixels": lambda: sequence(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    "tokens": lambda: sequence(nn.Conv2d(3, 6, 4, 4), Tokens()),
}  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_scale_that_moves_along_a_joint_changes_no_logit(name: str) -> None:
    graph = LINKED[name]()
    operators = {operator.name: operator for operator in graph.operators}
    (joint,) = joints(graph, writers=KINDS)
    scale = torch.exp(torch.randn(6))
    scaled = operators | rescaled(operators, joint, scale)
    images = torch.randn(4, 3, 8, 8)
    expected = graph.run(images)
    got = replace(graph, operators=tuple(scaled.values())).run(images)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for changed in (joint.writer, *joint.readers):
        assert not torch.equal(scaled[changed].constant(), operators[changed].constant())


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.Hardswish(), nn.GELU(), nn.Sigmoid()])
def test_an_activation_that_tells_sizes_apart_makes_no_joint(between: nn.Module) -> None:
    assert not joints(sequence(nn.Conv2d(3, 6, 3), between, nn.Conv2d(6, 4, 3), nn.Flatten()))


def test_channels_that_something_else_reads_make_no_joint(graph: Graph) -> None:
    # A residual sum reads the stem's; a ReLU6, a h-swish or a product lies behind others.
    assert [(joint.writer, joint.readers) for joint in joints(graph)] == [("head/Conv", ("logits",))]


def test_a_norm_makes_a_joint_only_where_it_is_asked_for() -> None:
    graph = LINKED["tokens"]()
    assert not joints(graph)
    (joint,) = joints(graph, writers=KINDS)
    assert len(joint.readers) == 2


def test_the_weights_of_an_input_are_those_that_it_alone_reaches() -> None:
    graph = sequence(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten())
    operator = graph.operators[1]
    assert operator.kind == "Conv"
    weights = by_input(operator)
    weight = operator.constant()
    assert weights.shape == (6, 2 * 9)
    assert torch.equal(weights[4], weight[2:, 1].flatten())  # group 1, its second input
