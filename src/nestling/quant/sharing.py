"""Which tensors of a graph may share a scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nestling.models.graph import Graph, Operator
from nestling.quant.statistics import Bounds


def shared_groups(
    graph: Graph,
    integer: Collection[Operator],
    sources: Mapping[str, str],
    *,
    kinds: Collection[str],
) -> list[frozenset[str]]:
    """The tensors, as named in the values of `sources`, that must share a scale, group by group.

    Those that an integer operator of one of `kinds` reads and writes are one group, and groups that meet are
    one: all sums along a residual stream.

    Args:
        graph: the network.
        integer: its operators that are computed on integers.
        sources: tensor -> the tensor whose numbers set its range.
        kinds: such as `Add` and `Concat`.
    """
    readers = graph.readers()
    groups: list[frozenset[str]] = []
    for operator in integer:
        if operator.kind not in kinds:
            continue
        result = operator.name
        while result not in sources and [reader.kind for reader in readers[result]] in (["Relu"], ["Clip"]):
            result = readers[result][0].name  # the runtime computes it as part of the operator
        met = frozenset(sources[name] for name in (*operator.inputs, result) if name in sources)
        if len(met) < 2:
            continue
        touching = [group for group in groups if group & met]
        groups = [group for group in groups if not group & met]
        groups.append(met.union(*touching))
    return groups


def with_shared_bounds(
    bounds: Mapping[str, Bounds], groups: Collection[Collection[str]]
) -> dict[str, Bounds]:
    """`bounds` with those of each group replaced by what spans them all."""
    shared = dict(bounds)
    for group in groups:
        low, high = min(bounds[name][0] for name in group), max(bounds[name][1] for name in group)
        shared |= dict.fromkeys(group, (low, high))
    return shared
