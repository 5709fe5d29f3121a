"""A graph becomes a file in the precisions of a policy, for candidates and for probes of a runtime alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from nestling.export import save_onnx, to_onnx, with_metadata
from nestling.models.graph import Graph
from nestling.quant import QuantPolicy, Range, insert_qdq, observe, simulate


def write_file(
    graph: Graph,
    policy: QuantPolicy,
    images: Iterable[Tensor],
    path: Path,
    *,
    reduce_range: bool,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Mapping[str, Range]:
    """The ranges with which `graph` now lies at `path`, as an ONNX file in the precisions of `policy`.

    Args:
        graph: the network.
        policy: which layers compute in which precision.
        images: batches (N, 3, R, R) that the ranges of activations are observed on.
        path: the file; its folder is there.
        reduce_range: 7-bit weights where products are of 8 bits, for devices whose sums saturate.
        dynamic_batch: see `to_onnx`.
        metadata: what the file says of itself.

    Raises:
        ValueError: activations that are not finite, or a file beyond 2 GiB.
    """
    ranges = observe(graph, policy, images, reduce_range=reduce_range)
    model = insert_qdq(to_onnx(graph, dynamic_batch=dynamic_batch), ranges)
    save_onnx(with_metadata(model, metadata) if metadata else model, path)
    return ranges


def simulated_logits(graph: Graph, ranges: Mapping[str, Range], images: Tensor) -> Tensor:
    """What the file that `write_file` wrote must compute for `images`: logits (N, classes)."""
    return simulate(graph, ranges).run(images)
