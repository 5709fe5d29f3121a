"""What is simulated is what ships: PyTorch's simulation and ONNX Runtime agree on real images.

For five families, ten random pairs of an arch and a policy (no two alike; each block in a precision with a
chance of 3 in 4, else in floats; precisions are those that the device can use and that are not simulated:
in one pair those with activations in 8 bits, so that most blocks in integers have others beside them, and in
the next all, weight-only ones included; activations of one file all signed or all unsigned), quantized and
written as candidates are: the same 1,000 test images of CIFAR-10, at 32 px, through the simulation and
through the quantized file in ONNX Runtime.
Networks have random weights (residual branches weak beside their shortcuts, as training leaves them),
normalization of their own, and a classifier fitted in closed form (ridge regression on the labels of 2,000
training images): so that top-1 is far from chance, and ties between classes are as close as they get.

Claims:

1. of each of the 50, top-1 differs by at most 0.5 points;
2. of each of the 50, 99 % of the logits differ by at most one quantization step. Logits are floats: as their
   step counts that of an 8-bit tensor which spans them all, the 255th part of the distance from the smallest
   to the largest.

    python benchmarks/quant_parity.py --data PARQUET_FOLDER [--check] [--pairs 10] [--images 1000]

Takes 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arch_switch import SPACES
from quant_speed import blocks_of, calm
from record import Benchmark, Figures
from torch import Tensor

from nestling.config import DataConfig
from nestling.data import EvalImages, load_data
from nestling.models.families import family
from nestling.models.graph import Graph, trace
from nestling.models.supernet import Supernet
from nestling.pipeline.precisions import probe, usable
from nestling.pipeline.probes import WEIGHTED
from nestling.pipeline.writing import simulated, write_file
from nestling.profile import Device, connect
from nestling.quant import PRECISIONS, QuantPolicy, quantize
from nestling.space import Arch, load_space
from nestling.train.evaluate import recalibrate

FAMILIES = ("ofa_mobilenetv3_w10", "resnet_cifar", "vit_cifar", "convnext_tiny", "timm_resnet18")
PIXELS = 32
FITTED_IMAGES, CALIBRATION_IMAGES, BATCH = 2000, 128, 250
POINTS, WITHIN = 0.5, 0.99
RIDGE = 0.1


def with_classifier(graph: Graph, images: EvalImages) -> Graph:
    """`graph`, its last layer fitted to the labels of `images` by ridge regression."""
    last = graph.operators[-1]
    if last.kind != "Gemm" or last.weight is None:
        raise ValueError(f"{last.name} is a {last.kind}; only a linear classifier can be fitted")
    features: list[Tensor] = []

    def keep(name: str, tensor: Tensor) -> Tensor:
        if name == last.inputs[0]:
            features.append(tensor)
        return tensor

    for batch in images.at(PIXELS, batch_size=BATCH):
        graph.run(batch.images, after=keep)
    read = torch.cat(features).double()
    labels = torch.nn.functional.one_hot(torch.from_numpy(images.labels), len(images.classes)).double()
    middle = read.mean(0)
    centred = read - middle
    squares = centred.T @ centred
    squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    weight = torch.linalg.solve(squares, centred.T @ (labels - labels.mean(0))).T
    bias = labels.mean(0) - weight @ middle
    fitted = replace(last, weight=weight.float(), bias=bias.float())
    return replace(graph, operators=(*graph.operators[:-1], fitted))


def usable_precisions(device: Device) -> tuple[str, ...]:
    """The precisions but fp32 that `device` can use for layers of any kind."""
    names = [name for name, precision in PRECISIONS.items() if name != "fp32" and not precision.simulated]
    kept, _ = usable(names, probe(device, names, kinds=WEIGHTED))
    return kept


def on_integers(precisions: Iterable[str]) -> list[str]:
    """Those of `precisions` whose layers read integers."""
    return [name for name in precisions if PRECISIONS[name].activation is not None]


def drawn_from(pair: int, precisions: Sequence[str]) -> Sequence[str]:
    """What the policy of a family's `pair`-th pair chooses from: in turn those on integers, and all."""
    return precisions if pair % 2 else on_integers(precisions)


def random_policy(graph: Graph, rng: random.Random, *, precisions: Sequence[str]) -> QuantPolicy:
    """One of `precisions` for each block with a chance of 3 in 4; for one at least.

    Activations are all signed or all unsigned: no runtime has a kernel between the two.
    """
    formats = {name: PRECISIONS[name].activation for name in precisions}
    signs = {format.signed for format in formats.values() if format is not None}
    signed = rng.choice(sorted(signs)) if signs else None
    offered = [name for name, format in formats.items() if format is None or format.signed is signed]
    blocks = blocks_of(graph)
    chosen = [block for block in blocks if rng.random() < 0.75] or blocks[:1]
    return QuantPolicy(tuple((block, rng.choice(offered)) for block in chosen))


def integer_blocks(graph: Graph, policy: QuantPolicy) -> tuple[int, int]:
    """How many blocks of `graph` read integers under `policy`, and how many of them follow another such."""
    rules = dict(policy.rules)
    integers = set(on_integers(set(rules.values())))
    read = [rules.get(block) in integers for block in blocks_of(graph)]
    return sum(read), sum(before and this for before, this in pairwise(read))


def compare(graph: Graph, policy: QuantPolicy, data: Any, device: Device, *, images: int) -> dict[str, Any]:
    """How the simulation and the file differ on the first `images` test images."""
    scored = data.test().take(images)
    train = data.train.calibration(CALIBRATION_IMAGES)
    calibration = [batch.images for batch in train.at(PIXELS, batch_size=BATCH)]
    quantized = quantize(graph, policy, calibration, reduce_range=device.fingerprint.int8_saturates)
    expected = torch.cat(
        [simulated(quantized, batch.images).logits for batch in scored.at(PIXELS, batch_size=BATCH)]
    ).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_file(quantized, path, dynamic_batch=True)
        got = device.predict(path, scored.array(PIXELS))
    step = float(expected.max() - expected.min()) / 255
    differences = np.abs(expected - got) / step
    hits = [logits.argmax(axis=1) == scored.labels for logits in (expected, got)]
    return {
        "quantized": len(quantized.ranges),
        "simulated_top1": round(float(hits[0].mean()), 5),
        "runtime_top1": round(float(hits[1].mean()), 5),
        "same_prediction": round(float((expected.argmax(axis=1) == got.argmax(axis=1)).mean()), 5),
        "identical": round(float((differences == 0).mean()), 5),
        "within_a_step": round(float((differences <= 1).mean()), 5),
        "median_steps": round(float(np.median(differences)), 5),
        "worst_steps": round(float(differences.max()), 3),
    }


def measure(options: argparse.Namespace) -> Figures:
    """The comparisons of every family; prints a line for each."""
    torch.set_num_threads(options.threads)
    data = load_data(DataConfig(source=options.data, size=PIXELS, test_images=options.images), seed=0)
    found: dict[str, list[dict[str, Any]]] = {}
    with connect("ort:cpu?threads=1") as device:
        precisions = usable_precisions(device)
        for name in options.spaces:
            rng = random.Random(0)
            space = load_space(SPACES / f"{name}.toml")
            space = space.with_constants({"classes": len(data.classes), "resolution": PIXELS})
            kin = family(space.family)
            torch.manual_seed(0)
            supernet = Supernet(space, kin.build, layout=kin.layout)
            calm(supernet.largest)
            found[name] = []
            seen: set[tuple[Arch, QuantPolicy]] = set()
            while len(found[name]) < options.pairs:
                arch = space.sample(rng)
                network = supernet.materialize(arch)
                fitted = data.train.calibration(FITTED_IMAGES)
                recalibrate(network, (batch.images for batch in fitted.at(PIXELS, batch_size=BATCH)))
                graph = with_classifier(trace(network, resolution=PIXELS), fitted)
                drawn = drawn_from(len(found[name]), precisions)
                policy = random_policy(graph, rng, precisions=drawn)
                if (arch, policy) in seen:
                    continue
                seen.add((arch, policy))
                reading, following = integer_blocks(graph, policy)
                told = {
                    "arch": arch.key,
                    "drawn_from": list(drawn),
                    "rules": dict(policy.rules),
                    "blocks": len(blocks_of(graph)),
                    "integer_blocks": reading,
                    "following_another": following,
                }
                row = compare(graph, policy, data, device, images=options.images)
                found[name].append({**told, **row})
            print(line(name, found[name]), flush=True)
    return {
        "images": options.images,
        "pixels": PIXELS,
        "precisions": list(precisions),
        "families": found,
        "worst_by_kind": worst_by_kind(row for rows in found.values() for row in rows),
    }


def worst_by_kind(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The worst figures of the files of a kind: what their layers read and keep beside floats.

    A kind is `integers` (layers read them), `weights` (weight-only precisions) or `both`; a precision whose
    files have no other is one too.
    """
    worst: dict[str, dict[str, float]] = {}
    for row in rows:
        names = set(row["rules"].values())
        integers = set(on_integers(names))
        kind = "integers" if names == integers else "both" if integers else "weights"
        for name in (kind, *(names if len(names) == 1 else ())):
            known = worst.setdefault(name, {"files": 0, "points": 0.0, "within_a_step": 1.0})
            known["files"] += 1
            known["points"] = round(max(known["points"], points(row)), 3)
            known["within_a_step"] = min(known["within_a_step"], row["within_a_step"])
    return dict(sorted(worst.items()))


def points(row: Any) -> float:
    """The difference of top-1 in points."""
    return 100 * abs(float(row["simulated_top1"]) - float(row["runtime_top1"]))


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """One family's comparisons, for reading."""
    top1 = [row["runtime_top1"] for row in rows]
    told = ("within_a_step", "same_prediction", "identical")
    least = {key: 100 * min(row[key] for row in rows) for key in told}
    return (
        f"{name:24} {len(rows)} pairs, top-1 {100 * min(top1):.1f} to {100 * max(top1):.1f}; differs by "
        f"at most {max(map(points, rows)):.1f} points; {least['within_a_step']:.2f} % of logits "
        f"or more within a step, {least['identical']:.2f} % or more the same to the last bit; "
        f"{least['same_prediction']:.1f} % of predictions or more alike; {of_blocks(rows)}"
    )


def of_blocks(rows: Sequence[dict[str, Any]]) -> str:
    """How many blocks of these pairs read integers, and how many of them follow another such."""
    counted = ("blocks", "integer_blocks", "following_another")
    blocks, integers, following = (sum(row[key] for row in rows) for key in counted)
    return f"of {blocks} blocks {integers} read integers, {following} after another that does"


def misses(figures: Figures) -> list[str]:
    """The pairs that differ by more than claimed."""
    found = []
    for name, rows in figures["families"].items():
        for row in rows:
            if not points(row) <= POINTS + 1e-9:
                found.append(f"{name} {row['arch']}: top-1 differs by {points(row):.1f} points")
            if not (share := row["within_a_step"]) >= WITHIN:
                found.append(f"{name} {row['arch']}: {100 * share:.2f} % of logits within a step, not 99 %")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    rows = [row for rows in figures["families"].values() for row in rows]
    return (
        f"{len(rows)} quantized subnets of {len(figures['families'])} families, {figures['images']} images: "
        f"top-1 of simulation and ONNX Runtime differ by at most {max(map(points, rows)):.1f} points, "
        f"{100 * min(row['within_a_step'] for row in rows):.2f} % of a subnet's logits or more agree to a "
        f"step, in {sum(row['identical'] == 1 for row in rows)} of {len(rows)} all of them to the last bit; "
        f"{of_blocks(rows)}"
    )


BENCHMARK = Benchmark("quant_parity", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--data", help="CIFAR-10 as Parquet: a folder, or a dataset's name on the hub")
    parser.add_argument("--pairs", type=int, default=10, help="of each family [default: 10]")
    parser.add_argument("--images", type=int, default=1000, help="[default: 1000]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument(
        "--spaces",
        nargs="+",
        default=list(FAMILIES),
        metavar="NAME",
        help="[default: those of five families]",
    )
    options = parser.parse_args(words)
    if options.data is None and not options.stored:
        parser.error("give --data, the folder of CIFAR-10's Parquet files, or --stored")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
