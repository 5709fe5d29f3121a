"""How a large network lends its weights to a smaller one: pure functions over names and shapes.

A smaller network's tensor is the leading channels, and the centre of the kernel, of the large network's
tensor of the same name (once-for-all, Cai et al. 2020, arXiv 1908.09791; BigNAS, Yu et al. 2020,
arXiv 2003.11142); a `Layout` tells where that is not so. Gradients flow back into the large network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.parts import Blocks, Grid, Joined, Kept, Layout, Part, Uncuttable, leading

Shape = tuple[int, ...]


class LendingError(ValueError):
    """A tensor that cannot be lent; the message names it and both shapes."""


@dataclass(frozen=True, slots=True)
class Resampled:
    """A grid of positions, interpolated to another one."""

    large: Grid
    small: Grid


AxisCut = Tensor | Resampled
"""How one axis is cut: the positions that are kept, or another grid."""
Cuts = Mapping[str, Mapping[int, AxisCut]]
"""By tensor and axis, the cuts that are not of leading channels or centres of kernels."""


def cut(tensor: Tensor, shape: Shape, *, name: str, cuts: Mapping[int, AxisCut] | None = None) -> Tensor:
    """The part of `tensor` that a network of `shape` uses: leading channels, the centre of kernels; a view.

    Of the axes in `cuts` the part is taken that they tell, as a copy through which gradients flow.

    Raises:
        LendingError: `shape` has other axes than `tensor`, or is larger.
    """
    for axis, how in (cuts or {}).items():
        if isinstance(how, Resampled):
            tensor = _resample(tensor, axis, how=how)
        else:
            tensor = tensor.index_select(axis, how if tensor.is_meta else how.to(tensor.device))
            if tensor.ndim == 4:
                # as a network's own kernels lie, 1x1 ones too: another layout is computed in another order
                tensor = tensor.clone(memory_format=torch.channels_last)
    if tensor.shape == shape:
        return tensor
    if tensor.ndim != len(shape) or any(
        small > large for small, large in zip(shape, tensor.shape, strict=True)
    ):
        raise LendingError(
            f"{name}: the large network's shape {tuple(tensor.shape)} cannot be cut to {tuple(shape)}; "
            "a subnet may be no larger than the largest network in any axis"
        )
    for axis, (small, large) in enumerate(zip(shape, tensor.shape, strict=True)):
        if small < large:
            is_kernel = tensor.ndim == 4 and axis >= 2
            tensor = tensor.narrow(axis, (large - small) // 2 if is_kernel else 0, small)
    return tensor


def lend(
    large: Mapping[str, Tensor], small: Mapping[str, Tensor], *, cuts: Cuts | None = None
) -> dict[str, Tensor]:
    """`large`'s parameters, each cut to the shape of `small`'s parameter of the same name.

    Raises:
        LendingError: `small` has a parameter that the large network lacks, or a larger one.
    """
    if not cuts:
        return {name: cut(_find(large, name), p.shape, name=name) for name, p in small.items()}
    return {
        name: cut(_find(large, name), p.shape, name=name, cuts=cuts.get(name)) for name, p in small.items()
    }


def lend_buffers(
    large: Mapping[str, Tensor], borrower: nn.Module, *, cuts: Cuts | None = None
) -> dict[str, Tensor]:
    """`large`'s persistent buffers for `borrower`: statistics of normalization cut, everything else whole.

    A table of indices (relative positions, say) has no leading part that means the same for a smaller
    network: it is lent only where the shapes agree. Buffers that are not persistent are no weights: a
    network's constructor makes them (see `nestling.models.building.own_tables`).

    Raises:
        LendingError: a buffer is missing, or one that is not a normalization's statistics has another shape.
    """
    lent = {}
    for prefix, module in borrower.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        for own, buffer in module._buffers.items():
            if buffer is None or own in module._non_persistent_buffers_set:
                continue
            name = f"{prefix}.{own}" if prefix else own
            tensor, shape = _find(large, name), tuple(buffer.shape)
            if not is_norm and tuple(tensor.shape) != shape:
                raise LendingError(
                    f"{name}: this buffer would change from {tuple(tensor.shape)} to {shape}; a table of "
                    "indices cannot be cut, so the choice that changes it must stay constant"
                )
            lent[name] = cut(tensor, shape, name=name, cuts=(cuts or {}).get(name))
    return lent


def plan_cuts(
    large: Mapping[str, Tensor], small: Mapping[str, Tensor], *, layouts: tuple[Layout, Layout]
) -> Cuts:
    """The cuts by which `large`'s tensors become `small`'s, for the axes that `layouts` name.

    `layouts` are the large network's and the small one's.

    Raises:
        LendingError: an axis that may not be cut differs, or its parts do not fit into the large network's.
    """
    of_large, of_small = layouts
    cuts: dict[str, dict[int, AxisCut]] = {}
    for (name, axis), part in of_small.items():
        if name not in small:
            continue
        tensor, size = _find(large, name), small[name].shape[axis]
        how = _axis_cut(of_large.get((name, axis)), part, sizes=(tensor.shape[axis], size), name=name)
        if how is not None:
            # on the meta device there is nothing to select from: positions stay where they are real
            place = "cpu" if tensor.is_meta else tensor.device
            cuts.setdefault(name, {})[axis] = how.to(place) if isinstance(how, Tensor) else how
    return cuts


def _axis_cut(
    large: Part | None, small: Part, *, sizes: tuple[int, int], name: str
) -> Tensor | Resampled | None:
    """How the axis is cut; None where it is the leading part."""
    if large == small and sizes[0] == sizes[1]:
        return None
    if isinstance(small, Uncuttable):
        if sizes[0] == sizes[1]:
            return None
        raise LendingError(f"{name} would be cut from {sizes[0]} to {sizes[1]}: {small.reason}")
    if isinstance(small, Kept):
        positions = torch.tensor(small.positions, dtype=torch.long)
    elif isinstance(small, Grid) and isinstance(large, Grid) and large.prefix == small.prefix:
        return Resampled(large, small)
    elif isinstance(small, Blocks | Joined) and isinstance(large, Blocks | Joined):
        try:
            positions = leading(large, small)
        except ValueError as error:
            raise LendingError(f"{name}: {error}") from error
    else:
        raise LendingError(f"{name}: an axis that is laid out as {large} cannot be cut to {small}")
    count = len(positions)
    if count != sizes[1] or (count and int(positions.max()) >= sizes[0]):
        raise LendingError(
            f"{name}: {count} positions of an axis of {sizes[0]} are kept for one of {sizes[1]}"
        )
    return None if torch.equal(positions, torch.arange(count)) else positions


def _resample(tensor: Tensor, axis: int, *, how: Resampled) -> Tensor:
    """`tensor` with the grid of positions along `axis` interpolated: bicubic, antialiased, as in timm."""
    large, small = how.large, how.small
    moved = tensor.movedim(axis, -1)
    prefix, positions = moved[..., : large.prefix], moved[..., large.prefix :]
    grid = positions.reshape(1, -1, large.rows, large.columns).float()
    grid = F.interpolate(grid, (small.rows, small.columns), mode="bicubic", antialias=True)
    positions = grid.to(tensor.dtype).reshape(*moved.shape[:-1], small.rows * small.columns)
    return torch.cat([prefix, positions], -1).movedim(-1, axis)


def _find(large: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return large[name]
    except KeyError:
        raise LendingError(f"{name}: the largest network has no such tensor to lend") from None
