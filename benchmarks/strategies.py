"""Training strategies at equal compute: the same space, images and multiply-accumulates for each.

The space is the small ResNet for CIFAR (`search_spaces/resnet_cifar.toml`) in float. Each strategy trains it
for as many steps as the budget buys it, a backward pass counted as two forward passes, with the same
optimizer, batches and, seed by seed, the same first weights. Then the smallest network, the largest and some
between them, the same for all, are materialized, recalibrated on training images and scored on test images,
by which nothing was chosen. The area under accuracy over the logarithm of multiply-accumulates is the mean
accuracy of the curve.

Claims, of delayed shrinking (DepS, Annavajjala et al. 2024, arXiv 2407.06167). A difference is taken seed by
seed, and counts where its 95 % interval (Student's t) has no 0:

1. At equal compute its smallest network is better than that of progressive shrinking (once-for-all).
2. So it is with 0.6 of the compute.
3. In-place distillation from a half-trained largest network gives a greater area than from the first step on
   (a sandwich with the same schedule).
4. Letting the subnets' weight rise slowly gives a greater area than full weight at once.

The ramp takes 5 % of the run: the published 5 epochs would be most of a run as short as these.

    python benchmarks/strategies.py --data DIR [--check] [--size cpu|quick|gpu] [--processes 2] [--only NAME]

DIR holds CIFAR-10 as Parquet. On 2 cores, with 2 processes, the size `cpu` takes about an hour, `quick` about
5 minutes; `gpu` needs CUDA. Finished trainings are kept in `--work`, and one that was stopped goes on from
its last checkpoint: the same command continues a run that was killed. Table and plot lie beside the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, Benchmark, Figures
from strategies_entries import ENTRIES, MORE, SIZES, Entry, N, Size
from strategies_jobs import ROOT, plan, run_all
from strategies_plot import draw

from nestling.data import DataError


def measure(options: argparse.Namespace) -> Figures:
    """The table of all entries; what was trained before with the same settings is taken as it is."""
    size: Size = options.settings
    jobs = plan(options.entries, size, source=options.data, work=options.work)
    if options.fresh:
        for job in jobs:
            job.result_file.unlink(missing_ok=True)
            shutil.rmtree(job.folder / f"seed-{job.seed}", ignore_errors=True)
    missing = [job for job in jobs if not job.result_file.exists()]
    print(f"{len(jobs)} trainings, {len(missing)} of them to be done; steps and images of each:")
    for job in jobs[: len(options.entries)]:
        print(f"  {job.name:38} {job.steps:6,} steps   {job.steps * size.batch_size:9,} images", flush=True)
    count = 0

    def told(found: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        accuracies = ", ".join(f"{name} {100 * found[name]:.1f}" for name in MEASURES[:4])
        print(
            f"{count}/{len(missing)} {found['entry']}, seed {found['seed']}: {accuracies}; "
            f"{found['seconds']:.0f} s, scoring {found['scoring_seconds']:.0f} s",
            flush=True,
        )

    run_all(missing, options.processes, told=told)
    results = [json.loads(job.result_file.read_text()) for job in jobs]
    figures = gather(results, options.entries, size)
    output = options.output or (None if options.check else RESULTS / f"{options.name}.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(table(figures) + "\n")
        draw(figures, output.with_suffix(".svg"))
    print(table(figures), flush=True)
    return figures


T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Degrees of freedom -> how many standard errors half of a 95 % interval has (Student's t)."""
MEASURES = ("smallest", "middle", "largest", "area", "macs", "images", "seconds")


def gather(results: Iterable[Mapping[str, Any]], entries: Mapping[str, Entry], size: Size) -> Figures:
    """The figures of all entries, of each the values seed by seed."""
    rows: dict[str, dict[str, Any]] = {}
    archs: dict[str, Any] = {}
    for result in sorted(results, key=lambda result: int(result["seed"])):
        empty: dict[str, Any] = {measure: [] for measure in (*MEASURES, "steps", "top1")}
        row = rows.setdefault(result["entry"], empty)
        for measure, values in row.items():
            values.append(result[measure])
        archs = {"keys": result["archs"], "macs": result["arch_macs"]}
    told = {
        name: {"about": entry.about, "share": entry.share, **rows[name]} for name, entry in entries.items()
    }
    return {"settings": dataclasses.asdict(size), "archs": archs, "entries": told}


def told_spread(values: list[float], *, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values) * scale:,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else mean


def table(figures: Figures) -> str:
    """The figures as a table in Markdown: mean and standard deviation over seeds, accuracies in per cent."""
    settings = figures["settings"]
    lines = [
        f"{settings['seeds']} seeds, {settings['train_images']:,} training images, "
        f"{settings['budget']:.3g} MACs each, learning rate {settings['lr']:g}; "
        f"accuracy in % on held-out images ({settings['judge']} split).",
        "",
        "| strategy | smallest | middle | largest | area | TMACs | images | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures["entries"].items():
        accuracies = [told_spread(row[measure], scale=100) for measure in ("smallest", "middle", "largest")]
        accuracies.append(told_spread(row["area"], scale=100, digits=2))
        costs = [
            f"{statistics.mean(row['macs']) / 1e12:.2f}",
            f"{statistics.mean(row['images']):,.0f}",
            f"{statistics.mean(row['seconds']):,.0f}",
        ]
        lines.append(f"| {' | '.join([name, *accuracies, *costs])} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Claim:
    """That `better` is above `worse` in `measure`; `also` is told beside it."""

    text: str
    measure: str
    better: str
    worse: str
    also: tuple[str, ...] = field(default=())


CLAIMS = (
    Claim("smallest, delayed - progressive shrinking", "smallest", N.deps, N.progressive, ("area",)),
    Claim(
        "smallest, delayed at 0.6x - progressive shrinking",
        "smallest",
        N.deps_cheap,
        N.progressive,
        ("area",),
    ),
    Claim(
        "area, teacher half-trained - from the start", "area", N.deps, N.from_start, ("smallest", "largest")
    ),
    Claim("area, ramp - none", "area", N.deps, N.no_ramp, ("smallest", "largest")),
)


def difference(figures: Figures, claim: Claim, measure: str) -> tuple[float, float]:
    """The mean over seeds of what the claim's `better` is above its `worse`, and half its 95 % interval.

    The interval is not a number with a single seed, and the mean is none where an entry was not trained.
    """
    entries = figures["entries"]
    if claim.better not in entries or claim.worse not in entries:
        return math.nan, math.nan
    pairs = zip(entries[claim.better][measure], entries[claim.worse][measure], strict=True)
    gained = np.array([better - worse for better, worse in pairs])
    if len(gained) < 2:
        return float(gained.mean()), math.nan
    quantile = T_QUANTILES.get(len(gained) - 1, 1.96 + 2.5 / (len(gained) - 1))
    return float(gained.mean()), quantile * float(gained.std(ddof=1)) / math.sqrt(len(gained))


def verdict(figures: Figures, claim: Claim) -> str:
    """`holds`, `does not hold`, or `undecided`, where the interval has 0 in it or with one seed."""
    mean, half = difference(figures, claim, claim.measure)
    if not abs(mean) > half:
        return "undecided"
    return "holds" if mean > 0 else "does not hold"


def told_claim(figures: Figures, claim: Claim) -> str:
    """The claim with its verdict and figures, in points of accuracy."""

    def told(measure: str) -> str:
        mean, error = difference(figures, claim, measure)
        return f"{100 * mean:+.2f} ± {100 * error:.2f}"

    also = ", ".join(f"{measure} {told(measure)}" for measure in claim.also)
    return f"{claim.text}: {told(claim.measure)} points ({also}), {verdict(figures, claim)}"


def misses(figures: Figures) -> list[str]:
    """The claims that do not hold."""
    return [told_claim(figures, claim) for claim in CLAIMS if verdict(figures, claim) != "holds"]


def sentence(figures: Figures) -> str:
    """The best area, and the claims, in one line."""
    areas = {name: statistics.mean(row["area"]) for name, row in figures["entries"].items()}
    best = max(areas, key=areas.__getitem__)
    told = "; ".join(f"({number}) {told_claim(figures, claim)}" for number, claim in enumerate(CLAIMS, 1))
    return f"greatest area at equal compute: {best}, {100 * areas[best]:.2f}; {told}"


def benchmark(size: str, *, judge: str = "test") -> Benchmark:
    """The benchmark whose figures are kept under a name of the size's, and the judging split's, own."""
    words = ["strategies", *([size] if size != "cpu" else []), *([judge] if judge != "test" else [])]
    name = "_".join(words)
    return Benchmark(name, __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = benchmark("cpu").parser()
    parser.add_argument("--data", metavar="DIR", default="data/cifar10", help="[default: data/cifar10]")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="[default: cpu]")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="as --size quick")
    parser.add_argument("--seeds", type=int, help="[default: 3; quick 2, gpu 1]")
    parser.add_argument("--budget", type=float, help="multiply-accumulates of a training, such as 2.4e12")
    parser.add_argument("--lr", type=float, help="the highest learning rate [default: 0.1; gpu 0.4]")
    parser.add_argument(
        "--judge",
        choices=["test", "search"],
        help="the split that networks are scored on: search, to choose settings by [default: test]",
    )
    parser.add_argument("--processes", type=int, default=1, help="each on a core of its own [default: 1]")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help=f"of {', '.join([*ENTRIES, *MORE])}; repeatable"
    )
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "strategies", help="[default: runs/strategies]"
    )
    options = parser.parse_args(words)
    made = benchmark(options.size, judge=options.judge or "test")
    if options.stored:
        return made.run(options)
    size = SIZES[options.size]
    given = {name: vars(options)[name] for name in ("seeds", "budget", "lr", "judge")}
    options.settings = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    known = {**ENTRIES, **MORE}
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {unknown[0]!r} is no entry; they are {', '.join(known)}")
    options.entries = {name: known[name] for name in options.only or ENTRIES}
    options.name = made.name
    positive = options.settings.budget > 0 and options.settings.lr > 0
    if options.settings.seeds < 1 or options.processes < 1 or not positive:
        parser.error("--seeds and --processes are at least 1, --budget and --lr are above 0")
    if size.device == "cuda" and not torch.cuda.is_available():
        print("the size gpu is skipped: torch sees no CUDA device here")
        return 0
    if not Path(options.data).is_dir():
        print(
            f"there is no folder {options.data}; --data names one with CIFAR-10 as Parquet", file=sys.stderr
        )
        return 2
    try:
        return made.run(options)
    except DataError as error:
        print(f"{options.data}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
