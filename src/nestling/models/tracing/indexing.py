"""Reading and writing parts of tensors in operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import Recorder
from nestling.models.tracing.shapes import cut, known


def getitem(to: Recorder, input: Tensor, index: Any) -> str:
    """A Gather for each index, a Slice for each slice, an Unsqueeze for each None."""
    name = to.read(input)
    steps = _steps(to, index, input.ndim)
    lists = sum(isinstance(step, Tensor) for step in steps)
    if lists > 1 or (lists and any(_is_number(step) for step in steps)):
        raise to.untraceable("indexing by a list together with another or with a number")
    axis, gathered = 0, []
    for step in steps:
        if step is not None:
            gathered.append((axis, step))
            axis += 1
    for axis, step in reversed(gathered):
        name = _taken(to, name, axis, input.shape[axis], step)
    if any(isinstance(step, Tensor) and step.ndim > 1 for step in steps):
        shape = torch.empty(input.shape, device="meta")[index].shape
        return to.emit("Reshape", [name], attributes={"shape": (-1, *shape[1:])})
    left = [step for step in steps if not _is_number(step)]
    new = tuple(axis for axis, step in enumerate(left) if step is None)
    return to.emit("Unsqueeze", [name], attributes={"axes": new}) if new else name


def _steps(to: Recorder, index: Any, axes: int) -> list[Any]:
    """One step for each axis and for each None: a number, a slice, or a tensor of numbers."""
    steps: list[Any] = []
    given = index if isinstance(index, tuple) else (index,)
    for step in given:
        if isinstance(step, list):
            step = torch.tensor(step)
        if isinstance(step, Tensor):
            if to.name(step):
                raise to.untraceable("indexing by what depends on the images")
            if step.dtype == torch.bool:
                if step.ndim != 1:
                    raise to.untraceable("indexing by a mask of several axes")
                step = step.nonzero()[:, 0]
            if step.ndim == 0:
                step = int(step)
        elif not (step is None or step is Ellipsis or isinstance(step, slice) or _is_number(step)):
            raise to.untraceable(f"indexing by {step!r}")
        steps.append(step)
    named = sum(step is not None and step is not Ellipsis for step in steps)
    elided = next((place for place, step in enumerate(steps) if step is Ellipsis), len(steps))
    return [*steps[:elided], *[slice(None)] * (axes - named), *steps[elided + 1 :]]


def _is_number(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool)


def _taken(to: Recorder, name: str, axis: int, size: int, step: Any) -> str:
    if isinstance(step, slice):
        start, end, stride = step.indices(size)
        if (start, end, stride) == (0, size, 1):
            return name
        return cut(to, name, axis, start, end - start, step=stride)
    if isinstance(step, Tensor):
        indices: Attribute = tuple(int(number) % size for number in step.flatten())
        return to.emit("Gather", [name], attributes={"axis": axis, "indices": indices})
    return to.emit("Gather", [name], attributes={"axis": axis, "indices": step % size})


def setitem(to: Recorder, input: Tensor, index: Any, value: Tensor | float) -> str:
    """Concat of what lies before, of the new value, and of what lies after."""
    steps = _steps(to, index, input.ndim)
    if not all(isinstance(step, slice) and step.step in (None, 1) for step in steps):
        raise to.untraceable(f"writing to {index!r}")
    spans = [step.indices(size)[:2] for step, size in zip(steps, input.shape, strict=True)]
    shape = tuple(end - start for start, end in spans)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        value = torch.broadcast_to(torch.as_tensor(value, dtype=input.dtype, device=input.device), shape)
        if to.name(value):
            raise to.untraceable("writing a value that is repeated")
    return _written(to, to.read(input), list(input.shape), spans, known(to, value, input), axis=0)


def _written(
    to: Recorder, name: str, shape: list[int], spans: Sequence[tuple[int, int]], value: str, *, axis: int
) -> str:
    while axis < len(spans) and spans[axis] == (0, shape[axis]):
        axis += 1
    if axis == len(spans):
        return value
    start, end = spans[axis]
    inside = cut(to, name, axis, start, end - start)
    inside_shape = [end - start if place == axis else size for place, size in enumerate(shape)]
    parts = [_written(to, inside, inside_shape, spans, value, axis=axis + 1)]
    if start > 0:
        parts.insert(0, cut(to, name, axis, 0, start))
    if end < shape[axis]:
        parts.append(cut(to, name, axis, end, shape[axis] - end))
    return to.emit("Concat", parts, attributes={"axis": axis})


def select(to: Recorder, input: Tensor, dim: int, index: int) -> str:
    """Gather of one index."""
    return _taken(to, to.read(input), dim % input.ndim, input.shape[dim], index)


def narrow(to: Recorder, input: Tensor, dim: int, start: int, length: int) -> str:
    """Slice."""
    return cut(to, to.read(input), dim % input.ndim, start % input.shape[dim], length)


def index_select(to: Recorder, input: Tensor, dim: int, index: Tensor) -> str:
    """Gather."""
    if to.name(index):
        raise to.untraceable("indexing by what depends on the images")
    return _taken(to, to.read(input), dim % input.ndim, input.shape[dim], index)


def windows(to: Recorder, input: Tensor, dimension: int, size: int, step: int) -> str:
    """Gather, Reshape, Transpose: windows that slide along an axis; their own axis comes last."""
    axis = dimension % input.ndim
    if axis == 0:
        raise to.untraceable("windows along the axis of images")
    count = (input.shape[axis] - size) // step + 1
    indices = tuple(step * window + place for window in range(count) for place in range(size))
    name = to.emit("Gather", [to.read(input)], attributes={"axis": axis, "indices": indices})
    shape = (-1, *input.shape[1:axis], count, size, *input.shape[axis + 1 :])
    name = to.emit("Reshape", [name], attributes={"shape": shape})
    perm = (*(place for place in range(input.ndim + 1) if place != axis + 1), axis + 1)
    return to.emit("Transpose", [name], attributes={"perm": perm})
