"""Weights rounded up or down as gradient descent finds best for a layer's output.

AdaRound, Nagel et al. 2020, arXiv 2004.10568.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.models.operators import compute
from nestling.quant.ranges import Range
from nestling.quant.regions import WEIGHT_AXES
from nestling.quant.rounding import Grid, grid_of
from nestling.quant.walking import Reading, walk

STRETCH = (-0.1, 1.1)
"""The ends of the sigmoid that chooses between down (0) and up (1); it is cut off at 0 and 1."""
DECISIVENESS = 0.01
"""The weight of the penalty for choices between 0 and 1."""
SHARPEST, FLATTEST = 2.0, 20.0
"""The penalty's power ends at the first and begins at the second."""
UNDECIDED = 0.2
"""The part of the iterations that goes without the penalty."""
BATCH = 32
ITERATIONS = 10_000
_ELEMENTWISE = {
    "Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Elu",
    "Softplus",
}  # fmt: skip


def round_by_gradients(
    graph: Graph,
    ranges: Mapping[str, Range],
    images: Iterable[Tensor],
    *,
    iterations: int = ITERATIONS,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> Graph:
    """`graph` with weights on the grids of their ranges, each layer's output near the float one's.

    Whether a weight goes up or down is a number between 0 and 1 that Adam learns, `BATCH` images at a time,
    from the squared error of the layer's output; a penalty drives it to one of its ends. The layer reads what
    the quantized network before it writes, and is held to the float network's output, after the activation
    where there is one behind it. An output channel for which this errs more on `images` than rounding to the
    nearest keeps the latter. Defaults are the paper's, but for the learning rate: its authors' library has
    Adam's own, 0.001, with which a few hundred `iterations` leave most weights where they began.

    A layer takes `iterations` forward and backward passes of `BATCH` images through itself: minutes for a
    layer of a large network on a CPU, where `round_by_moments` takes a second.

    Args:
        graph: the float network.
        ranges: of its tensors and weights.
        images: batches (N, 3, R, R); the paper takes 1024 images.
        iterations: steps of Adam for each layer.
        learning_rate: of Adam.
        seed: chooses the batches.

    Raises:
        ValueError: fewer than one iteration; and see `walk`.
    """
    if iterations < 1:
        raise ValueError(f"{iterations} iterations; rounding is learned in 1 or more")
    readers = graph.readers()

    def learned(operator: Operator, reading: Reading) -> Operator:
        behind = readers[operator.name]
        activation = behind[0] if len(behind) == 1 and behind[0].kind in _ELEMENTWISE else None

        def activated(outputs: Tensor) -> Tensor:
            return outputs if activation is None else compute(activation, outputs)

        found = ranges[f"{operator.name}.weight"]
        nearest = replace(operator, weight=found.nearest(operator.constant()))
        with torch.enable_grad():
            weight = _learn(
                operator,
                grid_of(found, operator.constant()),
                reading,
                activated,
                iterations=iterations,
                learning_rate=learning_rate,
                generator=torch.Generator().manual_seed(seed),
            )
        best = replace(operator, weight=found.nearest(weight))
        return _better_of(best, nearest, reading, activated)

    return walk(graph, ranges, images, learned)


def _learn(
    operator: Operator,
    grid: Grid,
    reading: Reading,
    activated: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Tensor:
    """The weight of `operator` on its grid."""
    inputs, wanted = torch.cat(reading.rounded), activated(torch.cat(reading.wanted))
    steps = operator.constant() / grid.step
    down = steps.floor()
    bottom, top = STRETCH
    # The sigmoid begins where the weight is as it was.
    part = ((steps - down) - bottom) / (top - bottom)
    choice = torch.logit(part).requires_grad_()
    adam = torch.optim.Adam([choice], lr=learning_rate)
    channels = operator.constant().shape[WEIGHT_AXES[operator.kind]]
    # A linear layer may read several rows of an image.
    drawn = min(BATCH * len(inputs) // reading.images, len(inputs))
    for iteration in range(iterations):
        rows = torch.randperm(len(inputs), generator=generator)[:drawn].to(inputs.device)
        up = (choice.sigmoid() * (top - bottom) + bottom).clamp(0, 1)
        soft = grid.step * torch.minimum(torch.maximum(down + up, grid.low), grid.high)
        got = activated(compute(replace(operator, weight=soft), inputs[rows]))
        loss = (got - wanted[rows]).square().sum() * channels / got.numel()
        progress = (iteration / iterations - UNDECIDED) / (1 - UNDECIDED)
        if progress >= 0:
            power = SHARPEST + (FLATTEST - SHARPEST) * (1 + math.cos(math.pi * progress)) / 2
            loss = loss + DECISIVENESS * (1 - (2 * up - 1).abs().pow(power)).sum()
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
    up = (choice.detach() >= 0).to(down.dtype)
    return grid.step * torch.minimum(torch.maximum(down + up, grid.low), grid.high)


def _better_of(
    best: Operator, nearest: Operator, reading: Reading, activated: Callable[[Tensor], Tensor]
) -> Operator:
    """`best`, with the weights of `nearest` in output channels where those err less."""
    errors = []
    for operator in (best, nearest):
        error: Tensor | None = None
        for read, wanted in zip(reading.rounded, reading.wanted, strict=True):
            difference = activated(compute(operator, read)) - activated(wanted)
            axis = 1 if operator.kind == "Conv" else -1
            new = difference.square().movedim(axis, 0).flatten(1).sum(1)
            error = new if error is None else error + new
        assert error is not None
        errors.append(error)
    axis = WEIGHT_AXES[best.kind]
    shape = [-1 if other == axis else 1 for other in range(best.constant().ndim)]
    keeps = (errors[0] < errors[1]).reshape(shape)
    return replace(best, weight=torch.where(keeps, best.constant(), nearest.constant()))
