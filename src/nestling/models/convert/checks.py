"""Tests of what the dependency graph says, by running: a group that fails one stays whole.

A wrong table of channels would give subnets that run and compute nonsense. Two tests together catch it. In
another order the same channels must give the same logits, to rounding: the table then names every place that
knows these channels. And the network that is cut must run and give logits of the same shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from nestling.models.convert.surgery import Plan, cut_shapes, cut_weights, permuted

TOLERANCE = 1e-8
"""Of logits in 64 bits, as a fraction of the largest one: rounding is about 1e-14."""
Wanted = Mapping[str, int]
Run = Callable[[Wanted], str]
"""Runs the network that is cut as told; why it does not run, or nothing."""


@torch.no_grad()
def refused_by_order(network: nn.Module, plan: Plan, images: Tensor) -> dict[str, str]:
    """The groups whose channels, in another order, change the logits of a `stirred` network, and why."""
    if not plan.groups:
        return {}
    tensors: dict[str, Tensor] = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    expected = network(images)
    scale = float(expected.abs().max())
    if not np.isfinite(scale) or scale == 0:
        return dict.fromkeys(plan.groups, f"it cannot be checked: random weights give logits up to {scale}")
    rng = np.random.default_rng(0)
    orders: dict[str, NDArray[np.int64]] = {
        # a turn by one moves every unit, whatever comes out of the draw
        name: np.roll(rng.permutation(group.units), 1)
        for name, group in plan.groups.items()
    }

    def difference(names: Sequence[str]) -> float:
        moved = permuted(plan, tensors, {name: orders[name] for name in names})
        got = functional_call(network, moved, (images,), tie_weights=False)
        return float((got - expected).abs().max()) / scale

    def search(names: Sequence[str]) -> list[str]:
        """Those that do not pass alone, halving what does not pass together."""
        worst = difference(names)
        if worst <= TOLERANCE:
            return []
        if len(names) == 1:
            return list(names)
        half = len(names) // 2
        found = search(names[:half]) + search(names[half:])
        return found or list(names)

    why = "its channels are mixed in a way that was not followed: another order of them gives other logits"
    return dict.fromkeys(search(list(plan.groups)), why)


def runner(network: nn.Module, plan: Plan, images: Tensor) -> Run:
    """What runs `network` cut by `plan`: on the meta device where that is possible, else with its weights."""
    network = copy.deepcopy(network).eval()
    skeleton = copy.deepcopy(network).to("meta")
    with torch.no_grad():
        wanted = network(images).shape
    on_meta = _error(skeleton, images.to("meta"), wanted) == ""

    def run(arch: Wanted) -> str:
        try:
            if on_meta:
                smaller = cut_shapes(skeleton, plan.surgery(arch))
            else:
                smaller = cut_weights(network, plan, arch)
        except AttributeError as error:
            return f"its surgery fails: {error}"
        return _error(smaller, images.to("meta") if on_meta else images, wanted)

    return run


@torch.no_grad()
def _error(network: nn.Module, images: Tensor, wanted: torch.Size) -> str:
    try:
        logits = network(images)
    except Exception as error:  # whatever the user's network raises is the answer
        return f"the smaller network does not run: {str(error).strip().splitlines()[0][:160]}"
    if logits.shape != wanted:
        return f"the smaller network gives {tuple(logits.shape)}, not {tuple(wanted)}"
    return ""


def refused_by_running(run: Run, smallest: Wanted) -> dict[str, str]:
    """The choices of `smallest` without which everything runs, and why each was left out.

    Every choice is tried alone. Then all that are left are tried together in patterns, such that of any two
    choices each is once small while the other is large.
    """
    refused: dict[str, str] = {}
    for name, value in smallest.items():
        why = run({name: value})
        if why:
            refused[name] = why
    while True:
        left = [name for name in smallest if name not in refused]
        failed = next(
            ((names, why) for names in _patterns(left) if (why := run({n: smallest[n] for n in names}))), None
        )
        if failed is None:
            return refused
        names, why = failed
        refused[_culprit(run, smallest, names)] = f"beside other choices {why}"


def _culprit(run: Run, smallest: Wanted, names: Sequence[str]) -> str:
    """The last of the fewest leading `names` that fail together."""
    low, high = 1, len(names)
    while low < high:
        middle = (low + high) // 2
        if run({name: smallest[name] for name in names[:middle]}):
            high = middle
        else:
            low = middle + 1
    return names[low - 1]


def _patterns(names: Sequence[str]) -> list[list[str]]:
    patterns = [list(names)]
    for bit in range(max(1, (len(names) - 1).bit_length())):
        for value in (0, 1):
            patterns.append([name for number, name in enumerate(names) if number >> bit & 1 == value])
    return [pattern for pattern in patterns if pattern]
