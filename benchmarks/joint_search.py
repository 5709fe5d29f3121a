"""Searching architecture and precision together beats searching one and then quantizing everything.

On the supernet of a finished run (for CIFAR-10: `nestling train configs/cifar10_cpu.toml`), every method
evaluates the same number of candidates, as `nestling search` does: accuracy of the file on the search images,
latency of the file beside the reference model, bytes of the file. Objectives are all three. The strategy is
the product's default, with what the product tells it beforehand of costs that are computed.

- `joint`: width, depth, kernel, resolution and the precision of every stage, together;
- `then w8a8`: the architecture in floats; then every member of its front in uniform w8a8, free of charge;
- `in w8a8`: the architecture in uniform w8a8, from the start;
- `largest in w8a8`: the one network that a quantized supernet's owner has without any search.

The supernet is trained as it is in the run: whether in the precisions too (`train.quantize`) is told.

Each method's front is then judged anew, by images that no search has seen: accuracy on the test images, and
latency measured once more. Per seed:

1. the hypervolume of (top-1, latency) and of (top-1, bytes) by these, the latency and bytes of the largest
   network in floats and half of its accuracy being the reference;
2. of the members that have on the *search* images the accuracy of the largest network in w8a8, and one point
   less, the one that the search found fastest, and the one of the fewest bytes: its latency and bytes
   as a part of that network's, and how many points it gains on the test images. Nothing is chosen by those.

Claim (SimQ-NAS, Sridhar Nittur et al. 2023, arXiv 2312.13301): a joint search finds networks far faster and
smaller than the largest in 8 bits without loss; judged, by means over seeds: what is chosen at its accuracy
less one point has at most 0.8 of its latency, at most 0.8 of its bytes, and loses at most one point on the
test images. And the joint search's hypervolumes, of latency and of bytes, are not below those of `then
w8a8`: the mean over seeds of how much more they are. Intervals are Student's t, of 95 %, over seeds.

    python benchmarks/joint_search.py RUN [--check] [--trials 60] [--seeds 3] [--work FOLDER]

Takes about 3 seconds a candidate, and 20 minutes more for the fronts, on one idle core: 45 minutes. An arch
is evaluated once, for all methods and seeds. What was evaluated is kept in `--work`: the same command
continues a run that was killed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from evaluations import Evaluator, mean_and_half, run_searching, searching_parser, told_beforehand
from record import Benchmark, Figures

from nestling.pipeline import open_run
from nestling.pipeline.policies import is_precision
from nestling.search import EvaluationFailed, Problem, SearchResult, search
from nestling.search.pareto import hypervolume, nondominated
from nestling.space import Arch, SearchSpace

JOINT, THEN, UNIFORM, LARGEST = "joint", "then w8a8", "in w8a8", "largest in w8a8"
METHODS = (JOINT, THEN, UNIFORM)
INTEGERS, FLOATS = "w8a8", "fp32"
OBJECTIVES = ("top1", "latency_ms", "size_mb")
COSTS = {"latency_ms": "latency", "size_mb": "bytes"}
"""The objectives beside accuracy, and how they are called."""
STRATEGY = "predictor"
"""The product's default."""
NO_POPULATION = ("predictor", "random", "sorted_net")
"""Strategies for which a population means nothing."""
POPULATION = 16
MOST_PART = 0.8
LESS = (0.0, 0.01)
"""How much less accurate than the largest network in w8a8 a network may be."""


def uniform(space: SearchSpace, precision: str) -> SearchSpace:
    """`space` with `precision` everywhere."""
    return space.with_constants({name: precision for name in space.by_name if is_precision(name)})


def in_precision(space: SearchSpace, arch: Arch, precision: str) -> Arch:
    """The arch of `space` that is `arch` in `precision` everywhere."""
    return space.canonical({name: precision if is_precision(name) else arch[name] for name in space.by_name})


def method_space(space: SearchSpace, method: str) -> SearchSpace:
    """Where `method` searches."""
    return {JOINT: space, THEN: uniform(space, FLOATS), UNIFORM: uniform(space, INTEGERS)}[method]


def searched(evaluator: Evaluator, method: str, *, options: argparse.Namespace, seed: int) -> SearchResult:
    """What `method` tried."""
    space = method_space(evaluator.bench.space, method)
    asked = Problem.parse(space, objectives=OBJECTIVES, limits={})
    costs = told_beforehand(evaluator.bench, asked, strategy=options.strategy, trials=options.trials)
    return search(
        asked,
        evaluator.searched,
        storage=evaluator.folder / f"{method.replace(' ', '_')}_{options.strategy}_{seed}.db",
        name="search",
        trials=options.trials,
        strategy=options.strategy,
        population=options.population or POPULATION,
        seed=seed,
        exact=costs.exact,
        priors=costs.priors,
    )


def handed_over(space: SearchSpace, method: str, result: SearchResult) -> list[Arch]:
    """The archs of the whole `space` that `method` hands over."""
    members = [space.canonical(trial.arch) for trial in result.front]
    return [in_precision(space, arch, INTEGERS) for arch in members] if method == THEN else members


def known_of(evaluator: Evaluator, arch: Arch) -> dict[str, float]:
    """What `arch` is worth on images that no search has seen, and what a search knows of it.

    Raises:
        EvaluationFailed: it cannot be handed over.
    """
    known, found = evaluator.searched(arch), evaluator.judged(arch)
    told = {name: found[name] for name in (*OBJECTIVES, "unstable")}
    return told | {f"search_{name}": known[name] for name in (*OBJECTIVES, "unstable")}


def judge(evaluator: Evaluator, archs: Iterable[Arch], *, floats: Mapping[str, float]) -> dict[str, Any]:
    """What a front is worth on images that no search has seen; `floats` is the largest network in floats."""
    rows: list[dict[str, Any]] = []
    for arch in dict.fromkeys(archs):
        try:
            rows.append({"arch": arch.key, **known_of(evaluator, arch)})
        except EvaluationFailed as error:
            print(f"{arch.key} cannot be handed over: {error}", file=sys.stderr)
    volumes = {}
    for cost in COSTS:
        points = np.array([[1 - row["top1"], row[cost] / floats[cost]] for row in rows]).reshape(-1, 2)
        volumes[cost] = hypervolume(points, [1 - floats["top1"] / 2, 1.0])
        rows = [
            {**row, f"on {cost} front": bool(keep)}
            for row, keep in zip(rows, nondominated(points), strict=True)
        ]
    return {"members": rows, "hypervolume": volumes}


def chosen(
    members: Sequence[Mapping[str, Any]], cost: str, baseline: Mapping[str, float], *, less: float
) -> Mapping[str, Any] | None:
    """The cheapest of those as accurate as `baseline` less so much, by what a search knows; None of none."""
    enough = [row for row in members if row["search_top1"] >= baseline["search_top1"] - less]
    return min(enough, key=lambda row: float(row[f"search_{cost}"]), default=None)


def measure_all(options: argparse.Namespace) -> Figures:
    """The fronts of all methods and seeds, judged; prints a line for each."""
    bench = open_run(options.run)
    try:
        _ = bench.supernet  # an unfinished training is told before anything else
        folder = options.work or options.run / "joint_search"
        evaluator = Evaluator(bench, folder)
        largest = bench.space.largest
        ends = {
            precision: known_of(evaluator, in_precision(bench.space, largest, precision))
            for precision in (FLOATS, INTEGERS)
        }
        rows = []
        tried: set[Arch] = set()
        shaky: set[Arch] = set()
        for seed in range(options.seeds):
            row: dict[str, Any] = {"seed": seed}
            for method in METHODS:
                result = searched(evaluator, method, options=options, seed=seed)
                trials = result.trials[: options.trials]
                tried |= {bench.space.canonical(trial.arch) for trial in trials}
                shaky |= {bench.space.canonical(trial.arch) for trial in trials if unstable(trial.metrics)}
                archs = handed_over(bench.space, method, result)
                row[method] = judge(evaluator, archs, floats=ends[FLOATS])
                print(f"seed {seed}, {method}: {line(row[method], ends[INTEGERS])}", flush=True)
            rows.append(row)
        return {
            "run": bench.config.name,
            "trained": "in the precisions" if bench.config.train.quantize else "in floats",
            "space": {"archs": float(bench.space.size), "choices": len(bench.space.open_choices)},
            "device": bench.device.name,
            "strategy": options.strategy,
            "population": options.population,
            "trials": options.trials,
            "latencies": {
                "searched": {"archs": len(tried), "unstable": len(shaky)},
                "judged": judged_latencies(ends, rows),
            },
            "largest": ends,
            "seeds": rows,
        }
    finally:
        bench.close()


def unstable(metrics: Mapping[str, float]) -> bool:
    """Whether the latency is one that stayed unstable."""
    return metrics.get("unstable", 0.0) > 0


def judged_latencies(
    ends: Mapping[str, Mapping[str, float]], seeds: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """How many networks were measured for what is judged, the largest among them, and how many unstably."""
    members = {each["arch"]: each for row in seeds for method in METHODS for each in row[method]["members"]}
    all_of = [*members.values(), *ends.values()]
    return {"archs": len(all_of), "unstable": sum(unstable(each) for each in all_of)}


def line(judged: Mapping[str, Any], baseline: Mapping[str, float]) -> str:
    """One front, for reading."""
    members, volumes = judged["members"], judged["hypervolume"]
    told = [f"{len(members)} members", f"hypervolume {volumes['latency_ms']:.4f}, {volumes['size_mb']:.4f}"]
    for less in LESS:
        said = []
        for cost, name in COSTS.items():
            best = chosen(members, cost, baseline, less=less)
            if best is None:
                said.append(f"none for {name}")
                continue
            gained = 100 * (best["top1"] - baseline["top1"])
            said.append(
                f"{best[cost] / baseline[cost]:.2f}x of the {name} ({gained:+.1f} points on test images)"
            )
        told.append(f"at {100 * less:g} points less {', '.join(said)}")
    return "; ".join(told)


def parts(figures: Figures, method: str, cost: str, *, less: float) -> list[float]:
    """The cost of what is chosen as a part of the baseline's, seed by seed; infinite where there is none."""
    baseline = figures["largest"][INTEGERS]
    rows = [chosen(row[method]["members"], cost, baseline, less=less) for row in figures["seeds"]]
    return [math.inf if row is None else row[cost] / baseline[cost] for row in rows]


def points(figures: Figures, method: str, cost: str, *, less: float) -> list[float]:
    """The points that what is chosen gains on the test images, of the seeds in which there is something."""
    baseline = figures["largest"][INTEGERS]
    rows = [chosen(row[method]["members"], cost, baseline, less=less) for row in figures["seeds"]]
    return [100 * (row["top1"] - baseline["top1"]) for row in rows if row is not None]


def gains(figures: Figures, other: str, cost: str) -> list[float]:
    """How much more hypervolume the joint search has than `other`, in percent, seed by seed."""
    pairs = [(row[JOINT]["hypervolume"][cost], row[other]["hypervolume"][cost]) for row in figures["seeds"]]
    return [100 * (ours / theirs - 1) for ours, theirs in pairs]


def misses(figures: Figures) -> list[str]:
    """What is not as claimed."""
    found = []
    for cost, name in COSTS.items():
        here = statistics.fmean(parts(figures, JOINT, cost, less=LESS[-1]))
        if not here <= MOST_PART:
            found.append(f"{here:.2f} of the largest's {name} in w8a8 at a point less, not {MOST_PART}")
        gained = points(figures, JOINT, cost, less=LESS[-1])
        if gained and not statistics.fmean(gained) >= -100 * LESS[-1]:
            mean = statistics.fmean(gained)
            found.append(f"{mean:+.2f} points on test images for fewer {name}, not {-100 * LESS[-1]:g}")
        more = statistics.fmean(gains(figures, THEN, cost))
        if not more >= 0:
            found.append(f"hypervolume of top-1 and {name} {more:+.1f} % against quantizing afterwards")
    return found


def told_parts(figures: Figures, cost: str) -> str:
    """What the joint search's choice at a point less costs and gains, with intervals."""
    found, name = parts(figures, JOINT, cost, less=LESS[-1]), COSTS[cost]
    if lacking := found.count(math.inf):
        return f"in {lacking} of {len(found)} seeds nothing of fewer {name}"
    gained = points(figures, JOINT, cost, less=LESS[-1])
    return f"{told(found, '.2f')}x of its {name} ({told(gained, '+.1f')} points on test images)"


def told(values: Sequence[float], form: str) -> str:
    """The mean of `values`, and its interval where there are several."""
    mean, half = mean_and_half(values)
    return f"{mean:{form}}" + f" +- {half:{form.lstrip('+')}}" * (len(values) > 1)


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    said = [told_parts(figures, cost) for cost in COSTS]
    for cost, name in COSTS.items():
        each = [
            f"{told(gains(figures, other, cost), '+.1f')} % against {other!r}" for other in (THEN, UNIFORM)
        ]
        said.append(f"hypervolume of top-1 and {name} {', '.join(each)}")
    counts = figures["latencies"]
    doubt = f"{counts['searched']['unstable']} of {counts['searched']['archs']} latencies of the searches"
    doubt += (
        f" and {counts['judged']['unstable']} of {counts['judged']['archs']} of what is judged are unstable"
    )
    shaky = [name for name, metrics in figures["largest"].items() if unstable(metrics)]
    if shaky:
        doubt += f", that of the largest in {' and in '.join(shaky)} among them"
    return (
        f"{figures['trials']} candidates by {figures['strategy']}, {len(figures['seeds'])} seeds, joint, "
        f"trained as it is ({figures['trained']}): within a point of the largest in w8a8 "
        + "; ".join([*said, doubt])
    )


def benchmark(size: str = "cpu") -> Benchmark:
    """The benchmark, its figures under a name of the size's own."""
    name = "joint_search" if size == "cpu" else f"joint_search_{size}"
    return Benchmark(name, __doc__, measure_all, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = searching_parser(benchmark(), trials=(60, 12))
    parser.add_argument("--strategy", default=STRATEGY, help=f"who proposes [default: {STRATEGY}]")
    parser.add_argument(
        "--population", type=int, help=f"for strategies that have one [default: {POPULATION}]"
    )
    options = parser.parse_args(words)
    if options.strategy not in NO_POPULATION:
        options.population = options.population or POPULATION
    elif options.population is not None:
        parser.error(f"--population is given, and {options.strategy} has none")
    return run_searching(benchmark, parser, options)


if __name__ == "__main__":
    sys.exit(main())
