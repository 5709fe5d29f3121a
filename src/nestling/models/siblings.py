"""Linear layers that read the same numbers: queries, keys and values; a gate and what it lets through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestling.models.cost import on_meta


def linear_siblings(network: nn.Module, resolution: int) -> list[tuple[str, ...]]:
    """The names of linear layers of `network` that are called with one and the same tensor, group by group.

    Runs the network on the meta device, where nothing is computed, on one image of `resolution` pixels a
    side. Layers that are called with equal tensors that were made one by one are not found.
    """
    calls: list[tuple[Tensor, str]] = []  # the tensors are kept, so that none takes the place of another
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):

            def note(_: nn.Module, given: tuple[Any, ...], *, name: str = name) -> None:
                calls.extend((tensor, name) for tensor in given[:1] if isinstance(tensor, Tensor))

            hooks.append(module.register_forward_pre_hook(note))
    training = network.training
    meta = on_meta(network)
    network.eval()
    try:
        with torch.no_grad():
            image = torch.empty(1, 3, resolution, resolution, device="meta")
            torch.func.functional_call(network, meta, (image,), tie_weights=False)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    groups: dict[int, list[str]] = {}
    for tensor, name in calls:
        groups.setdefault(id(tensor), []).append(name)
    return list(dict.fromkeys(tuple(dict.fromkeys(g)) for g in groups.values() if len(set(g)) > 1))
