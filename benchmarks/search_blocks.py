"""Measures the table of blocks of the third oracle of `search_efficiency.py` on this machine.

Each block of the oracle's space is a network of its own between a convolution that widens and a classifier;
what these two take alone is subtracted. The files are quantized, written and timed as those of a search are.

    python benchmarks/search_blocks.py [--device ort:cpu?threads=1]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch
from record import RESULTS, place, store
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from nestling.models.graph import trace
from nestling.pipeline.writing import write_file
from nestling.profile import Device, connect
from nestling.quant import QuantPolicy, quantize

TABLE = RESULTS / "search_blocks.json"
STAGES = {"s1": (16, 24, 56), "s2": (24, 40, 28), "s3": (40, 80, 14), "s4": (80, 112, 14)}
"""Stage -> channels before it and in it, and the pixels along a side at which its blocks are timed."""
KERNELS, EXPANDS, PRECISIONS = (3, 5), (3, 4, 6), ("w8a8", "fp32")


class Network(nn.Module):
    """A block, where there is one, between a convolution from colours and a classifier."""

    def __init__(self, channels: int, block: nn.Module | None, out: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.block = block or nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(out, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits (N, 10) of images (N, 3, R, R)."""
        return self.head(self.pool(self.block(self.stem(images))).flatten(1))


def milliseconds(network: nn.Module, side: int, precision: str, *, device: Device, folder: Path) -> float:
    """How long the network takes for one image, in layers of `precision`."""
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    graph = trace(network.eval(), resolution=side, image=images[:1])
    policy = QuantPolicy(tuple((name, precision) for name in ("stem", "block", "head")))
    quantized = quantize(graph, policy, [images], reduce_range=device.fingerprint.int8_saturates)
    path = folder / "block.onnx"
    write_file(quantized, path)
    return device.measure(path).latency_ms


def table(device: Device) -> dict[str, float]:
    """Milliseconds of each block, by `stage.place.kernel.expand.precision`."""
    found: dict[str, float] = {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for stage, (before, width, side) in STAGES.items():
            for place_, precision in itertools.product(("first", "later"), PRECISIONS):
                into = before if place_ == "first" else width
                empty = milliseconds(
                    Network(into, None, into), side, precision, device=device, folder=Path(folder)
                )
                for kernel, expand in itertools.product(KERNELS, EXPANDS):
                    block = InvertedResidual(into, width, kernel, stride=1, exp_ratio=expand)
                    whole = milliseconds(
                        Network(into, block, width), side, precision, device=device, folder=Path(folder)
                    )
                    found[f"{stage}.{place_}.{kernel}.{expand}.{precision}"] = max(whole - empty, 1e-4)
                print(f"{stage} {place_} {precision}: the last one took {whole:.3f} ms", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="ort:cpu?threads=1", help="[default: ort:cpu?threads=1]")
    options = parser.parse_args()
    about = place()
    with connect(options.device, seconds=0.3, tolerance=0.02) as device:
        found = table(device)
    store(TABLE, {"benchmark": "search_blocks", **about, "device": options.device, "ms": found})
    print(f"{len(found)} blocks, from {min(found.values()):.3f} to {max(found.values()):.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
