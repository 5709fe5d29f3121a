"""Arithmetic and changes of shape in operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder, Translation, flat


def binary(kind: str) -> Translation:
    """What records an operator of this kind with two operands, one of which may be a constant."""

    def translate(to: Recorder, left: Tensor | float, right: Tensor | float) -> str:
        names = [to.name(left), to.name(right)]
        if names[0] and names[1]:
            return to.emit(kind, [names[0], names[1]])
        (constant, traced), name = ((right, left), names[0]) if names[0] else ((left, right), names[1])
        if not isinstance(traced, Tensor) or name is None or (kind in ("Sub", "Div") and names[0] is None):
            raise to.untraceable(f"a constant on the left of {kind}")
        value = torch.as_tensor(constant, dtype=traced.dtype, device=traced.device)
        if kind == "Sub":
            return to.emit("Add", [name], weight=-value)
        if kind == "Div":
            return to.emit("Mul", [name], weight=1 / value)
        return to.emit(kind, [name], weight=value)

    return translate


def rsub(to: Recorder, input: Tensor, other: Tensor | float) -> str:
    """Mul by -1 and Add: a constant less the input."""
    minus_one = torch.tensor(-1.0, dtype=input.dtype, device=input.device)
    negated = to.emit("Mul", [to.read(input)], weight=minus_one)
    value = torch.as_tensor(other, dtype=input.dtype, device=input.device)
    return to.emit("Add", [negated], weight=value)


def matmul(to: Recorder, left: Tensor, right: Tensor) -> str:
    """MatMul, whose right side may be a constant."""
    if to.name(right) is None:
        return to.emit("MatMul", [to.read(left)], weight=right)
    return to.emit("MatMul", [to.read(left), to.read(right)])


def mean(to: Recorder, input: Tensor, dim: int | Sequence[int], keepdim: bool = False, **_: object) -> str:
    """GlobalAveragePool (and Flatten) for the mean over a map, otherwise ReduceMean."""
    axes = tuple(sorted(axis % input.ndim for axis in ((dim,) if isinstance(dim, int) else dim)))
    if input.ndim == 4 and axes == (2, 3):
        pooled = to.emit("GlobalAveragePool", [to.read(input)])
        return pooled if keepdim else to.emit("Flatten", [pooled], attributes={"axis": 1})
    return to.emit("ReduceMean", [to.read(input)], attributes={"axes": axes, "keepdims": int(keepdim)})


def identity(to: Recorder, input: Tensor, *_: object, **__: object) -> str:
    """Nothing."""
    return to.read(input)


def pad(
    to: Recorder, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> str:
    """Pad with zeros."""
    if mode != "constant" or value not in (None, 0, 0.0):
        raise to.untraceable(f"padding in mode {mode!r} with {value}")
    low, high = [0] * input.ndim, [0] * input.ndim
    for step in range(len(pad) // 2):
        low[-1 - step], high[-1 - step] = pad[2 * step], pad[2 * step + 1]
    if not any((*low, *high)):
        return to.read(input)
    return to.emit("Pad", [to.read(input)], attributes={"pads": (*low, *high)})


def flatten(to: Recorder, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> str:
    """Flatten where all but the first axis become one, otherwise Reshape."""
    if start_dim % input.ndim == 1 and end_dim % input.ndim == input.ndim - 1:
        return to.emit("Flatten", [to.read(input)], attributes={"axis": 1})
    return reshape(to, input, torch.flatten(input, start_dim, end_dim).shape)


def reshape(to: Recorder, input: Tensor, *shape: Any) -> str:
    """Flatten or Reshape."""
    # The network is traced with one image, so every size but the first holds for any number of images.
    sizes = tuple(torch.empty(input.shape, device="meta").reshape(*shape).shape)
    if sizes == (1, input.numel()):
        return to.emit("Flatten", [to.read(input)], attributes={"axis": 1})
    return to.emit("Reshape", [to.read(input)], attributes={"shape": (-1, *sizes[1:])})


def permute(to: Recorder, input: Tensor, *dims: Any) -> str:
    """Transpose."""
    perm = tuple(axis % input.ndim for axis in flat(dims))
    return to.emit("Transpose", [to.read(input)], attributes={"perm": perm})


def transpose(to: Recorder, input: Tensor, dim0: int, dim1: int) -> str:
    """Transpose that swaps two axes."""
    perm = list(range(input.ndim))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return permute(to, input, perm)


def cat(to: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> str:
    """Concat; constants in it are repeated for each image by Expand."""
    traced = next(tensor for tensor in tensors if to.name(tensor))
    axis = dim % traced.ndim
    names = []
    for tensor in tensors:
        name = to.name(tensor)
        if name is None and (axis == 0 or tensor.shape[0] != 1):
            raise to.untraceable("a constant joined along the axis of images")
        names.append(name or to.emit("Expand", [to.read(traced)], weight=tensor))
    return to.emit("Concat", names, attributes={"axis": axis})


def unbind(to: Recorder, input: Tensor, dim: int = 0) -> tuple[str, ...]:
    """A Gather for each index of an axis."""
    name, axis = to.read(input), dim % input.ndim
    return tuple(
        to.emit("Gather", [name], attributes={"axis": axis, "indices": index})
        for index in range(input.shape[axis])
    )


def chunk(to: Recorder, input: Tensor, chunks: int, dim: int = 0) -> tuple[str, ...]:
    """A Slice for each part."""
    axis = dim % input.ndim
    sizes = [part.shape[axis] for part in torch.chunk(torch.empty(input.shape, device="meta"), chunks, axis)]
    return tuple(_cut(to, to.read(input), axis, sum(sizes[:i]), size) for i, size in enumerate(sizes))


def _cut(to: Recorder, name: str, axis: int, start: int, length: int) -> str:
    attributes: dict[str, Attribute] = {"starts": (start,), "ends": (start + length,), "axes": (axis,)}
    return to.emit("Slice", [name], attributes=attributes)


def getitem(to: Recorder, input: Tensor, index: Any) -> str:
    """A Gather for each index and a Slice for each slice."""
    name = to.read(input)
    steps = list(enumerate(index if isinstance(index, tuple) else (index,)))
    for axis, step in reversed(steps):
        size = input.shape[axis]
        if isinstance(step, int) and not isinstance(step, bool):
            name = to.emit("Gather", [name], attributes={"axis": axis, "indices": step % size})
        elif isinstance(step, slice) and step.step in (None, 1):
            start, end, _ = step.indices(size)
            name = name if (start, end) == (0, size) else _cut(to, name, axis, start, end - start)
        else:
            raise to.untraceable(f"indexing by {step!r}")
    return name
