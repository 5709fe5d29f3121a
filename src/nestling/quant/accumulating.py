"""Float convolutions that add in the order of ONNX Runtime's: equal to the last bit, where PyTorch's are not.

Between two tensors of integers, the last bit of a float decides now and then to which integer it is rounded,
and a network of random weights makes a step of one number many steps of many. The runtime's CPU provider
(1.31, blocks of 16 channels with AVX512) sums up, in fused multiply-adds:

- with fewer than 16 channels: each input channel by itself, one after another;
- a window of one pixel: 128 input channels at a time, one after another;
- other windows: 16 input channels at a time, pixel of the window after pixel;
- one channel in a group: the window's pixels.

Each of these parts is added to those before it, and the bias comes last. Where a sum follows that only this
convolution's result and another of the blocked layout enter, its other number is there before the first part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from nestling.models.graph import Graph
from nestling.models.operators import Operator, compute

BLOCK = 16
"""Channels that the runtime holds side by side."""
POINTWISE_CHANNELS = 128
"""Input channels that it sums at a time where the window is one pixel."""
ALIGNED = 4
"""Channels come in multiples of this, or the runtime multiplies matrices instead."""
_RECTIFYING_KINDS = {"Relu", "Sigmoid", "Tanh"}
_POOLING_KINDS = {"MaxPool", "AveragePool", "GlobalAveragePool"}


def is_blocked(operator: Operator, quantized: Collection[str]) -> bool:
    """Whether the runtime computes `operator` on floats, by blocks of channels.

    Args:
        operator: any.
        quantized: names of tensors and constants in integers. A weight among them is spread out anew at each
            run, and so in no blocks.
    """
    if operator.kind != "Conv" or operator.weight is None or operator.weight.dtype != torch.float32:
        return False
    if operator.weight.ndim != 4 or f"{operator.name}.weight" in quantized:
        return False
    groups = operator.integer("group")
    outputs, inputs = operator.weight.shape[:2]
    if groups == 1:
        return inputs < BLOCK or inputs % ALIGNED == 0
    if inputs == 1 and outputs == groups:
        return outputs % ALIGNED == 0
    return inputs % BLOCK == 0 and (outputs // groups) % BLOCK == 0


def joined_sums(graph: Graph, quantized: Collection[str]) -> dict[str, Operator]:
    """Sum -> the convolution before it that the runtime makes part of it, by the sum's name.

    Both of a sum's numbers must be in blocks, and the convolution's result read by nothing else.

    Args:
        graph: of the network.
        quantized: names of tensors and constants in integers.
    """
    writers = {operator.name: operator for operator in graph.operators}
    readers = graph.readers()
    blocked: set[str] = set()
    joined: dict[str, Operator] = {}
    for operator in graph.operators:
        in_blocks = all(name in blocked for name in operator.inputs) and operator.weight is None
        if operator.kind in ("Add", "Mul"):
            shapes = {graph.shapes[name] for name in (*operator.inputs, operator.name)}
            in_blocks = in_blocks and len(operator.inputs) == 2 and len(shapes) == 1
        elif operator.kind == "Conv":
            in_blocks = is_blocked(operator, quantized)
        elif operator.kind in _POOLING_KINDS:
            in_blocks = graph.shapes[operator.name][1] % BLOCK == 0 and operator.inputs[0] not in quantized
        elif operator.kind not in _RECTIFYING_KINDS:
            in_blocks = False
        if in_blocks and operator.kind == "Add":
            taken = {convolution.name for convolution in joined.values()}
            candidates = (writers.get(name) for name in operator.inputs)
            joins = next(
                (
                    writer
                    for writer in candidates
                    if writer is not None
                    and writer.kind == "Conv"
                    and len(readers[writer.name]) == 1
                    and writer.name not in taken
                ),
                None,
            )
            if joins is not None:
                joined[operator.name] = joins
        if in_blocks and operator.name not in quantized:
            blocked.add(operator.name)
    return joined


def accumulated(operator: Operator, images: Tensor, added: Tensor | None = None) -> Tensor:
    """What the convolution `operator`, which `is_blocked`, makes of `images` (N, C, H, W); plus `added`."""
    if len(images) == 1:  # of a single image, PyTorch leaves small maps to kernels that add in another order
        more = None if added is None else added.expand(2, *added.shape[1:])
        return accumulated(operator, images.expand(2, *images.shape[1:]), more)[:1]
    weight, groups = operator.constant(), operator.integer("group")
    if groups == 1 or weight.shape[1] == 1:
        total = _total(operator, images, added)
    else:
        starts = (None,) * groups if added is None else added.chunk(groups, 1)
        attributes = {**operator.attributes, "group": 1}
        results = []
        for kernel, image, start in zip(weight.chunk(groups), images.chunk(groups, 1), starts, strict=True):
            results.append(_total(replace(operator, weight=kernel, attributes=attributes), image, start))
        total = torch.cat(results, 1)
    return total if operator.bias is None else total + operator.bias.reshape(-1, 1, 1)


def _total(operator: Operator, images: Tensor, added: Tensor | None) -> Tensor:
    """The parts of the sum, added one after another, first to `added`; without the bias."""
    parts = _parts(operator, images)
    return reduce(torch.add, parts if added is None else (added, *parts))


def _parts(operator: Operator, images: Tensor) -> Iterator[Tensor]:
    """What the input channels give that are summed at a time."""
    weight = operator.constant()
    channels = weight.shape[1]
    if operator.integer("group") > 1:
        yield compute(replace(operator, bias=None), images)
        return
    width = 1 if channels < BLOCK else POINTWISE_CHANNELS if weight[0, 0].numel() == 1 else BLOCK
    if width == 1:  # cut out of channels-last, a single channel's window is added in another order
        images, weight = images.contiguous(), weight.contiguous()
    for kernel, taken in zip(torch.split(weight, width, 1), torch.split(images, width, 1), strict=True):
        yield compute(replace(operator, weight=kernel, bias=None), taken)
