from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.models.siblings import linear_siblings


class Attending(nn.Module):
    """Queries of some numbers, keys and values of others, then a gate beside what it lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate, self.up = (nn.Linear(3, 3) for _ in range(5))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        memory = tokens.relu()
        mixed = self.q(tokens) * (self.k(memory) + self.v(memory))
        gated: Tensor = torch.sigmoid(self.gate(mixed)) * self.up(mixed)
        return gated


def test_layers_that_are_given_one_tensor_are_siblings() -> None:
    network = Attending()
    assert linear_siblings(network, 4) == [("k", "v"), ("gate", "up")]
    assert network.training


def test_a_layer_that_runs_twice_is_no_sibling_of_its_own() -> None:
    class Twice(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            rows = images.flatten(1)
            first: Tensor = self[0](rows)
            second: Tensor = self[0](rows)
            return first + second

    assert linear_siblings(Twice(nn.Linear(48, 2)), 4) == []
