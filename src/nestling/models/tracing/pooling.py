"""Pooling and changes of resolution in operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.convolutions import Size, every
from nestling.models.tracing.recorder import Recorder
from nestling.models.tracing.shapes import cut

Target = int | Sequence[int | None]


def adaptive_average(to: Recorder, input: Tensor, output_size: Target) -> str:
    """GlobalAveragePool, AveragePool where the wanted size divides the map, otherwise MatMuls."""
    size, target = _sizes(input, output_size)
    if target == (1, 1):
        return to.emit("GlobalAveragePool", [to.read(input)])
    if _divides(target, size):
        return average_pool(to, input, _ratio(size, target))
    matrices = [
        F.adaptive_avg_pool1d(torch.eye(have, dtype=input.dtype, device=input.device)[None], want)[0]
        for have, want in zip(size, target, strict=True)
    ]
    return _separately(to, to.read(input), matrices)


def adaptive_maximum(to: Recorder, input: Tensor, output_size: Target, return_indices: bool = False) -> str:
    """MaxPool where the wanted size divides the map."""
    size, target = _sizes(input, output_size)
    if return_indices or not _divides(target, size):
        raise to.untraceable(f"adaptive maximum pooling of {size} to {target}")
    return max_pool(to, input, _ratio(size, target))


def max_pool(
    to: Recorder,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    """MaxPool."""
    if return_indices or set(every(dilation, 1)) != {1}:
        raise to.untraceable("max pooling with dilation or indices")
    attributes = _window(input, kernel_size, stride, padding, ceil_mode)
    return to.emit("MaxPool", [to.read(input)], attributes=attributes)


def average_pool(
    to: Recorder,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    """AveragePool, or a Slice for each axis where a window is one pixel."""
    if divisor_override is not None:
        raise to.untraceable("average pooling with a divisor of its own")
    strides = every(stride or kernel_size, input.ndim - 2)
    if set(every(kernel_size, 1)) == {1} and set(every(padding, 1)) == {0}:
        # ONNX Runtime 1.31 folds a Pad into such a pooling and then refuses what it made.
        name = to.read(input)
        for axis, step in enumerate(strides, start=2):
            if step > 1:
                name = cut(to, name, axis, 0, input.shape[axis], step=step)
        return name
    attributes = _window(input, kernel_size, stride, padding, ceil_mode)
    attributes["count_include_pad"] = int(count_include_pad)
    return to.emit("AveragePool", [to.read(input)], attributes=attributes)


def interpolate(
    to: Recorder,
    input: Tensor,
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> str:
    """Resize for nearest and bilinear, otherwise a MatMul for rows and one for columns."""
    if input.ndim != 4 or mode not in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        raise to.untraceable(f"interpolation of {input.ndim} axes in mode {mode!r}")
    have = tuple(input.shape[2:])

    def resized(image: Tensor) -> Tensor:
        return F.interpolate(
            image, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        )

    want = tuple(resized(input[:, :1]).shape[2:])
    exact = scale_factor is None or recompute_scale_factor or _is_exact(have, want, scale_factor)
    if exact and mode in ("nearest", "bilinear") and not align_corners and not antialias:
        near = mode == "nearest"
        attributes: dict[str, Attribute] = {
            "axes": (2, 3),
            "mode": "nearest" if near else "linear",
            "coordinate_transformation_mode": "asymmetric" if near else "half_pixel",
            "sizes": want,
        }
        if near:
            attributes["nearest_mode"] = "floor"
        return to.emit("Resize", [to.read(input)], attributes=attributes)
    return _separately(to, to.read(input), [_along(axis, input, resized) for axis in (0, 1)])


def _along(axis: int, input: Tensor, resized: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix (before, after) of what `resized` does along one axis of a map, even along the other."""
    have = input.shape[2 + axis]
    other = input.shape[3 - axis]
    lines = torch.eye(have, dtype=input.dtype, device=input.device)
    images = lines[:, :, None].expand(-1, -1, other) if axis == 0 else lines[:, None, :].expand(-1, other, -1)
    result = resized(images[None])[0]
    return result[:, :, 0] if axis == 0 else result[:, 0, :]


def _separately(to: Recorder, name: str, matrices: Sequence[Tensor]) -> str:
    """A MatMul for each axis after the second, which stands last for it."""
    rank = len(matrices)
    for axis, matrix in reversed(list(enumerate(matrices))):
        perm = list(range(2 + rank))
        perm[2 + axis], perm[-1] = perm[-1], perm[2 + axis]
        last = axis == rank - 1
        name = name if last else to.emit("Transpose", [name], attributes={"perm": tuple(perm)})
        name = to.emit("MatMul", [name], weight=matrix)
        name = name if last else to.emit("Transpose", [name], attributes={"perm": tuple(perm)})
    return name


def _is_exact(have: tuple[int, ...], want: tuple[int, ...], factor: float | Sequence[float]) -> bool:
    factors = (factor, factor) if isinstance(factor, int | float) else tuple(factor)
    return all(old * times == new for old, new, times in zip(have, want, factors, strict=True))


def _sizes(input: Tensor, wanted: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    size = tuple(input.shape[2:])
    numbers = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    numbers = numbers * len(size) if len(numbers) == 1 else numbers
    return size, tuple(have if want is None else want for want, have in zip(numbers, size, strict=True))


def _divides(target: Sequence[int], size: Sequence[int]) -> bool:
    return not any(have % want for have, want in zip(size, target, strict=True))


def _ratio(size: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    return tuple(have // want for have, want in zip(size, target, strict=True))


def _window(
    input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool
) -> dict[str, Attribute]:
    rank = input.ndim - 2
    kernel = every(kernel_size, rank)
    return {
        "kernel_shape": kernel,
        "strides": every(stride, rank) if stride else kernel,
        "pads": every(padding, rank) * 2,
        "ceil_mode": int(ceil_mode),
    }
