"""The range of every quantized tensor of a graph, from what its tensors held on images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.calibration import METHODS, WITHOUT_COUNTS, Method, WeightMethod
from nestling.quant.constants import constant_ranges
from nestling.quant.policy import QuantPolicy
from nestling.quant.ranges import Range, activation_range
from nestling.quant.regions import activation_formats, is_integer, sources_of
from nestling.quant.sharing import shared_groups, with_shared_bounds
from nestling.quant.statistics import Histogram, collect


def observe(
    graph: Graph,
    policy: QuantPolicy,
    images: Iterable[Tensor],
    *,
    method: Method = "minmax",
    weights: WeightMethod = "minmax",
    shared: Collection[str] = (),
    reduce_range: bool = False,
) -> Mapping[str, Range]:
    """The `ranges` of `graph` from one pass over `images`; no image is read where none is quantized.

    Args:
        graph: the network.
        policy: which layers.
        images: batches (N, 3, R, R) on the device of the graph's weights; they set the ranges of activations.
        method: see `ranges`.
        weights: see `ranges`.
        shared: see `ranges`.
        reduce_range: see `ranges`.

    Raises:
        ValueError: no images, or activations that are not finite.
    """
    names = needed(graph, policy)
    statistics = collect(graph, images, names, counts=method not in WITHOUT_COUNTS) if names else {}
    return ranges(
        graph,
        policy,
        statistics,
        method=method,
        weights=weights,
        shared=shared,
        reduce_range=reduce_range,
    )


def needed(graph: Graph, policy: QuantPolicy) -> frozenset[str]:
    """The tensors whose statistics `ranges` reads; none where `policy` computes nothing on integers."""
    formats = activation_formats(graph, _on_integers(graph, policy), policy)
    return frozenset(sources_of(graph, formats).values())


@torch.no_grad()
def ranges(
    graph: Graph,
    policy: QuantPolicy,
    statistics: Mapping[str, Histogram],
    *,
    method: Method = "minmax",
    weights: WeightMethod = "minmax",
    shared: Collection[str] = (),
    reduce_range: bool = False,
) -> Mapping[str, Range]:
    """Name -> range, for every tensor, weight and bias that `policy` quantizes; empty where that is none.

    Tensors have the names of the graph; an operator's constants are called `<operator>.weight` and
    `<operator>.bias`, as in the ONNX file. A quantized operator has ranges for what it reads and, after a
    ReLU or clip that it alone feeds, for what it writes; the network's logits stay floats. What only moves
    numbers keeps the range of what it moves.

    Args:
        graph: the network.
        policy: which layers.
        statistics: tensor -> histogram, with at least the `needed` ones, of the network in floats.
        method: how a tensor's bounds follow from its histogram, see `nestling.quant.calibration`.
        weights: whether each channel's integers span all its weights (`minmax`) or are spread so that they
            have the least squared error (`mse`). Below 8 bits they have it in any case; a group's integers,
            of layers that compute on floats, always span its weights.
        shared: kinds of operators, such as `Add`, that read and write tensors of one range, which spans them
            all. ONNX Runtime's sums and products scale each operand by itself, so it gains nothing there and
            the numbers get coarser; it is for targets that add integers as they are.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI: their products of unsigned and signed bytes
            are added in 16 bits that overflow, and the runtime silently computes something else.

    Raises:
        ValueError: no statistics of a tensor that is needed, or extremes only where `method` reads counts.
    """
    integer = _on_integers(graph, policy)
    formats = activation_formats(graph, integer, policy)
    sources = sources_of(graph, formats)
    missing = set(sources.values()) - statistics.keys()
    if missing:
        raise ValueError(f"no statistics of tensor {min(missing)!r}; collect what `needed` names")
    bounds = {name: METHODS[method](statistics[name], formats[name]) for name in set(sources.values())}
    bounds = with_shared_bounds(bounds, shared_groups(graph, integer, sources, kinds=shared))
    found = {name: activation_range(*bounds[source], formats[source]) for name, source in sources.items()}
    return found | constant_ranges(graph, policy, found, weights=weights, reduce_range=reduce_range)


def _on_integers(graph: Graph, policy: QuantPolicy) -> list[Operator]:
    return [operator for operator in graph.operators if is_integer(operator, policy)]
