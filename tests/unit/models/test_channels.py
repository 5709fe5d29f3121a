from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from nestling.models.channels import ChannelGroup, channel_groups, importance_order, sort_channels
from nestling.models.mobilenet import build
from nestling.space import SearchSpace

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def randomize(network: nn.Module) -> nn.Module:
    """Gives norms and biases values that differ: fresh ones are all alike, and hide a wrong order."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            low, high = (0.5, 1.5) if name.endswith(("running_var", "weight")) else (-0.5, 0.5)
            tensor.uniform_(low, high)
    return network.double()


def small(name: str) -> nn.Module:
    network: nn.Module
    if name == "resnet18":
        block: Any = BasicBlock
        network = ResNet(block, (2, 1, 1, 1), num_classes=5, channels=(8, 12, 16, 24))
    elif name == "vit_tiny_patch16_224":
        network = timm.create_model(name, num_classes=5, img_size=32, depth=2, embed_dim=24, num_heads=3)
    else:
        network = timm.create_model(name, num_classes=5)
    return network


def by_axis(groups: tuple[ChannelGroup, ...]) -> dict[tuple[str, int], ChannelGroup]:
    return {axis: group for group in groups for axis in group.axes}


@pytest.mark.parametrize("name", ["resnet18", "tinynet_e", "vit_tiny_patch16_224"])
def test_sorting_the_channels_of_a_timm_network_leaves_its_output_as_it_was(name: str) -> None:
    network = randomize(small(name))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    network.eval()
    with torch.no_grad():
        before = network(images)
        weights = {k: v.clone() for k, v in network.state_dict().items()}
        groups = sort_channels(network)
        assert groups > 0
        changed = [k for k, v in network.state_dict().items() if not torch.equal(v, weights[k])]
        assert changed
        assert torch.allclose(network(images), before, rtol=1e-9, atol=1e-9)
        network.train()
        training = network(images)
        network.load_state_dict(weights)
        assert torch.allclose(network(images), training, rtol=1e-9, atol=1e-9)


def test_sorting_a_mobilenet_sorts_its_expanded_channels_and_leaves_its_output(space: SearchSpace) -> None:
    network = randomize(build(space.largest)).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = network(images)
        sort_channels(network)
        assert torch.allclose(network(images), before, rtol=1e-9, atol=1e-9)
    assert ("blocks.1.0.conv_pwl.weight", 1) in by_axis(channel_groups(network))


def test_after_sorting_the_importance_of_channels_falls(space: SearchSpace) -> None:
    network = randomize(build(space.largest))
    groups = channel_groups(network)
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}

    def importance(group: ChannelGroup) -> Tensor:
        """Of each channel: the sum of the absolute weights that read it."""
        return sum(
            (state[name].detach().abs().transpose(0, axis).flatten(1).sum(1) for name, axis in group.readers),
            start=torch.zeros(group.size, dtype=torch.float64),
        )

    falls = [bool((importance(group).diff() <= 0).all()) for group in groups]
    assert not any(falls)
    assert sort_channels(network) == len(groups)
    for group in groups:
        assert bool((importance(group).diff() <= 1e-12).all()), group.axes[0]


def test_channels_of_equal_importance_keep_their_order() -> None:
    group = ChannelGroup(3, (("w", 1),), (("w", 1),))
    assert importance_order({"w": torch.tensor([[1.0, 2.0, -1.0]])}, group).tolist() == [1, 0, 2]


def test_a_group_holds_every_axis_that_the_channels_index(space: SearchSpace) -> None:
    group = by_axis(channel_groups(build(space.largest)))["blocks.1.1.conv_pwl.weight", 1]
    assert group.size == 72
    prefix = "blocks.1.1."
    norms = [f"{bn}.{t}" for bn in ("bn1", "bn2") for t in ("weight", "bias", "running_mean", "running_var")]
    expected = {(prefix + name, 0) for name in ("conv_pw.weight", "conv_dw.weight", *norms)}
    expected |= {(prefix + "se.conv_reduce.weight", 1), (prefix + "conv_pwl.weight", 1)}
    expected |= {(prefix + "se.conv_expand.weight", 0), (prefix + "se.conv_expand.bias", 0)}
    assert set(group.axes) == expected
    assert set(group.readers) == {(prefix + "se.conv_reduce.weight", 1), (prefix + "conv_pwl.weight", 1)}


def test_residual_connections_put_a_whole_stage_in_one_group(space: SearchSpace) -> None:
    group = by_axis(channel_groups(build(space.largest)))["blocks.1.2.conv_pwl.weight", 0]
    for block in range(3):
        assert (f"blocks.1.{block}.conv_pwl.weight", 0) in group.axes
    assert ("blocks.2.0.conv_pw.weight", 1) in group.readers


def test_input_output_and_grouped_convolutions_keep_their_order(space: SearchSpace) -> None:
    found = by_axis(channel_groups(build(space.largest)))
    for axis in (
        ("conv_stem.weight", 1),
        ("classifier.weight", 0),
        ("classifier.bias", 0),
        ("blocks.2.0.conv_dw.weight", 0),
        ("blocks.2.0.conv_pwl.weight", 1),
    ):
        assert axis not in found


class Layout(nn.Module):
    """Layers whose sizes agree by chance, though they read different axes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 1)
        self.row = nn.Linear(4, 4)
        self.other_row = nn.Linear(4, 4)
        self.second = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.first(images)  # (N, 4, 4, 4)
        if self.kind == "linear reads columns":
            maps = self.second(self.row(maps))
        elif self.kind == "a vector is spread over rows":
            maps = self.second(maps * maps.mean((2, 3)))
        elif self.kind == "a norm reads tokens":
            maps = self.other_row(self.norm(self.row(maps[:, 0])))
        elif self.kind == "a layer runs twice":
            maps = self.second(self.second(maps))
        elif self.kind == "a flattened map":
            maps = maps.flatten(1)[:, :4] + self.row(maps.flatten(1)[:, :4])
        elif self.kind == "flattened from the third axis":
            maps = self.row(nn.functional.avg_pool2d(maps, 2).flatten(2))
        return maps.flatten(1).sum(1)


@pytest.mark.parametrize(
    "kind",
    [
        "linear reads columns",
        "a vector is spread over rows",
        "a norm reads tokens",
        "a layer runs twice",
        "a flattened map",
        "flattened from the third axis",
    ],
)
def test_sorting_is_right_or_left_out_where_axes_agree_by_chance(kind: str) -> None:
    network = randomize(Layout(kind)).eval()
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        before = network(images)
        sort_channels(network)
        assert torch.allclose(network(images), before, rtol=1e-9, atol=1e-9)


def test_layers_that_share_a_weight_are_sorted_as_one() -> None:
    network = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()
    )
    network.append(nn.Linear(8, 2))
    first, second = network[2], network[4]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    second.weight = first.weight
    randomize(network)
    inputs = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        before = network(inputs)
        sort_channels(network)
        assert torch.allclose(network(inputs), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda n: torch.optim.RMSprop(n.parameters(), lr=0.01, alpha=0.9, eps=0.03, momentum=0.9),
        lambda n: torch.optim.AdamW(n.parameters(), lr=0.01),
    ],
    ids=["sgd", "rmsprop", "adamw"],
)
def test_a_step_after_sorting_is_the_sorted_step(space: SearchSpace, make: Optimizer) -> None:
    sorted_first = randomize(build(space.smallest)).train()
    stepped_first = copy.deepcopy(sorted_first)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.autograd.backward((network(images).log_softmax(1) * weights).sum())
        optimizer.step()

    one, other = make(sorted_first), make(stepped_first)
    for _ in range(2):
        step(sorted_first, one)
        step(stepped_first, other)
    groups = channel_groups(sorted_first)
    state = {**dict(sorted_first.named_parameters()), **dict(sorted_first.named_buffers())}
    orders = [importance_order(state, group) for group in groups]
    sort_channels(sorted_first, one)
    step(sorted_first, one)

    step(stepped_first, other)
    expected = stepped_first.state_dict()
    for group, order in zip(groups, orders, strict=True):
        for name, axis in group.axes:
            expected[name].copy_(expected[name].index_select(axis, order))
    for name, tensor in sorted_first.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-7, atol=1e-9), name
