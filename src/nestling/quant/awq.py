"""Weights scaled by what they meet, so that rounding spares those that count.

AWQ, activation-aware weight quantization, Lin et al. 2023, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.moments import as_matrix, output_errors, rows_read, second_moments
from nestling.quant.scaling import Joint, joints, rescaled, with_larger_weights

POWERS = 20
"""Powers of the activations' sizes that are tried, from 0 (as it is) in equal steps to 1."""
SMALLEST = 1e-4
"""The least size that a channel's activations are taken to have."""

Rounding = Callable[[Operator], Tensor | None]
"""Gives the weight of an operator as its precision keeps it; None where that keeps it as it is."""


@torch.no_grad()
def awq(graph: Graph, images: Iterable[Tensor], *, rounding: Rounding, seed: int = 0) -> Graph:
    """A graph that computes the same, whose weights lose less by `rounding` where activations are large.

    The weights that read input channel `i` are multiplied by `size[i] ** power`, and what writes the channel
    is divided by it; `size` is the channel's mean magnitude on `images`, and `power`, in [0, 1], the one of
    those tried that gives the rounded layers the least squared error of their outputs. The error comes from
    the second moments of their inputs, so the images are looked at once.

    Layers take part whose input comes from a norm, a linear layer or a convolution over steps that a scale
    survives (`joints`); the others stay as they are. Layers that read the same channels have one scale. That
    a writer's rows become smaller is taken to change nothing in its rounding, as with a scale for each row.

    Args:
        graph: the float network.
        images: batches (N, 3, R, R); the sums of products of a layer's inputs take numbers x numbers floats.
        rounding: what is done to weights alone; activations are taken to stay floats.
        seed: chooses the positions of large maps that are looked at.

    Raises:
        ValueError: no images.
    """
    operators = {operator.name: operator for operator in graph.operators}
    found = [
        joint
        for joint in joints(graph, writers=("Conv", "Gemm", "LayerNormalization"))
        if any(rounding(operators[name]) is not None for name in joint.readers)
    ]
    seen = _look(graph, {name for joint in found for name in joint.readers}, images, seed=seed)
    for joint in found:
        scale = _best_scale(operators, joint, seen, rounding)
        if scale is not None:
            operators |= rescaled(operators, joint, scale)
    return replace(graph, operators=tuple(operators.values()))


@dataclass(slots=True)
class _Seen:
    """What a layer read: the mean magnitude of each input channel, and second moments, (groups, ...)."""

    sizes: Tensor
    moments: Tensor
    images: int


def _look(graph: Graph, names: set[str], images: Iterable[Tensor], *, seed: int) -> dict[str, _Seen]:
    readers: dict[str, list[Operator]] = {}
    for operator in graph.operators:
        if operator.name in names:
            readers.setdefault(operator.inputs[0], []).append(operator)
    seen: dict[str, _Seen] = {}
    count = 0

    def look(name: str, tensor: Tensor) -> Tensor:
        for operator in readers.get(name, ()):
            rows = rows_read(operator, (tensor,), seed=seed + count)
            sizes = tensor.abs().movedim(1, 0).flatten(1).mean(1)
            new = _Seen(sizes, second_moments(rows), count)
            old = seen.get(operator.name)
            seen[operator.name] = new if old is None else _joined(old, new, len(batch))
        return tensor

    for batch in images:
        graph.run(batch, after=look)
        count += len(batch)
        for found in seen.values():
            found.images = count
    if not count:
        raise ValueError("no calibration images; activation-aware scaling needs at least one batch")
    return seen


def _joined(old: _Seen, new: _Seen, images: int) -> _Seen:
    part = images / (old.images + images)
    return _Seen(
        torch.lerp(old.sizes, new.sizes, part),
        torch.lerp(old.moments, new.moments, part),
        old.images + images,
    )


def _best_scale(
    operators: Mapping[str, Operator], joint: Joint, seen: Mapping[str, _Seen], rounding: Rounding
) -> Tensor | None:
    """By what each channel of `joint` is best divided; None where nothing beats leaving it."""
    sizes = torch.stack(
        [
            seen[name].sizes.reshape(-1, repeats).mean(1)
            for name, repeats in zip(joint.readers, joint.repeats, strict=True)
        ]
    ).mean(0)
    best, least = None, torch.inf
    for step in range(POWERS + 1):
        scale = sizes.clamp(min=SMALLEST) ** (step / POWERS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(
            _error(operators[name], scale.repeat_interleave(repeats), seen[name], rounding)
            for name, repeats in zip(joint.readers, joint.repeats, strict=True)
        )
        if error < least:
            best, least = (scale if step else None), error
    return best


def _error(operator: Operator, scale: Tensor, seen: _Seen, rounding: Rounding) -> float:
    """The mean squared error of the outputs of `operator`, its weights rounded at `scale` (inputs,)."""
    rounded = rounding(with_larger_weights(operator, scale))
    if rounded is None:
        return 0.0
    back = with_larger_weights(replace(operator, weight=rounded), 1 / scale).constant()
    difference = as_matrix(operator, back - operator.constant())
    return float(output_errors(difference, seen.moments).sum())
