from __future__ import annotations

import threading
from typing import Any

import pytest
import timm
import torch
from timm.layers.weight_init import trunc_normal_
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestling.models.building import build_shapes, own_tables
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


TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32},
    "convit_tiny": {"embed_dim": 8, "depth": 2, "local_up_to_layer": 1, "img_size": 32},
    "efficientformerv2_s0": {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "efficientvit_m0": {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (2, 2, 3)},
    "levit_128s": {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4)},
    "resnetblur18": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "img_size": 56},
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "img_size": 64},
    "test_convnext": {},
    "test_maxvit": {},
    "tiny_vit_5m_224": {"embed_dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2)},
    "vit_relpos_small_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32},
}
"""Small ones of the architectures that have tables of their own, and one that has none."""


def plain(name: str) -> nn.Module:
    """The architecture as timm builds it."""
    network: nn.Module = timm.create_model(name, num_classes=3, **TIMM[name])
    return network


@pytest.mark.parametrize("name", sorted(TIMM.keys() - {"test_convnext"}))
def test_tables_are_those_of_a_plain_build(name: str, space: SearchSpace) -> None:
    def build_it(_: Arch) -> nn.Module:
        return plain(name)

    torch.manual_seed(0)
    expected = plain(name)
    in_state = expected.state_dict().keys()
    shapes = build_shapes(build_it, space.smallest)
    found = own_tables(build_it, space.smallest, shapes)
    assert shapes.state_dict().keys() == in_state
    assert found.keys() == {n for n, _ in expected.named_buffers() if n not in in_state}
    assert found
    assert all(torch.equal(table, expected.get_buffer(n)) for n, table in found.items())


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "test_convnext", "levit_128s"])
def test_no_number_is_drawn_for_any_network(name: str, space: SearchSpace) -> None:
    class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            drawn.append(torch.Tag.nondeterministic_seeded in func.tags)
            return func(*args, **(kwargs or {}))

    def build_it(_: Arch) -> nn.Module:
        return plain(name)

    drawn: list[bool] = []
    with Draws():  # type: ignore[no-untyped-call]
        network = build_it(space.smallest)
    assert any(drawn)
    drawn.clear()
    with Draws():  # type: ignore[no-untyped-call]
        shapes = build_shapes(build_it, space.smallest)
        own_tables(build_it, space.smallest, shapes)
    assert drawn
    assert not any(drawn)
    assert len(list(shapes.parameters())) == len(list(network.parameters()))


class Filled(nn.Module):
    """Every way to fill a parameter, and a table of numbers; reads one of them where asked to."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        table = torch.arange(4.0).mul_(2).add_(1)
        table[0] = 7
        self.register_buffer("table", table, persistent=False)
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.tied = self.weight
        trunc_normal_(self.weight, std=0.1)
        nn.init.orthogonal_(self.weight)
        nn.init.trunc_normal_(self.weight)
        nn.init.constant_(tensor=self.bias, val=3.0)
        if reads:
            self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]


def test_tables_are_filled_as_ever_where_parameters_are_not(space: SearchSpace) -> None:
    def build_it(_: Arch) -> nn.Module:
        return Filled()

    found = own_tables(build_it, space.smallest, build_shapes(build_it, space.smallest))
    assert found["table"].tolist() == [7, 3, 5, 7]


def test_a_constructor_that_reads_numbers_gives_shapes_too(space: SearchSpace) -> None:
    network = build_shapes(lambda _: Filled(reads=True), space.smallest)
    weight, bias = network.get_parameter("weight"), network.get_parameter("bias")
    assert all(tensor.is_meta for tensor in (weight, bias, network.get_buffer("table")))
    assert network.get_parameter("tied") is weight
    assert weight.requires_grad
    assert not bias.requires_grad
    assert isinstance(network, Filled)
    assert network.rates == [0, 0.5, 1]


def test_tensors_that_a_build_puts_on_the_cpu_take_no_memory_either(space: SearchSpace) -> None:
    def build_it(_: Arch) -> nn.Module:
        return nn.Linear(3, 4, device="cpu")

    assert all(tensor.is_meta for tensor in build_shapes(build_it, space.smallest).parameters())


def test_building_leaves_the_random_state_as_it_was(space: SearchSpace) -> None:
    def build_it(_: Arch) -> nn.Module:
        network = Filled(reads=True)
        network.noise = nn.Parameter(torch.randn(3))
        return network

    before = torch.get_rng_state()
    own_tables(build_it, space.smallest, build_shapes(build_it, space.smallest))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_tables_is_not_built_again(space: SearchSpace) -> None:
    def refused(_: Arch) -> nn.Module:
        raise AssertionError("built again")

    assert own_tables(refused, space.smallest, build_shapes(build, space.smallest)) == {}


def test_what_build_refuses_is_what_is_raised(space: SearchSpace) -> None:
    built: list[Arch] = []

    def refusing(arch: Arch) -> nn.Module:
        built.append(arch)
        raise ValueError("no such width")

    with pytest.raises(ValueError, match="no such width"):
        build_shapes(refusing, space.smallest)
    assert len(built) == 1
