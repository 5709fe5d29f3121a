"""Sorting channels by importance without changing what a network computes.

Once-for-all (Cai et al. 2020, arXiv 1908.09791) and DepS (Annavajjala et al. 2024, arXiv 2407.06167) sort
the channels of the trained largest network once, so that the leading channels, which smaller networks use,
are the important ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestling.models.channels import ChannelGroup, channel_groups


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


def sort_channels(
    network: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, importance: Orders = by_weight
) -> int:
    """Sorts `network`'s channels by importance, in place; returns how many groups were sorted.

    What the network computes stays the same up to the order of sums. The optimizer's momenta are permuted
    alongside their parameters, so that the next step continues where the last one stopped.

    Args:
        network: whose channels are sorted.
        optimizer: what trains it.
        importance: orders the channels: `by_weight`, or `by_activation(images)`.

    Raises:
        Unsortable: the network's data flow cannot be followed.
    """
    groups = channel_groups(network)
    parameters, state = dict(network.named_parameters()), _state(network)
    orders = importance(network, groups)
    with torch.no_grad():
        for group, order in zip(groups, orders, strict=True):
            for name, axis in group.axes:
                _permute(state[name], order, axis)
                if optimizer is not None and name in parameters:
                    momenta: MutableMapping[str, Any] = optimizer.state.get(parameters[name], {})
                    for value in momenta.values():
                        if isinstance(value, Tensor) and value.shape == state[name].shape:
                            _permute(value, order, axis)
    return len(groups)


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
