"""A quantized graph becomes a file, for candidates and for probes of a runtime alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nestling.export import save_onnx, to_onnx, with_metadata
from nestling.quant import Quantized, insert_qdq, simulate


def write_file(
    quantized: Quantized,
    path: Path,
    *,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `quantized` to `path` as an ONNX file.

    Args:
        quantized: the network.
        path: the file; its folder is there.
        dynamic_batch: see `to_onnx`.
        metadata: what the file says of itself.

    Raises:
        ValueError: a file beyond 2 GiB.
    """
    model = insert_qdq(to_onnx(quantized.graph, dynamic_batch=dynamic_batch), quantized.ranges)
    save_onnx(with_metadata(model, metadata) if metadata else model, path)


def simulated_logits(quantized: Quantized, images: Tensor) -> Tensor:
    """What the file that `write_file` wrote must compute for `images`: logits (N, classes)."""
    return simulate(quantized.graph, quantized.ranges).run(images)
