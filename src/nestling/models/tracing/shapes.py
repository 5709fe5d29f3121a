"""Changes of shape and order in operators: nothing here computes a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder, Translation, flat

_PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def identity(to: Recorder, input: Tensor, *_: object, **__: object) -> str:
    """Nothing; the recorder refuses a result of another type of number."""
    return to.read(input)


def reshaped(to: Recorder, name: str, old: Sequence[int], new: Sequence[int]) -> str:
    """Flatten or Reshape of the tensor called `name` from one shape to another; nothing for the same."""
    if tuple(old) == tuple(new):
        return name
    axis = to.images_axis(name)
    if axis == 0 and len(new) == 2 and new[0] == old[0]:
        return to.emit("Flatten", [name], attributes={"axis": 1})
    # The network is traced with one image; every size but that of the axis of images holds for any number.
    before = math.prod(old[:axis])
    place = next((place for place in range(len(new)) if math.prod(new[:place]) == before), None)
    if place is None:
        raise to.untraceable(f"a reshape of {tuple(old)} to {tuple(new)}, which mixes images,")
    return to.emit("Reshape", [name], attributes={"shape": (*new[:place], -1, *new[place + 1 :])})


def as_shaped_by(function: Callable[..., Tensor]) -> Translation:
    """What records the Reshape to the shape that `function` gives."""

    def translate(to: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> str:
        shape = function(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
        return reshaped(to, to.read(input), input.shape, shape)

    return translate


def unsqueeze(to: Recorder, input: Tensor, dim: int) -> str:
    """Unsqueeze."""
    return to.emit("Unsqueeze", [to.read(input)], attributes={"axes": (dim % (input.ndim + 1),)})


def squeeze(to: Recorder, input: Tensor, dim: int | Sequence[int] | None = None) -> str:
    """Squeeze of the named axes that have size one."""
    if dim is None:
        raise to.untraceable(
            "squeeze() of all axes, which takes the axis of one image too (flatten(1) will do),"
        )
    axes = tuple(sorted(axis % input.ndim for axis in flat([dim]) if input.shape[axis] == 1))
    return to.emit("Squeeze", [to.read(input)], attributes={"axes": axes}) if axes else to.read(input)


def permute(to: Recorder, input: Tensor, *dims: Any) -> str:
    """Transpose."""
    perm = tuple(axis % input.ndim for axis in flat(dims))
    return to.emit("Transpose", [to.read(input)], attributes={"perm": perm})


def transpose(to: Recorder, input: Tensor, dim0: int, dim1: int) -> str:
    """Transpose that swaps two axes."""
    perm = list(range(input.ndim))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return permute(to, input, perm)


def movedim(to: Recorder, input: Tensor, source: int, destination: int) -> str:
    """Transpose that moves one axis."""
    perm = [axis for axis in range(input.ndim) if axis != source % input.ndim]
    perm.insert(destination % input.ndim, source % input.ndim)
    return permute(to, input, perm)


def matrix_transpose(to: Recorder, input: Tensor) -> str:
    """Transpose of the last two axes."""
    return transpose(to, input, -2, -1)


def cat(to: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> str:
    """Concat; constants in it are repeated for each image by Expand."""
    traced = next(tensor for tensor in tensors if to.name(tensor))
    axis = dim % traced.ndim
    names = []
    for tensor in tensors:
        if to.name(tensor) is None and axis == 0:
            raise to.untraceable("a constant joined along the axis of images")
        names.append(known(to, tensor, traced))
    return to.emit("Concat", names, attributes={"axis": axis})


def known(to: Recorder, tensor: Tensor, traced: Tensor) -> str:
    """The name of `tensor`; if it is a constant, of an Expand that repeats it for each image of `traced`."""
    name = to.name(tensor)
    if name is None and tensor.shape[0] != 1:
        raise to.untraceable(f"a constant {tuple(tensor.shape)} with other values for each image")
    return name or to.emit("Expand", [to.read(traced)], weight=tensor)


def stack(to: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> str:
    """Unsqueeze of each and Concat."""
    axis = dim % (tensors[0].ndim + 1)
    traced = next(tensor for tensor in tensors if to.name(tensor))
    names = [known(to, tensor, traced) for tensor in tensors]
    names = [to.emit("Unsqueeze", [name], attributes={"axes": (axis,)}) for name in names]
    return to.emit("Concat", names, attributes={"axis": axis})


def unbind(to: Recorder, input: Tensor, dim: int = 0) -> tuple[str, ...]:
    """A Gather for each index of an axis."""
    name, axis = to.read(input), dim % input.ndim
    return tuple(
        to.emit("Gather", [name], attributes={"axis": axis, "indices": index})
        for index in range(input.shape[axis])
    )


def in_parts(function: Callable[..., Sequence[Tensor]]) -> Translation:
    """What records a Slice for each part into which `function` divides a tensor."""

    def translate(to: Recorder, input: Tensor, how: Any, dim: int = 0) -> tuple[str, ...]:
        axis = dim % input.ndim
        parts = function(torch.empty(input.shape, device="meta"), how, axis)
        sizes = [part.shape[axis] for part in parts]
        return tuple(cut(to, to.read(input), axis, sum(sizes[:i]), size) for i, size in enumerate(sizes))

    return translate


def cut(to: Recorder, name: str, axis: int, start: int, length: int, *, step: int = 1) -> str:
    """Slice of one axis."""
    attributes: dict[str, Attribute] = {"starts": (start,), "ends": (start + length,), "axes": (axis,)}
    if step != 1:
        attributes["steps"] = (step,)
    return to.emit("Slice", [name], attributes=attributes)


def roll(to: Recorder, input: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int]) -> str:
    """For each axis, Concat of its end and its beginning."""
    name = to.read(input)
    for shift, dim in zip(flat([shifts]), flat([dims]), strict=True):
        axis = dim % input.ndim
        size = input.shape[axis]
        start = -shift % size
        if start:
            ends = [cut(to, name, axis, start, size - start), cut(to, name, axis, 0, start)]
            name = to.emit("Concat", ends, attributes={"axis": axis})
    return name


def flip(to: Recorder, input: Tensor, *dims: Any) -> str:
    """Gather of the last first, for each axis."""
    name = to.read(input)
    for dim in flat(dims):
        backwards = tuple(reversed(range(input.shape[dim])))
        name = to.emit("Gather", [name], attributes={"axis": dim % input.ndim, "indices": backwards})
    return name


def expand(to: Recorder, input: Tensor, *sizes: Any) -> str:
    """Tile of axes of size one."""
    target = torch.empty(input.shape, device="meta").expand(*flat(sizes)).shape
    return _tiled(to, input, [new // old for new, old in zip(target, _aligned(input, target), strict=True)])


def expand_as(to: Recorder, input: Tensor, other: Tensor) -> str:
    """Tile of axes of size one."""
    return expand(to, input, *other.shape)


def repeat(to: Recorder, input: Tensor, *repeats: Any) -> str:
    """Tile."""
    return _tiled(to, input, flat(repeats))


def repeat_interleave(to: Recorder, input: Tensor, repeats: int, dim: int) -> str:
    """Tile of a new axis, which Reshape merges with the one before it."""
    axis = dim % input.ndim
    if not isinstance(repeats, int):
        raise to.untraceable("repeating by other numbers for each element")
    apart = to.emit("Unsqueeze", [to.read(input)], attributes={"axes": (axis + 1,)})
    times = tuple(repeats if place == axis + 1 else 1 for place in range(input.ndim + 1))
    tiled = to.emit("Tile", [apart], attributes={"repeats": times})
    shape = [size * repeats if place == axis else size for place, size in enumerate(input.shape)]
    return to.emit("Reshape", [tiled], attributes={"shape": (-1, *shape[1:])})


def _tiled(to: Recorder, input: Tensor, repeats: Sequence[int]) -> str:
    name = to.read(input)
    if len(repeats) > input.ndim:
        axes = tuple(range(len(repeats) - input.ndim))
        name = to.emit("Unsqueeze", [name], attributes={"axes": axes})
    if all(times == 1 for times in repeats):
        return name
    return to.emit("Tile", [name], attributes={"repeats": tuple(repeats)})


def _aligned(input: Tensor, target: Sequence[int]) -> tuple[int, ...]:
    return (*(1 for _ in range(len(target) - input.ndim)), *input.shape)


def pixel_shuffle(to: Recorder, input: Tensor, upscale_factor: int) -> str:
    """Reshape, Transpose, Reshape: channels become pixels."""
    images, channels, height, width = input.shape
    r = upscale_factor
    apart = to.emit(
        "Reshape", [to.read(input)], attributes={"shape": (-1, channels // r**2, r, r, height, width)}
    )
    turned = to.emit("Transpose", [apart], attributes={"perm": (0, 1, 4, 2, 5, 3)})
    shape = (images, channels // r**2, height * r, width * r)
    return to.emit("Reshape", [turned], attributes={"shape": (-1, *shape[1:])})


def pixel_unshuffle(to: Recorder, input: Tensor, downscale_factor: int) -> str:
    """Reshape, Transpose, Reshape: pixels become channels."""
    _, channels, height, width = input.shape
    r = downscale_factor
    shape = (-1, channels, height // r, r, width // r, r)
    apart = to.emit("Reshape", [to.read(input)], attributes={"shape": shape})
    turned = to.emit("Transpose", [apart], attributes={"perm": (0, 1, 3, 5, 2, 4)})
    return to.emit("Reshape", [turned], attributes={"shape": (-1, channels * r**2, height // r, width // r)})


def pad(
    to: Recorder, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> str:
    """Pad; less than nothing is a Slice."""
    low, high = [0] * input.ndim, [0] * input.ndim
    for step in range(len(pad) // 2):
        low[-1 - step], high[-1 - step] = pad[2 * step], pad[2 * step + 1]
    name = to.read(input)
    for axis, size in enumerate(input.shape):
        if low[axis] < 0 or high[axis] < 0:
            start = max(-low[axis], 0)
            name = cut(to, name, axis, start, size - start - max(-high[axis], 0))
    pads = tuple(max(side, 0) for side in (*low, *high))
    if not any(pads):
        return name
    attributes: dict[str, Attribute] = {"pads": pads}
    if mode != "constant":
        attributes["mode"] = _PADDING[mode]
    elif value:
        attributes["value"] = float(value)
    return to.emit("Pad", [name], attributes=attributes)
