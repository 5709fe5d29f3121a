"""A search that models guide against Optuna's NSGA-II, on a trained supernet and a real device.

On the supernet of a finished run (for CIFAR-10: `nestling train configs/cifar10_cpu.toml`), both evaluate the
same number of candidates, as `nestling search` does: accuracy of the file on the search images, latency of
the file as a part of the reference model's, bytes of the file. Objectives and limits are those of the run's
configuration; both begin with the same archs, from the smallest to the largest. Costs that are computed, and
what a latency model of the run tells, are told to ours as the product tells them; NSGA-II reads neither.

An arch is evaluated once, for both and for all seeds: they can differ by the archs that they choose, and by
nothing else. A measurement that is unstable is taken again, twice, and used with a flag where it stays so.

The hypervolume is that of the measured front after 25, 50, 100 and 150 candidates, as a part of the box
between the reference point and a network without errors and without costs. The reference point is half of
the accuracy of the space's largest network and 1.1 of each of its costs. Differences are paired by seed,
their 95 % intervals are Student's t.

Claim: after the last candidate ours is not below NSGA-II, by the mean over seeds. Told as well: after how
many candidates ours (the mean over seeds) has what NSGA-II has at the end.

    python benchmarks/search_cifar.py RUN [--check] [--trials 150] [--seeds 3] [--work FOLDER]

Takes about 2 seconds a candidate: 30 minutes on an idle core. What was evaluated is kept in `--work`: the
same command continues a run that was killed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from evaluations import Evaluator, mean_and_half, run_searching, searching_parser, told_beforehand
from record import Benchmark, Figures

from nestling.config import override_config
from nestling.pipeline import open_run
from nestling.pipeline.studies import problem
from nestling.search import Problem, SearchResult, Trial, search
from nestling.search.pareto import hypervolume, nondominated
from nestling.space import Arch

OURS, THEIRS = "predictor", "NSGAIISampler"
METHODS = (OURS, THEIRS)
MARKS = (25, 50, 100, 150)
PAUSES = (0.0, 0.5)
SECONDS = 0.5
"""The longest that a measurement may take."""
LEAST_ACCURACY, MOST_COST = 0.5, 1.1
"""Of the largest network's: the reference point."""


def loss_point(asked: Problem, metrics: Mapping[str, float], reference: Mapping[str, float]) -> list[float]:
    """What a network misses in each objective, as a part of what the reference point misses."""
    return [
        (1 - metrics[o.name]) / (1 - reference[o.name])
        if o.direction == "maximise"
        else metrics[o.name] / reference[o.name]
        for o in asked.objectives
    ]


def reference_point(asked: Problem, largest: Mapping[str, float]) -> dict[str, float]:
    """The reference point, metric by metric."""
    return {
        o.name: (LEAST_ACCURACY if o.direction == "maximise" else MOST_COST) * largest[o.name]
        for o in asked.objectives
    }


def curve(asked: Problem, trials: Sequence[Trial], reference: Mapping[str, float]) -> list[float]:
    """The hypervolume of the front after each of `trials`, in their order; failed ones add nothing."""
    points = np.empty((0, len(asked.objectives)))
    volumes: list[float] = []
    for trial in trials:
        before = len(points)
        if trial.state == "complete" and asked.feasible(trial.metrics):
            points = np.vstack([points, loss_point(asked, trial.metrics, reference)])
        if len(points) == before:
            volumes.append(volumes[-1] if volumes else 0.0)
            continue
        points = points[nondominated(points)]
        volumes.append(hypervolume(points, [1.0] * len(asked.objectives)))
    return volumes


def searched(
    asked: Problem, evaluator: Evaluator, method: str, *, options: argparse.Namespace, seed: int
) -> SearchResult:
    """What `method` tried; prints how far it is now and then."""

    def told(trial: Trial, result: SearchResult) -> None:
        if len(result.trials) % 25 == 0 or trial.state == "failed":
            print(f"seed {seed}, {method}: {len(result.trials)} candidates {trial.reason}", flush=True)

    costs = told_beforehand(evaluator.bench, asked, strategy=method, trials=options.trials)
    return search(
        asked,
        evaluator.searched,
        storage=evaluator.folder / f"{method}_{seed}.db",
        name="search",
        trials=options.trials,
        strategy=method,
        population=options.population,
        seed=seed,
        exact=costs.exact,
        priors=costs.priors,
        on_trial=told,
    )


def measure_all(options: argparse.Namespace) -> Figures:
    """The hypervolumes of both, candidate by candidate and seed by seed."""
    bench = open_run(options.run)
    # shorter than a run's own: the device measures the reference model in between, and what is unstable again
    bench.config = override_config(bench.config, [f"profile.seconds={SECONDS}"])
    try:
        _ = bench.supernet  # an unfinished training is told before anything else
        evaluator = Evaluator(bench, options.work or options.run / "search_cifar", pauses=PAUSES)
        asked = problem(bench)
        reference = reference_point(asked, evaluator.searched(bench.space.largest))
        rows: list[dict[str, Any]] = []
        tried: set[Arch] = set()
        unstable: set[Arch] = set()
        for seed in range(options.seeds):
            row: dict[str, Any] = {"seed": seed}
            for method in METHODS:
                result = searched(asked, evaluator, method, options=options, seed=seed)
                trials = result.trials[: options.trials]
                tried |= {trial.arch for trial in trials}
                unstable |= {trial.arch for trial in trials if trial.metrics.get("unstable")}
                row[method] = curve(asked, trials, reference)
            rows.append(row)
            print(f"seed {seed}: " + line(row, marks(options.trials)), flush=True)
        return {
            "run": bench.config.name,
            "space": {"archs": float(bench.space.size), "choices": len(bench.space.open_choices)},
            "device": bench.device.name,
            "objectives": [objective.name for objective in asked.objectives],
            "reference": reference,
            "trials": options.trials,
            "population": options.population,
            "archs": len(tried),
            "unstable_archs": len(unstable),
            "seeds": rows,
        }
    finally:
        bench.close()


def marks(trials: int) -> list[int]:
    """Where hypervolumes are told: the marks within `trials`, and the end."""
    return sorted({mark for mark in MARKS if mark <= trials} | {trials})


def at(row: Mapping[str, Any], method: str, mark: int) -> float:
    """The hypervolume of `method` after `mark` candidates; a space without so many ends before."""
    volumes: list[float] = row[method]
    return volumes[min(mark, len(volumes)) - 1]


def line(row: Mapping[str, Any], told: Sequence[int]) -> str:
    """One seed, for reading."""
    return "; ".join(
        f"{mark}: {at(row, OURS, mark):.4f} against {at(row, THEIRS, mark):.4f}" for mark in told
    )


def means(figures: Figures, method: str, mark: int) -> float:
    """The mean hypervolume of `method` after `mark` candidates."""
    return statistics.fmean(at(row, method, mark) for row in figures["seeds"])


def catches_up(figures: Figures) -> int | None:
    """After how many candidates ours has what NSGA-II has at the end, by means over seeds; None if never."""
    wanted = means(figures, THEIRS, figures["trials"])
    counts = range(1, figures["trials"] + 1)
    return next((count for count in counts if means(figures, OURS, count) >= wanted), None)


def misses(figures: Figures) -> list[str]:
    """What is not as claimed."""
    ours, theirs = (means(figures, method, figures["trials"]) for method in METHODS)
    if not ours >= theirs:
        return [f"hypervolume {ours:.4f} after {figures['trials']} candidates, NSGA-II {theirs:.4f}"]
    return []


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    told = []
    for mark in marks(figures["trials"]):
        gains = [100 * (at(row, OURS, mark) / at(row, THEIRS, mark) - 1) for row in figures["seeds"]]
        mean, half = mean_and_half(gains)
        told.append(f"{mean:+.2f} +- {half:.2f} % at {mark}")
    count = catches_up(figures)
    reached = "never has" if count is None else f"has after {count} candidates"
    return (
        f"hypervolume of {', '.join(figures['objectives'])} against NSGA-II, {len(figures['seeds'])} seeds: "
        f"{', '.join(told)}; ours {reached} what NSGA-II has after {figures['trials']}"
    )


def benchmark(size: str = "cpu") -> Benchmark:
    """The benchmark, its figures under a name of the size's own."""
    name = "search_cifar" if size == "cpu" else f"search_cifar_{size}"
    return Benchmark(name, __doc__, measure_all, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = searching_parser(benchmark(), trials=(MARKS[-1], 24))
    parser.add_argument("--population", type=int, default=20, help="of NSGA-II [default: 20]")
    return run_searching(benchmark, parser, parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
