"""What the benchmarks of latency share: timm networks with random weights, as ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from nestling.export import save_onnx, to_onnx
from nestling.models.graph import trace

NETWORKS = (
    "mobilenetv3_small_100", "resnet18", "efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto",
)  # fmt: skip


def write_networks(folder: Path, names: Sequence[str], *, pixels: int) -> dict[str, Path]:
    """The file of each timm model, for one image of `pixels` x `pixels`."""
    files = {}
    for name in names:
        torch.manual_seed(0)
        sized = {"img_size": pixels} if name.startswith("vit") else {}
        network: nn.Module = timm.create_model(name, **sized).eval()
        files[name] = folder / f"{name}.onnx"
        save_onnx(to_onnx(trace(network, resolution=pixels)), files[name])
    return files
