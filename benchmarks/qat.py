"""Training in few bits against rounding afterwards, on one subnet of each of two families, on CIFAR-10.

A small MobileNet and a small vision transformer are trained in floats. Each is then rounded as it is (PTQ:
ranges of least squared error from 128 images); rounded with care (weights after GPTQ, biases corrected, the
best that needs no training); trained further in floats, and rounded (so that what more training gains is
told apart); and trained for as many epochs in its precisions (`finetune --qat`), by LSQ
and, in 4 bits, by OFQ, taught by the network in floats as the other one is. Once in 8 bits, and once with
4-bit weights and activations, the first and last layers in 8 bits, as LSQ's authors keep them.

Accuracies are those of the files, as ONNX Runtime computes them, on 5,000 test images by which nothing was
chosen. 4 bits are simulated in 8-bit integers: they tell of accuracy, not of speed.

Claim: of both ways to train in few bits and all to round, training is better in 4 bits by at least two
points of top-1, and in 8 bits worse by at most one.

    python benchmarks/qat.py --data DIR [--check] [--size long|cpu|quick] [--work DIR]

DIR holds CIFAR-10 as Parquet. What is finished is kept in `--work`: the same command continues a run that
was killed. A table lies beside the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, Benchmark, Figures

from nestling.config import load_config, override_config
from nestling.pipeline import Silent, finetune, tuning
from nestling.pipeline.candidate import write_candidate
from nestling.pipeline.measuring import score
from nestling.pipeline.quantized_training import METHODS, Method
from nestling.pipeline.stages import open_run
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.run import Run
from nestling.space import Arch

LEAST_GAIN_4_BITS = 0.02
"""Of top-1, of the better way of training in few bits over both ways of rounding."""
MOST_LOSS_8_BITS = 0.01
PRECISIONS: Mapping[str, tuple[Method, ...]] = {"w8a8": ("lsq",), "w4a4": METHODS}
"""And the ways to train in them: in 8 bits OFQ has nothing of its own."""
INNER, OUTER = ["w4a4", "w8a8", "fp32"], ["w8a8", "fp32"]
SPACES = {
    "mobilenet": """
family = "mobilenet"
resolution = 16
act = "relu"
stages = [
  { block = "ds", width = 16, depth = 1, kernel = 3, precision = INNER },
  { block = "mbconv", width = 24, depth = 2, kernel = 3, expand = 3, stride = 2, precision = INNER },
  { block = "mbconv", width = 40, depth = 2, kernel = 3, expand = 3, stride = 2, precision = INNER },
  { block = "mbconv", width = 64, depth = 1, kernel = 3, expand = 3, stride = 2, precision = INNER },
]

[stem]
width = 16
stride = 1
precision = OUTER

[head]
kind = "efficientnet"
width = 128
precision = OUTER
""",
    "vit": """
family = "vit"
resolution = 16
patch = 4
head_dim = 16
pool = "avg"
stages = [{ depth = 4, heads = 3, mlp = 2, precision = INNER }]

[embed]
width = 48

[stem]
precision = OUTER

[head]
precision = OUTER
""",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained."""

    images: int
    epochs: float
    more_epochs: float


CAREFUL = "rounded with care"
ROUNDED = ("rounded", CAREFUL, "further in floats")
"""The ways to round; figures that were stored before there was the careful one lack it."""
SIZES = {"long": Size(20_000, 20, 4), "cpu": Size(5_000, 10, 2), "quick": Size(1_000, 2, 1)}
OPTIMIZERS: Mapping[str, Mapping[str, object]] = {
    "mobilenet": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4},
    "vit": {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05},
}


def measure(options: argparse.Namespace) -> Figures:
    """The accuracies of all files of both families; finished ones are taken as they are."""
    size = SIZES[options.size]
    families = {name: measure_family(name, size, options.data, options.work / name) for name in SPACES}
    figures = {"size": options.size, "images": size.images, "epochs": size.epochs}
    return {**figures, "more_epochs": size.more_epochs, "families": families}


def measure_family(name: str, size: Size, data: Path, folder: Path) -> dict[str, Any]:
    """The accuracies of one family's files, by precision and by what was done."""
    began = time.monotonic()
    bench = trained(name, size, data, folder)
    try:
        found: dict[str, Any] = {"macs": bench.macs(in_precision(bench, "fp32")), "precisions": {}}
        for precision in PRECISIONS:
            arch = in_precision(bench, precision)
            rows: dict[str, Any] = {}
            for what, given in ways(size, precision).items():
                card = finetune(bench, arch, tuning(bench, arch, **given), listener=Silent())
                rows.setdefault("rounded", row(card, "before"))
                rows[what] = row(card, "after")
                print(f"{name} {precision} {what}: {rows[what]['top1']:.4f}", file=sys.stderr, flush=True)
            rows[CAREFUL] = carefully(bench, arch)
            print(f"{name} {precision} {CAREFUL}: {rows[CAREFUL]['top1']:.4f}", file=sys.stderr, flush=True)
            found["precisions"][precision] = rows
        found["precisions"]["fp32"] = {"rounded": as_it_is(bench, in_precision(bench, "fp32"))}
    finally:
        bench.close()
    return {**found, "seconds": time.monotonic() - began}


def carefully(bench: Workbench, arch: Arch) -> dict[str, Any]:
    """The accuracy of the file of `arch`, rounded as well as it can be without training."""
    given = bench.config
    bench.config = override_config(given, ['quant.rounding="moments"', "quant.correct_biases=true"])
    try:
        return as_it_is(bench, arch)
    finally:
        bench.config = given


def as_it_is(bench: Workbench, arch: Arch) -> dict[str, Any]:
    """The accuracy of the file of `arch` after training in floats alone."""
    candidate = write_candidate(bench, arch, bench.run.folder / "candidates" / "as_it_is.onnx")
    accuracy = score(bench.device, candidate.path, bench.data.test(), resolution=candidate.resolution)
    told = {"top1": accuracy.top1, "interval": list(accuracy.interval), "correct": accuracy.correct}
    return {**told, "weight_bytes": candidate.weight_bytes}


def ways(size: Size, precision: str) -> dict[str, dict[str, Any]]:
    """What is done after training, and by which settings; learning rates are the defaults."""
    how: dict[str, Any] = {"epochs": size.more_epochs}
    # the largest network of a space of one is that network itself, in floats
    further = {"further in floats": {**how, "teacher": "largest"}}
    return further | {method: {**how, "qat": method} for method in PRECISIONS[precision]}


def trained(name: str, size: Size, data: Path, folder: Path) -> Workbench:
    """The run of one family, its one network trained in floats."""
    if not (folder / "run").exists():
        folder.mkdir(parents=True, exist_ok=True)
        space, config = folder / "space.toml", folder / "config.toml"
        space.write_text(SPACES[name].replace("INNER", json.dumps(INNER)).replace("OUTER", json.dumps(OUTER)))
        config.write_text(f'name = "{name}"\nspace = "{space}"\n')
        settings = {
            "data.source": str(data),
            "data.train_images": size.images,
            "data.search_images": 1000,
            "data.augment": "standard",
            "data.batch_size": 64,
            "data.size": 16,
            "train.strategy": "alone",
            "train.epochs": size.epochs,
            "train.warmup_epochs": min(1.0, size.epochs / 4),
            "search.recalibration_images": 1024,
            "quant.calibration": "mse",
            "profile.seconds": 0.05,
            **{f"train.{key}": value for key, value in OPTIMIZERS[name].items()},
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        Run.create(folder / "run", load_config(config, overrides=overrides))
    bench = open_run(folder / "run")
    train_supernet(bench, listener=Silent())
    return bench


def in_precision(bench: Workbench, precision: str) -> Arch:
    """The family's network: inner stages in `precision`, the first and last layers in 8 bits or in floats."""
    ends = "fp32" if precision == "fp32" else "w8a8"
    wanted = {
        name: (ends if name.startswith(("stem.", "head.")) else precision)
        if name.endswith(".precision")
        else value
        for name, value in bench.space.largest.items()
    }
    return bench.space.canonical(wanted)


def row(card: Mapping[str, Any], which: str) -> dict[str, Any]:
    """The accuracy of one file on the test images."""
    told = card["finetuning"][which]
    names = {"top1": "test_top1", "interval": "test_top1_interval", "correct": "test_correct"}
    return {name: told[key] for name, key in names.items()} | {"weight_bytes": card["weight_bytes"]}


def gains(figures: Figures, precision: str) -> dict[str, float]:
    """Family -> how much better the best training in few bits is than the best way to round."""
    found = {}
    for name, family in figures["families"].items():
        rows = family["precisions"][precision]
        learned = max(rows[method]["top1"] for method in PRECISIONS[precision])
        found[name] = learned - max(rows[way]["top1"] for way in ROUNDED if way in rows)
    return found


def table(figures: Figures) -> str:
    """All accuracies in Markdown, with their 95 % intervals."""
    columns = {
        "rounded": "as it is, rounded", CAREFUL: "as it is, after GPTQ",
        "further in floats": "further in floats, rounded", "lsq": "LSQ", "ofq": "OFQ",
    }  # fmt: skip
    lines = [
        "Test top-1 in % (95 % interval) of a network's files; "
        f"{figures['images']:,} training images, {figures['epochs']:g} epochs in floats, then "
        f"{figures['more_epochs']:g} more of each kind.",
        "",
        "| network | precision | " + " | ".join(columns.values()) + " |",
        "| --- | --- | " + " | ".join("---" for _ in columns) + " |",
    ]
    for name, family in figures["families"].items():
        for precision, rows in family["precisions"].items():
            cells = [cell(rows.get(column)) for column in columns]
            lines.append(f"| {name} | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(told: Mapping[str, Any] | None) -> str:
    """One accuracy as the table shows it."""
    if told is None:
        return ""
    low, high = told["interval"]
    return f"{100 * told['top1']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def sentence(figures: Figures) -> str:
    """The gains of training in few bits, in one line."""
    words = []
    for precision in PRECISIONS:
        told = ", ".join(f"{name} {100 * gain:+.1f}" for name, gain in gains(figures, precision).items())
        words.append(f"{precision}: {told}")
    return f"training in few bits against rounding, points of top-1: {'; '.join(words)}"


def misses(figures: Figures) -> list[str]:
    """Where training in few bits is not worth it."""
    return [
        f"{name} in {precision}: {100 * gain:+.2f} points, fewer than {100 * least:+.1f}"
        for precision, least in (("w8a8", -MOST_LOSS_8_BITS), ("w4a4", LEAST_GAIN_4_BITS))
        for name, gain in gains(figures, precision).items()
        if not gain >= least
    ]


def main(words: list[str] | None = None) -> int:
    """The exit code."""
    benchmark = Benchmark("qat", __doc__ or "", measure, sentence, misses)
    parser = benchmark.parser()
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--work", type=Path, help="where finished trainings are kept [default: nowhere]")
    options = parser.parse_args(words)
    if options.data is None and not options.stored:
        parser.error("give --data, the folder of CIFAR-10")
    with tempfile.TemporaryDirectory() as temporary:
        options.work = (options.work or Path(temporary)).resolve()
        code: int = benchmark.run(options)
    stored = options.output or RESULTS / "qat.json"
    if not options.stored and not options.check:
        stored.with_suffix(".md").write_text(table(json.loads(stored.read_text())["figures"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
