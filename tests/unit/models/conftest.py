from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from nestling.models.mobilenet import build
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, SearchSpace


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """Three small stages with every kind of block, squeeze-and-excitation and a grouped convolution."""
    rows: list[tuple[str, tuple[int | float | str, ...]]] = [
        ("resolution", (16, 24)),
        ("classes", (5,)),
        ("act", ("hard_swish",)),
        ("head.kind", ("mobilenetv3",)),
        ("stem.width", (8, 16)),
        ("head.width", (32, 64)),
        ("s1.block", ("ds",)),
        ("s1.width", (8, 16)),
        ("s2.block", ("mbconv",)),
        ("s2.width", (16, 24)),
        ("s2.depth", (1, 2, 3)),
        ("s2.kernel", (3, 5, 7)),
        ("s2.expand", (2, 3)),
        ("s2.stride", (2,)),
        ("s2.se", (0.25,)),
        ("s3.block", ("mbconv",)),
        ("s3.width", (24, 32)),
        ("s3.depth", (1, 2)),
        ("s3.b1.kernel", (3, 5)),
        ("s3.b2.kernel", (3, 7)),
        ("s3.groups", (8,)),
        ("s3.expand", (2,)),
        ("s3.stride", (2,)),
        ("s4.block", ("conv",)),
        ("s4.kernel", (1,)),
        ("s4.width", (48,)),
    ]
    return SearchSpace("mobilenet", tuple(Choice(name, values) for name, values in rows))


@pytest.fixture(scope="session")
def archs(space: SearchSpace) -> list[Arch]:
    """Five random archs of the space."""
    rng = random.Random(3)
    return [space.sample(rng) for _ in range(5)]


@pytest.fixture
def supernet(space: SearchSpace) -> Supernet:
    """A supernet whose weights and statistics are all different from one another."""
    torch.manual_seed(0)
    supernet = Supernet(space, build)
    randomize(supernet.largest)
    return supernet


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Six images (6, 3, 24, 24)."""
    return torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def randomize(network: torch.nn.Module) -> None:
    """Gives each norm its own weights and statistics: fresh ones are all alike, and hide a wrong order."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            positive = name.endswith(("running_var", "weight"))
            tensor.uniform_(0.5, 1.5) if positive else tensor.uniform_(-0.5, 0.5)
