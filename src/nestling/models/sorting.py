"""Sorting channels by importance without changing what a network computes.

Once-for-all (Cai et al. 2020, arXiv 1908.09791) and DepS (Annavajjala et al. 2024, arXiv 2407.06167) sort
the channels of the trained largest network once, so that the leading channels, which smaller networks use,
are the important ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestling.models.building import Build, build_shapes
from nestling.models.channels import ChannelGroup, channel_groups
from nestling.space import SearchSpace


def importance_order(state: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """The group's channels from most to least important: by the L1 norm of the weights that read them."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in group.readers:
        weight = state[name].detach()
        total += weight.abs().double().sum(dim=[a for a in range(weight.ndim) if a != axis]).cpu()
    return torch.argsort(total, descending=True, stable=True)


Orders = Callable[[nn.Module, Sequence[ChannelGroup]], list[Tensor]]
"""Gives for each group of a network its channels from most to least important."""


def by_weight(network: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Each group's channels by the L1 norm of the weights that read them."""
    state = _state(network)
    return [importance_order(state, group) for group in groups]


def by_activation(images: Tensor) -> Orders:
    """Orders channels by their mean absolute value for `images` (N, 3, H, W), where a layer reads them.

    That is behind norm and activation: before a norm, which rescales it, a channel's size means nothing
    (network trimming, Hu et al. 2016, arXiv 1607.03250, looks behind the activation too). Where several
    layers read a channel, the means are added. Batch normalization takes the images' own statistics, as in
    a supernet, and keeps what it has seen as it was.
    """

    def orders(network: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
        means = _mean_reads(network, images)
        first_names = {id(tensor): name for name, tensor in network.named_parameters()}
        by_weight_name = {first_names[weight]: mean for weight, mean in means.items()}
        return [
            torch.argsort(
                sum(
                    (by_weight_name[name] for name, _ in group.readers if name in by_weight_name),
                    start=torch.zeros(group.size, dtype=torch.float64),
                ),
                descending=True,
                stable=True,
            )
            for group in groups
        ]

    return orders


Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a network, by name."""

_RANDOM_ARCHS = 64


def shapes_within(build: Build, part: SearchSpace) -> list[Shapes]:
    """The shapes of networks in which every width that `part` opens occurs.

    They are its smallest and largest network with each value of each choice, and random ones, in which widths
    occur that depend on several choices.
    """
    ends = (part.smallest, part.largest)
    drawn = [
        part.canonical({**end, choice.name: value})
        for end in ends
        for choice in part.open_choices
        for value in choice.values
    ]
    rng = random.Random("widths")
    drawn += [part.sample(rng) for _ in range(_RANDOM_ARCHS if part.open_choices else 0)]
    found = [_state(build_shapes(build, arch)) for arch in dict.fromkeys((*ends, *drawn))]
    return [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in found]


def sort_channels(
    network: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    importance: Orders = by_weight,
    nested: Sequence[Shapes] = (),
) -> int:
    """Sorts `network`'s channels by importance, in place; returns how many groups were sorted.

    What the network computes stays the same up to the order of sums. The optimizer's momenta are permuted
    alongside their parameters, so that the next step continues where the last one stopped.

    Args:
        network: whose channels are sorted.
        optimizer: what trains it.
        importance: orders the channels: `by_weight`, or `by_activation(images)`.
        nested: the shapes of subnets that keep what they compute: the leading channels that one of them has
            stay the leading ones, sorted among themselves.

    Raises:
        Unsortable: the network's data flow cannot be followed.
    """
    groups = channel_groups(network)
    parameters, state = dict(network.named_parameters()), _state(network)
    orders = importance(network, groups)
    with torch.no_grad():
        for group, order in zip(groups, orders, strict=True):
            order = _within_bands(order, _widths(group, state, nested))
            for name, axis in group.axes:
                _permute(state[name], order, axis)
                if optimizer is not None and name in parameters:
                    momenta: MutableMapping[str, Any] = optimizer.state.get(parameters[name], {})
                    for value in momenta.values():
                        if isinstance(value, Tensor) and value.shape == state[name].shape:
                            _permute(value, order, axis)
    return len(groups)


def _widths(group: ChannelGroup, state: Mapping[str, Tensor], nested: Sequence[Shapes]) -> list[int]:
    """How many of the group's channels the nested networks have, in ascending order."""
    axes = [(name, axis) for name, axis in group.axes if state[name].shape[axis] == group.size]
    found = {shapes[name][axis] for shapes in nested for name, axis in axes if name in shapes}
    return sorted(found - {group.size})


def _within_bands(order: Tensor, widths: Sequence[int]) -> Tensor:
    """`order` (channels,) with the channels of a band, between two widths, together; the first band first."""
    bands = torch.bucketize(order, torch.tensor(widths, dtype=order.dtype), right=True)
    return order[torch.argsort(bands, stable=True)]


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _mean_reads(network: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """By the identity of a layer's weight, the mean absolute value of each channel that the layer reads."""
    means: dict[int, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read = inputs[0].detach().abs().float()
        axis = 1 if isinstance(layer, nn.Conv2d) else read.ndim - 1
        mean = read.mean(dim=[a for a in range(read.ndim) if a != axis]).double().cpu()
        weight = id(layer._parameters["weight"])
        means[weight] = means[weight] + mean if weight in means else mean

    layers = [
        m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and "weight" in m._parameters
    ]
    training = {module: module.training for module in network.modules()}
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = True
        statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        with torch.no_grad():
            # the copies are updated in place of the network's own statistics
            functional_call(network, statistics, (images,))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return means


def _permute(tensor: Tensor, order: Tensor, axis: int) -> None:
    tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))
