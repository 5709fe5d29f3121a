from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from nestling.models.channels import ChannelGroup, channel_groups
from nestling.models.mobilenet import build
from nestling.models.sorting import by_activation, importance_order, shapes_within, sort_channels
from nestling.models.supernet import Supernet
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


def test_subnets_that_are_trained_already_compute_the_same_after_sorting(space: SearchSpace) -> None:
    part = space.only({**{c.name: c.values[-1:] for c in space.open_choices}, "s2.width": (16, 24)})
    supernet = Supernet(space, build, largest=randomize(build(space.largest))).eval()
    resolution = space.largest.integer("resolution")
    images = torch.randn(2, 3, resolution, resolution, dtype=torch.float64)
    trained = [part.smallest, *(part.sample(random.Random(seed)) for seed in range(5))]
    smaller = space.smallest
    with torch.no_grad():
        before = [supernet(images, arch) for arch in (*trained, smaller)]
        sort_channels(supernet.largest, nested=shapes_within(build, part))
        *after, of_smaller = [supernet(images, arch) for arch in (*trained, smaller)]
    for was, now in zip(before, after, strict=False):
        assert torch.allclose(was, now, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[-1], of_smaller)  # it has better channels now


def test_channels_of_equal_importance_keep_their_order() -> None:
    group = ChannelGroup(3, (("w", 1),), (("w", 1),))
    assert importance_order({"w": torch.tensor([[1.0, 2.0, -1.0]])}, group).tolist() == [1, 0, 2]


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


class Gated(nn.Module):
    """Four channels of which the weights say one order and the activations another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.1, 3.0, 1.0, 2.0]))
            self.norm.bias.zero_()
            self.second.weight.copy_(
                torch.tensor([4.0, 1.0, 2.0, 3.0]).reshape(1, 4, 1, 1).expand(2, 4, 1, 1)
            )

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.second(self.norm(self.first(images)).relu())
        return maps.mean((2, 3))


def test_channels_sorted_by_activation_fall_by_what_the_next_layer_reads() -> None:
    network = Gated()
    images = torch.randn(8, 3, 4, 4)
    sort_channels(network, importance=by_activation(images))
    assert network.norm.weight.tolist() == pytest.approx([3.0, 2.0, 1.0, 0.1])
    sort_channels(network)
    assert network.norm.weight.tolist() == pytest.approx([0.1, 2.0, 1.0, 3.0])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_sorting_by_activation_leaves_the_output_of_a_timm_network_as_it_was(name: str) -> None:
    network = randomize(small(name)).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = network(images)
        weights = {k: v.clone() for k, v in network.state_dict().items()}
        assert sort_channels(network, importance=by_activation(images)) == len(channel_groups(network))
        assert any(not torch.equal(v, weights[k]) for k, v in network.state_dict().items())
        assert torch.allclose(network(images), before, rtol=1e-9, atol=1e-9)


def test_looking_at_activations_leaves_statistics_modes_and_hooks_as_they_were() -> None:
    network = Gated()
    network.norm.eval()
    state = copy.deepcopy(network.state_dict())
    orders = by_activation(torch.randn(8, 3, 4, 4))(network, channel_groups(network))
    assert len(orders) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert (network.training, network.first.training, network.norm.training) == (True, True, False)
    assert not network.first._forward_pre_hooks


def test_activations_are_normalized_by_the_images_own_statistics() -> None:
    network = Gated()
    images = torch.randn(8, 3, 4, 4)
    groups = channel_groups(network)
    order = by_activation(images)(network, groups)[0]
    with torch.no_grad():
        # statistics of another data set: in a supernet those of the largest network are stale
        assert network.norm.running_mean is not None
        network.norm.running_mean.copy_(torch.tensor([-100.0, 100.0, 100.0, 100.0]))
    assert torch.equal(by_activation(images)(network, groups)[0], order)


def test_what_several_layers_read_of_a_channel_is_added() -> None:
    first, second, third = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.5, 0]]).reshape(2, 3, 1, 1))

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = first, second, third

        def forward(self, images: Tensor) -> Tensor:
            maps = self.first(images)
            # the second reads more of channel 1, both together more of channel 0
            read: Tensor = self.second(maps) + self.third(maps.relu())
            return read.mean((2, 3))

    images = torch.tensor([2.0, -2.0, 0.0]).reshape(1, 3, 1, 1).repeat(2, 1, 1, 1)
    network = Split()
    group = by_axis(channel_groups(network))["first.weight", 0]
    assert by_activation(images)(network, [group])[0].tolist() == [0, 1]
    alone = ChannelGroup(group.size, group.axes, (("second.weight", 1),))
    assert by_activation(images)(network, [alone])[0].tolist() == [1, 0]


class Repeated(nn.Module):
    """Two residual layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16)
        self.third.weight = self.second.weight
        self.head = nn.Linear(16, 2)

    def stages(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = self.first(rows)
        two = one + self.second(one)
        return one, two, two + self.third(two)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(rows)[2])
        return logits


def test_both_layers_that_share_a_weight_count() -> None:
    torch.manual_seed(0)
    network, rows = Repeated(), torch.randn(5, 4)
    group = by_axis(channel_groups(network))["second.weight", 1]
    with torch.no_grad():
        means = [read.abs().mean(0) for read in network.stages(rows)]
    order = by_activation(rows)(network, [group])[0]
    assert order.tolist() == torch.argsort(means[0] + means[1] + means[2], descending=True).tolist()
    assert order.tolist() != torch.argsort(means[1] + means[2], descending=True).tolist()
