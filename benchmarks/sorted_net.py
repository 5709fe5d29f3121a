"""SortedNet's claim on CIFAR-10: 160 nested networks trained at once, nearly as good as the largest alone.

The networks are of the small ResNet space (`search_spaces/resnet_cifar.toml`) at 24 pixels, in float: five
depths, each of which has the blocks of the one before, times two widths for each of the stem, the three
stages and the middles of all blocks. The paper's networks are nested in several dimensions too; which 160 it
has, its abstract does not say. They cannot be one chain here: the longest of this space has 18 networks. But
every network is cut from the largest, holds the smallest, and what two of them share is one of the set.

A step visits `--subnets` of the 160, each drawn uniformly and learning from the labels of one batch. The
largest network alone has the same first weights, batches, optimizer and number of steps; so have the median
and the smallest, which tell what of a loss is their size and what is sharing. Then each is materialized,
recalibrated on training images and scored on test images, by which nothing was chosen.

Claim (SortedNet, Valipour et al. 2023, arXiv 2309.00255): the mean accuracy of the 160 networks is at least
0.96 of that of the largest network trained alone; judged by the mean over seeds.

    python benchmarks/sorted_net.py --data DIR [--check] [--size cpu|quick] [--processes 2]

DIR holds CIFAR-10 as Parquet. On one free core a seed of the size `cpu` takes about 40 minutes and `quick`
about 9. More networks a step are better: at `quick`, by the search split, 2 gave 0.928 and 4 gave 1.016; at
`cpu` 4 gave 0.933 and 8 gave 0.941. Finished trainings are kept in `--work`, and one that was stopped goes on
from its last checkpoint: the same command continues a run that was killed. A table lies beside the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, Benchmark, Figures
from sorted_net_jobs import ALONE, SIZES, SORTED, alone_of, entries_of, nested_of, parameters, plan, run
from strategies_entries import Size
from strategies_jobs import ROOT, macs, run_all

from nestling.data import DataError
from nestling.train.quality import along_cost, area

LEAST_RATIO = 0.96
GROUPS = 4
"""Parts of the set, by cost, of which the table tells."""


def measure(options: argparse.Namespace) -> Figures:
    """The accuracies of all networks; what was trained before with the same settings is taken as it is."""
    size: Size = options.settings
    entries = entries_of(size, random_subnets=options.subnets)
    jobs = plan(entries, size, source=options.data, work=options.work)
    if options.fresh:
        for job in jobs:
            job.result_file.unlink(missing_ok=True)
            shutil.rmtree(job.training, ignore_errors=True)
    missing = [job for job in jobs if not job.result_file.exists()]
    print(f"{len(jobs)} trainings of {jobs[0].steps:,} steps, {len(missing)} of them to be done", flush=True)

    def told(found: dict[str, Any]) -> None:
        print(
            f"{found['entry']}, seed {found['seed']}: {100 * statistics.mean(found['top1']):.1f} %, "
            f"{found['seconds']:.0f} s, scoring {found['scoring_seconds']:.0f} s",
            flush=True,
        )

    run_all(missing, options.processes, told=told, run=run)
    results = [json.loads(job.result_file.read_text()) for job in jobs]
    figures = gather(results, size, random_subnets=options.subnets)
    output = options.output or (None if options.check else RESULTS / f"{options.name}.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(table(figures) + "\n")
    print(table(figures), flush=True)
    return figures


def gather(results: Iterable[Mapping[str, Any]], size: Size, *, random_subnets: int) -> Figures:
    """The sizes of the networks, cheapest first, and seed by seed the accuracies, together and alone."""
    archs = nested_of(size)
    found = {(result["seed"], result["entry"]): result for result in results}
    names = {f"{name} alone": name for name in ALONE}
    places = {name: archs.index(arch) for name, arch in alone_of(size).items()}
    return {
        "settings": {**dataclasses.asdict(size), "random_subnets": random_subnets},
        "networks": [{"key": a.key, "macs": macs(a), "params": parameters(a)} for a in archs],
        "places": places,
        "seeds": [
            {
                "seed": seed,
                "top1": found[seed, SORTED]["top1"],
                "alone": {name: found[seed, entry]["top1"][0] for entry, name in names.items()},
                "steps": found[seed, SORTED]["steps"],
                "macs": {entry: found[seed, entry]["macs"] for entry in (SORTED, *names)},
                "seconds": {entry: found[seed, entry]["seconds"] for entry in (SORTED, *names)},
            }
            for seed in range(size.seeds)
        ],
    }


def over_seeds(values: Iterable[float]) -> float:
    """The mean; not a number where there are no seeds."""
    each = list(values)
    return statistics.mean(each) if each else math.nan


def ratios(figures: Figures) -> list[float]:
    """Of each network, cheapest first, its accuracy over that of the largest alone: the mean over seeds."""
    rows = [np.array(row["top1"]) / row["alone"]["largest"] for row in figures["seeds"]]
    return [float(ratio) for ratio in np.mean(rows, axis=0)]


def mean_ratios(figures: Figures) -> list[float]:
    """The figure that is judged, seed by seed."""
    return [statistics.mean(row["top1"]) / row["alone"]["largest"] for row in figures["seeds"]]


def areas(figures: Figures) -> list[float]:
    """The area under accuracy over the logarithm of the multiply-accumulates, seed by seed."""
    costs = [network["macs"] for network in figures["networks"]]
    places = along_cost(costs, least=costs[0], most=costs[-1])
    return [area(places, np.array(row["top1"])) for row in figures["seeds"]]


def table(figures: Figures) -> str:
    """The figures as tables in Markdown: parts of the set by cost, and the networks trained alone."""
    settings, networks, seeds = figures["settings"], figures["networks"], figures["seeds"]
    of_each = ratios(figures)
    top1 = np.mean([row["top1"] for row in seeds], axis=0)
    spent = {entry: over_seeds(row["macs"][entry] for row in seeds) for entry in seeds[0]["macs"]}
    lines = [
        f"{len(seeds)} seeds, {settings['train_images']:,} training images, {seeds[0]['steps']:,} steps of "
        f"{settings['batch_size']}, {settings['random_subnets']} networks a step; all together "
        f"{spent[SORTED]:.3g} MACs, the largest alone {spent['largest alone']:.3g}. Accuracy in % on "
        f"held-out images ({settings['judge']} split), area {100 * over_seeds(areas(figures)):.2f}; a ratio "
        "is to the largest network alone.",
        "",
        "| networks | million MACs | thousand parameters | accuracy | ratio | least ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    parts = [("all", range(len(networks)))]
    bounds = [len(networks) * part // GROUPS for part in range(GROUPS + 1)]
    parts += [
        (f"{part + 1} of {GROUPS}, by cost", range(bounds[part], bounds[part + 1])) for part in range(GROUPS)
    ]
    for name, members in parts:
        chosen = [of_each[index] for index in members]
        cells = [
            f"{len(members)} ({name})",
            span([networks[index]["macs"] / 1e6 for index in members], digits=2),
            span([networks[index]["params"] / 1e3 for index in members], digits=0),
            f"{100 * float(np.mean(top1[list(members)])):.1f}",
            f"{statistics.mean(chosen):.3f}",
            f"{min(chosen):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| network | million MACs | thousand parameters | together | alone | together / alone | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, place in figures["places"].items():
        alone = over_seeds(row["alone"][name] for row in seeds)
        cells = [
            name,
            f"{networks[place]['macs'] / 1e6:.2f}",
            f"{networks[place]['params'] / 1e3:.0f}",
            f"{100 * float(top1[place]):.1f}",
            f"{100 * alone:.1f}",
            f"{float(top1[place]) / alone:.3f}",
            f"{of_each[place]:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values: Sequence[float], *, digits: int) -> str:
    """The least and the most of `values`."""
    return f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def misses(figures: Figures) -> list[str]:
    """That the mean ratio is below its limit, or is no number."""
    found = over_seeds(mean_ratios(figures))
    if found >= LEAST_RATIO:
        return []
    return [f"the mean accuracy is {found:.4f} of the largest network's alone, not {LEAST_RATIO}"]


def sentence(figures: Figures) -> str:
    """The mean ratio, and the sizes it is of, in one line."""
    networks, of_each = figures["networks"], ratios(figures)
    least = min(range(len(of_each)), key=of_each.__getitem__)
    alone = over_seeds(row["alone"]["largest"] for row in figures["seeds"])
    each = ", ".join(f"{ratio:.4f}" for ratio in mean_ratios(figures))
    return (
        f"{len(networks)} nested networks ({span([n['macs'] / 1e6 for n in networks], digits=2)} million "
        f"multiply-accumulates, {span([n['params'] / 1e3 for n in networks], digits=0)} thousand parameters) "
        f"trained at once: their mean accuracy is {over_seeds(mean_ratios(figures)):.4f} of the largest's "
        f"trained alone, {100 * alone:.1f} % (seeds {each}; the least {of_each[least]:.3f}, with "
        f"{networks[least]['macs'] / 1e6:.2f} million)"
    )


def benchmark(size: str, *, judge: str = "test") -> Benchmark:
    """The benchmark whose figures are kept under a name of the size's, and the judging split's, own."""
    words = ["sorted_net", *([size] if size != "cpu" else []), *([judge] if judge != "test" else [])]
    return Benchmark("_".join(words), __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = benchmark("cpu").parser()
    parser.add_argument("--data", metavar="DIR", default="data/cifar10", help="[default: data/cifar10]")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="[default: cpu]")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="as --size quick")
    parser.add_argument("--seeds", type=int, help="[default: 2; quick 1]")
    parser.add_argument("--budget", type=float, help="multiply-accumulates of the largest's training alone")
    parser.add_argument("--lr", type=float, help="the highest learning rate [default: 0.1]")
    parser.add_argument("--subnets", type=int, default=8, help="networks that a step visits [default: 8]")
    parser.add_argument(
        "--judge",
        choices=["test", "search"],
        help="the split that networks are scored on: search, to choose settings by [default: test]",
    )
    parser.add_argument("--processes", type=int, default=1, help="each on a core of its own [default: 1]")
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "sorted_net", help="[default: runs/sorted_net]"
    )
    options = parser.parse_args(words)
    made = benchmark(options.size, judge=options.judge or "test")
    if options.stored:
        return made.run(options)
    given = {name: vars(options)[name] for name in ("seeds", "budget", "lr", "judge")}
    options.settings = dataclasses.replace(
        SIZES[options.size], **{name: value for name, value in given.items() if value is not None}
    )
    options.name = made.name
    positive = options.settings.budget > 0 and options.settings.lr > 0
    if min(options.settings.seeds, options.processes, options.subnets) < 1 or not positive:
        parser.error("--seeds, --processes and --subnets are at least 1, --budget and --lr are above 0")
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
