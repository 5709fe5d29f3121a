from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from nestling.models.building import build_shapes
from nestling.models.mobilenet import build
from nestling.space import Arch, SearchSpace


def initialised(layer: nn.Module) -> bool:
    """Whether building `layer` drew random weights: two of the same seed are alike, and not zero."""
    weight = layer.get_parameter("weight")
    return bool(weight.abs().sum() > 0) and float(weight.detach().std()) > 0.01


def fresh() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def test_shapes_are_those_of_the_network_and_take_no_memory(space: SearchSpace) -> None:
    shapes = build_shapes(build, space.largest).state_dict()
    real = build(space.largest).state_dict()
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in real.items()}
    assert all(tensor.is_meta for tensor in shapes.values())


def test_layers_are_initialised_again_after_shapes_were_built(space: SearchSpace) -> None:
    before = fresh().weight
    build_shapes(build, space.smallest)
    assert torch.equal(fresh().weight, before)


def test_no_initialiser_runs_while_shapes_are_built(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: ran.append(layer))
    monkeypatch.setattr(nn.modules.conv._ConvNd, "reset_parameters", lambda layer: ran.append(layer))
    build_shapes(build, space.smallest)
    assert ran == []
    fresh()
    assert len(ran) == 1


def test_layers_are_initialised_again_after_a_build_that_failed(space: SearchSpace) -> None:
    before = fresh().weight

    def failing(_: Arch) -> nn.Module:
        raise RuntimeError("no such network")

    with pytest.raises(RuntimeError, match="no such network"):
        build_shapes(failing, space.smallest)
    assert torch.equal(fresh().weight, before)


def test_another_thread_initialises_its_network_while_shapes_are_built(space: SearchSpace) -> None:
    made: list[nn.Linear] = []

    def slow(_: Arch) -> nn.Module:
        thread = threading.Thread(target=lambda: made.append(nn.Linear(64, 64)))
        thread.start()
        thread.join()
        return nn.Linear(2, 2)

    nn.init.zeros_(fresh().weight)  # what uninitialised memory would most likely hold
    build_shapes(slow, space.smallest)
    assert initialised(made[0])
    assert float(made[0].weight.detach().abs().max()) <= 1 / 8


def test_a_build_may_build_shapes_itself(space: SearchSpace) -> None:
    def nested(arch: Arch) -> nn.Module:
        return build_shapes(build, arch)

    assert build_shapes(nested, space.smallest).get_parameter("conv_stem.weight").is_meta
