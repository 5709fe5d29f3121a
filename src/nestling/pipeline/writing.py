"""A quantized graph becomes a file, for candidates and for probes of a runtime alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.export import Unwritable, load_onnx, official_export, save_onnx, to_onnx, with_metadata
from nestling.quant import Quantized, insert_qdq, simulate, with_integers


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
        Unwritable: a file beyond 2 GiB.
    """
    graph = with_integers(quantized.graph, quantized.ranges)
    model = insert_qdq(to_onnx(graph, dynamic_batch=dynamic_batch), quantized.ranges)
    save_onnx(with_metadata(model, metadata) if metadata else model, path)


def write_officially(
    network: nn.Module,
    path: Path,
    *,
    resolution: int,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `network` to `path` by PyTorch's own exporter: for one that `trace` does not cover.

    Args:
        network: in evaluation mode; it takes some seconds.
        path: the file; its folder is there.
        resolution: of its images, in pixels.
        dynamic_batch: see `to_onnx`.
        metadata: what the file says of itself.

    Raises:
        Unwritable: the exporter does not cover it either, or a file beyond 2 GiB.
    """
    try:
        official_export(network, path, resolution=resolution, dynamic_batch=dynamic_batch)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        told = next(iter(str(error).strip().splitlines()), "")
        raise Unwritable(f"torch.onnx.export cannot write it: {type(error).__name__}: {told}") from error
    if metadata:
        save_onnx(with_metadata(load_onnx(path), metadata), path)


@dataclass(frozen=True, slots=True, eq=False)
class Simulated:
    """What a file must compute.

    Attributes:
        logits: (N, classes).
        rounds_floats: whether some of it is integers made of computed floats, of which last bits decide.
    """

    logits: Tensor
    rounds_floats: bool


def simulated(quantized: Quantized, images: Tensor) -> Simulated:
    """What the file that `write_file` wrote must compute for `images`."""
    simulation = simulate(quantized.graph, quantized.ranges)
    return Simulated(simulation.run(images), simulation.rounds_floats)
