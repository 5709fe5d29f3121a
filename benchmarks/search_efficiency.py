"""How good a front each search has after 50 to 1,000 validated candidates, on three oracles.

A search validates candidates one batch after the other; how many is what it costs on a real device. Judged
is the true hypervolume of the measured front, as a part of that of the best front known (200,200 evaluations
of NSGA-II on the truth, stored with its seed). The oracles: ImageNet accuracies of once-for-all's
MobileNetV3 and exact multiply-accumulates; a drawn one with interactions and noise; architecture and
precision of blocks, with a latency from blocks timed by `search_blocks.py`. Intervals are 95 % bootstrap
intervals over seeds.

Claims, of ours:

1. It reaches with 100 evaluations on `ofa` what LINAS has with 250.
2. It has at least 98 % of the best known front with 250 evaluations on `ofa`.
3. It is at no budget on any oracle worse than LINAS: the interval of the difference of means is not below 0.

LINAS is taken in both kinds, with costs predicted (as published) and computed.

Optuna's TPE and GP samplers, which fit anew for each trial, are given 500 and 50 evaluations.

    python benchmarks/search_efficiency.py --data DIR [--check] [--processes 2] [--seeds 5] [--budget 1000]

DIR holds the measured subnets as CSV. Finished searches are kept in `--work`: the same command continues a
run that was killed. Table and plot lie beside the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, Benchmark, Figures, store
from search_methods import MARKS, METHODS, best_known, run
from search_oracles import ORACLES, ROOT, oracle
from search_plot import draw

BOOTSTRAPS = 2000
OURS, RIVALS = "ours", ("LINAS", "LINAS, costs computed")


@dataclass(frozen=True, slots=True)
class Job:
    """One search with one seed, or (no method) the best known front of an oracle."""

    oracle: str
    method: str | None
    seed: int
    budget: int
    data: Path
    work: Path

    @property
    def file(self) -> Path:
        """Where its outcome is kept."""
        name = "best" if self.method is None else self.method.replace(", ", "-").replace(" ", "-")
        return (
            self.work
            / self.oracle
            / (f"{name}-{self.seed}" + f"-{self.budget}" * (self.method is not None) + ".json")
        )

    def do(self) -> None:
        """Searches, and keeps the outcome."""
        asked = oracle(self.oracle, self.data)
        if self.method is None:
            outcome = best_known(asked, seed=self.seed)
        else:
            outcome = run(METHODS[self.method], asked, seed=self.seed, budget=self.budget)
        store(self.file, outcome)


def _do(job: Job) -> Job:
    job.do()
    return job


def plan(options: argparse.Namespace) -> list[Job]:
    """Everything there is to do, the best known fronts first."""
    where = {"data": options.data, "work": options.work}
    jobs = [Job(name, None, 0, 0, **where) for name in options.oracles]
    jobs += [
        Job(name, method, seed, options.budget, **where)
        for seed in range(options.seeds)
        for method in options.methods
        for name in options.oracles
    ]
    return jobs


def measure(options: argparse.Namespace) -> Figures:
    """The figures of all searches; those that were done before are taken as they are."""
    jobs = plan(options)
    missing = [job for job in jobs if not job.file.exists()]
    print(f"{len(jobs)} searches, {len(missing)} of them to be done", flush=True)
    # processes that are started anew: what a fork shares with threads of a library can hang
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for count, job in enumerate(pool.imap_unordered(_do, missing), 1):
            print(
                f"{count}/{len(missing)} {job.oracle}: {job.method or 'best known front'}, seed {job.seed}",
                flush=True,
            )
    figures = gather(jobs, options)
    output = options.output or (None if options.check else RESULTS / "search_efficiency.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(table(figures) + "\n")
        draw(figures, output.with_suffix(".svg"))
    print(table(figures), flush=True)
    return figures


def gather(jobs: Sequence[Job], options: argparse.Namespace) -> Figures:
    """The figures, seed by seed in per cent of the best known front, with their intervals."""
    oracles: dict[str, Any] = {}
    for job in jobs:
        found = json.loads(job.file.read_text())
        if job.method is None:
            oracles[job.oracle] = {"best": found, "methods": {}}
            continue
        row = oracles[job.oracle]["methods"].setdefault(job.method, {"per_cent": {}, "proposing_ms": []})
        for mark, volume in found["volumes"].items():
            per_cent = 100 * volume / oracles[job.oracle]["best"]["volume"]
            row["per_cent"].setdefault(mark, []).append(per_cent)
        row["proposing_ms"].append(found["proposing_ms"])
    for rows in oracles.values():
        for row in rows["methods"].values():
            row["interval"] = {mark: interval(values) for mark, values in row["per_cent"].items()}
    settings = {
        "seeds": options.seeds,
        "budget": options.budget,
        "marks": [mark for mark in MARKS if mark <= options.budget],
        "methods": list(options.methods),
    }
    return {"settings": settings, "oracles": oracles}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`, the same for the same values."""
    drawn = np.random.default_rng(0).choice(np.array(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The difference of the means, and its 95 % bootstrap interval; both are drawn on their own."""
    rng = np.random.default_rng(0)
    means = [rng.choice(np.array(v), size=(BOOTSTRAPS, len(v))).mean(axis=1) for v in (ours, theirs)]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return float(np.mean(ours) - np.mean(theirs)), float(low), float(high)


def table(figures: Figures) -> str:
    """The figures as a table in Markdown: means in per cent, and 95 % intervals."""
    marks = [str(mark) for mark in figures["settings"]["marks"]]
    lines = [
        f"Hypervolume in % of the best known front; mean of {figures['settings']['seeds']} seeds and 95 % "
        "bootstrap interval; milliseconds that proposing a candidate took."
    ]
    for name, rows in figures["oracles"].items():
        lines += ["", f"| {name} | {' | '.join(marks)} | ms |", "| --- " * (len(marks) + 2) + "|"]
        for method, row in rows["methods"].items():
            cells = []
            for mark in marks:
                values = row["per_cent"].get(mark)
                low, high = row["interval"].get(mark, (0, 0))
                cells.append(f"{np.mean(values):.1f} ({low:.1f}-{high:.1f})" if values else "-")
            took = float(np.median(row["proposing_ms"]))
            lines.append(f"| {method} | {' | '.join(cells)} | {took:.0f} |")
    return "\n".join(lines)


def misses(figures: Figures) -> list[str]:
    """The claims that do not hold, of those that the figures are there for."""
    found = []
    for name, rows in figures["oracles"].items():
        methods = rows["methods"]
        if OURS not in methods:
            continue
        ours = methods[OURS]["per_cent"]
        for rival in RIVALS:
            theirs = methods.get(rival, {"per_cent": {}})["per_cent"]
            for mark in sorted(ours.keys() & theirs.keys(), key=int):
                mean, low, high = difference(ours[mark], theirs[mark])
                if high < 0:
                    told = f"{-mean:.1f} points below {rival} ({-high:.1f} to {-low:.1f})"
                    found.append(f"{name} at {mark}: ours is {told}")
            if name == "ofa" and "100" in ours and "250" in theirs:
                reached, wanted = float(np.mean(ours["100"])), float(np.mean(theirs["250"]))
                if reached < wanted:
                    found.append(f"ofa: ours has {reached:.1f} % at 100, {rival} {wanted:.1f} % at 250")
        if name == "ofa" and "250" in ours and float(np.mean(ours["250"])) < 98:
            found.append(f"ofa: ours has {float(np.mean(ours['250'])):.1f} % at 250, not 98 %")
    return found


def sentence(figures: Figures) -> str:
    """Ours against LINAS, in one line."""
    told = []
    for name, rows in figures["oracles"].items():

        def at(method: str, mark: str, rows: Any = rows) -> float:
            values = rows["methods"].get(method, {"per_cent": {}})["per_cent"].get(mark)
            return float(np.mean(values)) if values else math.nan

        told.append(
            f"{name}: ours {at(OURS, '100'):.1f} % at 100 and {at(OURS, '250'):.1f} % at 250, "
            f"LINAS {at('LINAS', '250'):.1f} % at 250 ({at('LINAS, costs computed', '250'):.1f} % with costs "
            "computed)"
        )
    return "hypervolume of the best known front; " + "; ".join(told)


BENCHMARK = Benchmark("search_efficiency", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument(
        "--data", type=Path, metavar="DIR", default=Path("data/ofa_mbv3_imagenet"), help="measured subnets"
    )
    parser.add_argument("--seeds", type=int, default=5, help="[default: 5]")
    parser.add_argument("--budget", type=int, default=1000, help="evaluations [default: 1000]")
    parser.add_argument("--processes", type=int, default=1, help="[default: 1]")
    parser.add_argument(
        "--only", action="append", metavar="METHOD", help=f"of {', '.join(METHODS)}; repeatable"
    )
    parser.add_argument("--oracle", action="append", choices=ORACLES, help="repeatable [default: all]")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "search_efficiency",
        help="[default: runs/search_efficiency]",
    )
    options = parser.parse_args(words)
    if unknown := [name for name in options.only or () if name not in METHODS]:
        parser.error(f"--only {unknown[0]!r} is no method; they are {', '.join(METHODS)}")
    if options.seeds < 1 or options.processes < 1 or options.budget < min(MARKS):
        parser.error(f"--seeds and --processes are at least 1, --budget at least {min(MARKS)}")
    options.methods = [name for name in METHODS if name in (options.only or METHODS)]
    options.oracles = [name for name in ORACLES if name in (options.oracle or ORACLES)]
    if "ofa" in options.oracles and not options.stored and not list(options.data.glob("*.csv")):
        print(
            f"no CSV file in {options.data}; --data names the folder with measured subnets", file=sys.stderr
        )
        return 2
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
