"""Stages whose trailing blocks can be dropped: blocks that give what they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks in a row, the last of which can be left out.

    Attributes:
        name: of its choice, such as `layer1.depth`.
        blocks: the names of its blocks.
        least: how many must stay: those before the trailing ones of one class and one shape, at least 1.
    """

    name: str
    blocks: tuple[str, ...]
    least: int


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block was called with and gave; None where that is not one tensor each."""

    given: Tensor | None
    result: Tensor | None


@torch.no_grad()
def find_stages(network: nn.Module, images: Tensor) -> tuple[Stage, ...]:
    """The stages of `network`, which is run on `images`.

    A stage is a module that ends in two blocks or more of one class, each of which is called once, with what
    the one before returns and nothing else. All of them that are residual and return a tensor of the shape
    they take can be dropped, but for the first: what follows then reads the same channels, refined once less.
    A block has modules of its own, and is no `nn.Sequential`.
    """
    rows: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in network.named_modules():
        children = list(module.named_children())
        alike = [child for child in children if type(child[1]) is type(children[-1][1])]
        if len(alike) > 1 and _is_block(children[-1][1]):
            rows[name] = children
    calls = _record(network, images, {child for children in rows.values() for _, child in children})
    stages: list[Stage] = []
    for name, children in rows.items():
        trailing = 1
        while trailing < len(children) and _can_drop(
            children[-trailing - 1][1], children[-trailing][1], calls
        ):
            trailing += 1
        dot = f"{name}." if name else ""
        blocks = tuple(f"{dot}{own}" for own, _ in children)
        inside = any(block.startswith(f"{other}.") for block in blocks for s in stages for other in s.blocks)
        if trailing > 1 and not inside:
            stages.append(Stage(f"{dot}depth", blocks, len(blocks) - trailing + 1))
    return tuple(stages)


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.Sequential) and any(True for _ in module.children())


def _can_drop(before: nn.Module, block: nn.Module, calls: dict[nn.Module, list[_Call]]) -> bool:
    """Whether `block` only refines what `before`, a block of its class, returns."""
    if type(before) is not type(block) or len(calls[before]) != 1 or len(calls[block]) != 1:
        return False
    passed, (call,) = calls[before][0].result, calls[block]
    if passed is None or call.given is None or call.result is None:
        return False
    return call.given is passed and call.result.shape == passed.shape and _is_residual(block, call.given)


def _is_residual(block: nn.Module, given: Tensor) -> bool:
    """Whether what `block` is given reaches what it returns around its weights."""
    silent = {name: torch.zeros_like(parameter) for name, parameter in block.named_parameters()}
    with_input, without = (functional_call(block, silent, (x,)) for x in (given, torch.zeros_like(given)))
    return not torch.equal(with_input, without)


def _record(network: nn.Module, images: Tensor, blocks: set[nn.Module]) -> dict[nn.Module, list[_Call]]:
    calls: dict[nn.Module, list[_Call]] = {block: [] for block in blocks}

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        one = len(given) == 1 and not named and isinstance(given[0], Tensor)
        calls[module].append(_Call(given[0] if one else None, result if isinstance(result, Tensor) else None))

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
