"""Networks that were not made for it become supernets: `nestling.models.convert` on timm's models.

Claims, for each of 24 convolutional networks and 9 like the vision transformer, with random weights:

1. The largest network computes what the given one does: to 1e-5 of the largest logit.
2. The smallest network takes at most half the multiply-accumulates.
3. Five random networks export to ONNX, and ONNX Runtime computes their logits from the file to 1e-4.
4. With lent weights they compute what they compute alone: difference 0.0.

At least 20 and 5 of them must hold; a network that does not is listed with the reason.

    python benchmarks/convert_sweep.py [--check] [--only NAME ...]

Takes about 10 minutes on one core. A network that `trace` does not cover is exported by PyTorch's exporter.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from record import Benchmark, Figures

from nestling.export import official_export, save_onnx, to_onnx, verify
from nestling.models.convert import convert_timm
from nestling.models.cost import cost
from nestling.models.graph import trace
from nestling.models.supernet import Supernet
from nestling.models.tracing import Untraceable
from nestling.space import Arch

CNNS = (
    "resnet18", "resnet50", "resnext50_32x4d", "ecaresnet26t", "skresnet18", "cspresnet50", "darknet17",
    "dla34", "ese_vovnet19b_dw", "regnetx_002", "regnety_002", "mobilenetv1_100", "mobilenetv2_050",
    "efficientnet_b0",
    "mobilenetv3_small_050", "mnasnet_050", "lcnet_050", "hardcorenas_a", "rexnet_100", "ghostnet_050",
    "densenet121", "convnext_atto", "starnet_s1", "inception_next_atto",
)  # fmt: skip
VITS = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "poolformer_s12", "resmlp_12_224",
    "edgenext_xx_small", "cait_xxs24_224", "deit3_small_patch16_224", "pit_ti_224",
)  # fmt: skip
SIDE, CLASSES, SUBNETS = 64, 10, 5
WANTED = {"cnn": 20, "vit": 5}
SAME, HALF, EXPORTED = 1e-5, 0.5, 1e-4


def convert_one(name: str) -> dict[str, Any]:
    """The figures of one model; `failed` says what does not hold."""
    started = time.monotonic()
    torch.manual_seed(0)
    conversion = convert_timm(name, resolution=SIDE, classes=CLASSES)
    seconds = time.monotonic() - started
    supernet = conversion.supernet()
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = conversion.network(images)
        got = supernet.materialize(supernet.space.largest)(images)
    same = float((got - expected).abs().max() / expected.abs().max())
    smallest, largest = (
        cost(supernet.materialize(arch), SIDE).macs
        for arch in (supernet.space.smallest, supernet.space.largest)
    )
    figures: dict[str, Any] = {
        "choices": len(supernet.space.open_choices),
        "elastic_share": conversion.coverage.elastic_share,
        "refused": dict(conversion.coverage.refused),
        "convert_s": round(seconds, 2),
        "largest_difference": same,
        "smallest_macs": smallest / largest,
        "subnets": [],
        "failed": [],
    }
    if same > SAME:
        figures["failed"].append(f"the largest network differs by {same:.1e}")
    if smallest > HALF * largest:
        figures["failed"].append(f"the smallest network takes {smallest / largest:.0%} of the MACs")
    rng = random.Random(0)
    for _ in range(SUBNETS):
        subnet = check_subnet(supernet, supernet.space.sample(rng))
        figures["subnets"].append(subnet)
        if "failed" in subnet:
            figures["failed"].append(subnet["failed"])
    return figures


def check_subnet(supernet: Supernet, arch: Arch) -> dict[str, Any]:
    """How far a subnet's lent weights, and its ONNX file, are from the subnet alone."""
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    subnet = supernet.materialize(arch)
    with torch.no_grad():
        supernet.train()
        torch.manual_seed(0)  # for stochastic depth, where the model has it
        lent = supernet(images, arch)
        torch.manual_seed(0)
        alone = subnet.train()(images.contiguous(memory_format=torch.channels_last))
        subnet.eval()
        difference = float((lent - alone).abs().max())
    told: dict[str, Any] = {"arch": arch.key, "lent_difference": difference}
    if difference > 0:
        return {**told, "failed": f"{arch.key} computes something else with lent weights: {difference:.1e}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            save_onnx(to_onnx(trace(subnet, resolution=SIDE)), path)
            told["exporter"] = "trace"
        except Untraceable as untraceable:
            told["exporter"] = f"torch.onnx, because {untraceable}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                official_export(subnet, path, resolution=SIDE)
        with torch.no_grad():
            expected = subnet(images[:1])
        try:
            model = verify(path, images[:1], expected=expected, run=predict, tolerance=EXPORTED)
        except ValueError as error:
            return {**told, "failed": f"{arch.key}: {error}"}
    return {**told, "export_error": model.worst_error}


def predict(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ONNX Runtime computes from the file at `path`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(logits, np.float32)


def measure(options: argparse.Namespace) -> Figures:
    models: dict[str, dict[str, Any]] = {}
    for kind, names in (("cnn", CNNS), ("vit", VITS)):
        for name in names:
            if options.only and name not in options.only:
                continue
            started = time.monotonic()
            try:
                figures = convert_one(name)
            except Exception as error:  # one network must not keep the others from being told
                figures = {"failed": [f"{type(error).__name__}: {error}"], "choices": 0, "smallest_macs": 1.0}
            models[name] = {"kind": kind, **figures, "seconds": round(time.monotonic() - started, 1)}
            told = models[name]
            print(
                f"{name:24} {told['choices']:4} choices, smallest {told['smallest_macs']:4.0%} of the MACs, "
                f"{told['seconds']:5.1f} s: {'; '.join(told['failed']) or 'holds'}",
                file=sys.stderr,
                flush=True,
            )
    return {"side": SIDE, "models": models}


def holding(figures: Figures, kind: str) -> list[str]:
    """The models of a kind for which every claim holds."""
    models = figures["models"].items()
    return [name for name, told in models if told["kind"] == kind and not told["failed"]]


def sentence(figures: Figures) -> str:
    models = figures["models"].values()
    smallest = sorted(told["smallest_macs"] for told in models if not told["failed"])
    middle = f"{smallest[len(smallest) // 2]:.0%}" if smallest else "-"
    return (
        f"convert: {len(holding(figures, 'cnn'))} of {sum(m['kind'] == 'cnn' for m in models)} CNNs and "
        f"{len(holding(figures, 'vit'))} of {sum(m['kind'] == 'vit' for m in models)} ViT-like models became "
        f"supernets; the smallest network has {middle} of the MACs (median), every sampled subnet exports"
    )


def misses(figures: Figures) -> list[str]:
    told = []
    for kind, wanted in WANTED.items():
        count = len(holding(figures, kind))
        if count < wanted:
            failed = {
                n: m["failed"] for n, m in figures["models"].items() if m["kind"] == kind and m["failed"]
            }
            told.append(f"{count} models of kind {kind} hold, {wanted} are wanted; not: {failed}")
    return told


BENCHMARK = Benchmark("convert_sweep", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these models alone")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
