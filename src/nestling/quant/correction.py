"""Biases that make up for what rounding does to the mean of a layer's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.models.operators import compute
from nestling.quant.fake import rounded
from nestling.quant.ranges import Range
from nestling.quant.walking import Batches, Reading, walk


def correct_biases(
    graph: Graph,
    ranges: Mapping[str, Range],
    images: Iterable[Tensor],
    *,
    exact: Graph | None = None,
) -> tuple[Graph, Mapping[str, Range]]:
    """The graph, its biases such that each quantized layer's mean output is the float one's; with its ranges.

    The rounding errors of a layer's weights do not cancel: they, and those of the layers before, shift its
    outputs. Layer by layer, the shift of each channel is measured on `images`, the layers before corrected,
    and taken off the bias (Nagel et al. 2019, arXiv 1906.04721, appendix D). Convolutions and linear layers
    without a bias get one, and with it, where they compute on integers, a range: that of the products that
    it is added to. Products with a constant (MatMul) have no bias and stay as they are.

    Args:
        graph: the network, its weights as they are to be rounded.
        ranges: of its tensors and constants.
        images: batches (N, 3, R, R).
        exact: the float network, where the weights of `graph` were rounded before.

    Raises:
        ValueError: see `walk`.
    """
    found = dict(ranges)

    def corrected(operator: Operator, reading: Reading) -> Operator:
        if operator.kind not in ("Conv", "Gemm"):
            return operator
        name = f"{operator.name}.bias"
        if operator.bias is None:
            read, weight = ranges.get(operator.inputs[0]), ranges[f"{operator.name}.weight"]
            # A weight in blocks, whose scales have two axes, is computed in floats.
            if read is not None and weight.scale.ndim < 2:
                found[name] = products(read, weight)
            operator = replace(operator, bias=torch.zeros_like(operator.constant()[:, :1].flatten(1)[:, 0]))
        as_run = rounded(operator, found)
        assert as_run.bias is not None
        got = tuple(compute(as_run, batch) for batch in reading.rounded)
        shift = channel_means(got) - channel_means(reading.wanted)
        return replace(operator, bias=(as_run.bias.double() - shift).to(as_run.bias.dtype))

    return walk(graph, found, images, corrected, exact=exact), found


def products(read: Range, weight: Range) -> Range:
    """The range of sums of products: of a bias that is added to them as an integer of 32 bits."""
    return Range(
        weight.scale * read.scale.to(weight.scale.device),
        torch.zeros_like(weight.zero_point),
        "int32",
        None if weight.axis is None else 0,
    )


def channel_means(batches: Batches) -> Tensor:
    """The mean of each channel (axis 1) over all else, in 64 bits."""
    total = sum(batch.double().movedim(1, 0).flatten(1).sum(1) for batch in batches)
    assert isinstance(total, Tensor)
    return total / sum(batch.numel() // batch.shape[1] for batch in batches)
