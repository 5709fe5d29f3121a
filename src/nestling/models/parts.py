"""What an axis of a network's tensor is made of, where leading channels alone would mean something else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Blocks:
    """An axis of nested blocks, such as (3, heads, head_dim): of each level the leading part is lent."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """An axis of positions: `prefix` tokens, then `rows` x `columns` of them, which are interpolated."""

    prefix: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Kept:
    """An axis that consists of exactly these positions of the largest network's."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Uncuttable:
    """An axis that has no part with a meaning of its own, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Joined:
    """An axis of `repeats` times the same `parts`, one after the other, each cut on its own.

    A LeViT attention's rows are for each head its queries, keys and values, of which the values are more.
    """

    repeats: int
    parts: tuple[Blocks, ...]


Part = Blocks | Grid | Kept | Joined | Uncuttable
Layout = Mapping[tuple[str, int], Part]
"""By tensor and axis; of an axis that is not named the leading channels are lent, of a kernel the centre."""
FindLayout = Callable[[nn.Module, Arch], Layout]


def leading(large: Blocks | Joined, small: Blocks | Joined) -> Tensor:
    """The positions of an axis laid out as `large` that an axis laid out as `small` is lent, in order.

    Raises:
        ValueError: the two are made of different parts, or a part of `small` is larger.
    """
    if isinstance(large, Blocks) and isinstance(small, Blocks):
        sizes = large.sizes
        if len(sizes) != len(small.sizes) or any(s > b for s, b in zip(small.sizes, sizes, strict=True)):
            raise ValueError(f"blocks of {small.sizes} do not fit into the large network's {sizes}")
        kept = tuple(slice(size) for size in small.sizes)
        return torch.arange(math.prod(sizes), device="cpu").reshape(sizes)[kept].flatten()
    if isinstance(large, Blocks) or isinstance(small, Blocks) or len(large.parts) != len(small.parts):
        raise ValueError(f"an axis that is laid out as {large} cannot be cut to {small}")
    if small.repeats > large.repeats:
        raise ValueError(f"{small.repeats} repeats do not fit into the large network's {large.repeats}")
    inside = [leading(*parts) for parts in zip(large.parts, small.parts, strict=True)]
    starts = [0, *itertools.accumulate(math.prod(part.sizes) for part in large.parts)]
    one = torch.cat([start + positions for start, positions in zip(starts, inside, strict=False)])
    return torch.cat([repeat * starts[-1] + one for repeat in range(small.repeats)])
