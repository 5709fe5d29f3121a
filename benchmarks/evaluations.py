"""What benchmarks of searches on a trained supernet share: evaluations, kept in files, and their options."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from record import Benchmark, store
from strategies import T_QUANTILES

from nestling.config import ConfigError, override_config
from nestling.pipeline.candidate import candidate_metrics, write_candidate
from nestling.pipeline.costs import Costs, known_costs
from nestling.pipeline.listening import Silent
from nestling.pipeline.measuring import PAUSES, latency_metrics, measure, score
from nestling.pipeline.workbench import Workbench
from nestling.run import RunError
from nestling.search import Problem
from nestling.space import Arch

KINDS = ("searched", "judged")


class Evaluator:
    """What archs turned out to be; each is evaluated once, and kept in a file.

    Latency is told as a part of the device's reference model's, which repeats where milliseconds do not.

    Args:
        bench: of the run whose supernet lends.
        folder: for what was found.
        pauses: seconds before an unstable measurement is taken again, and again.
    """

    def __init__(self, bench: Workbench, folder: Path, *, pauses: Sequence[float] = PAUSES) -> None:
        self.bench = bench
        self.folder = folder
        self.pauses = pauses
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def searched(self, arch: Arch) -> Mapping[str, float]:
        """What a search is told of `arch`, a member of the run's space or of a part of it."""
        return self._kept(self.bench.space.canonical(arch), "searched")

    def judged(self, arch: Arch) -> Mapping[str, float]:
        """The same on the test images, the latency measured anew."""
        return self._kept(self.bench.space.canonical(arch), "judged")

    def _kept(self, arch: Arch, kind: str) -> Mapping[str, float]:
        path = self.folder / kind / f"{arch.key}.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text())
            return found
        model = self.folder / f"{arch.key}.onnx"
        candidate = write_candidate(self.bench, arch, model)
        images = self.bench.data.search if kind == "searched" else self.bench.data.test()
        accuracy = score(self.bench.device, model, images, resolution=candidate.resolution)
        measurement = measure(self.bench.device, model, pauses=self.pauses)
        metrics = candidate_metrics(candidate, accuracy) | latency_metrics(measurement, reference_ms=1.0)
        metrics |= {"unstable": float(measurement.unstable), "images": float(accuracy.total)}
        model.unlink()
        store(path, metrics)
        return metrics


class Telling(Silent):
    """Prints notes."""

    def note(self, text: str) -> None:
        """Prints `text`."""
        print(text, flush=True)


def told_beforehand(bench: Workbench, asked: Problem, *, strategy: str, trials: int) -> Costs:
    """What `nestling search` tells a `strategy` that looks for `asked`; kept in the run's folder."""
    given = bench.config
    bench.config = override_config(given, [f"search.strategy={strategy}", f"search.trials={trials}"])
    try:
        return known_costs(bench, asked=asked, listener=Telling())
    finally:
        bench.config = given


def searching_parser(
    made: Benchmark, *, trials: Sequence[int], seeds: Sequence[int] = (3, 1)
) -> argparse.ArgumentParser:
    """The options of a benchmark that searches a run's space; each pair is the default, and a quick one's."""
    parser = made.parser()
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a run whose training is finished")
    parser.add_argument(
        "--trials", type=int, help=f"candidates a search [default: {trials[0]}; quick {trials[1]}]"
    )
    parser.add_argument("--seeds", type=int, help=f"[default: {seeds[0]}; quick {seeds[1]}]")
    parser.add_argument("--work", type=Path, help=f"[default: {made.name} in the run's folder]")
    parser.add_argument("--quick", action="store_true", help="few candidates, one seed; figures of its own")
    parser.set_defaults(sizes=(tuple(trials), tuple(seeds)))
    return parser


def run_searching(
    make: Callable[[str], Benchmark], parser: argparse.ArgumentParser, options: argparse.Namespace
) -> int:
    """The exit code of the benchmark that `make` makes in a size, with options of `searching_parser`."""
    made = make("quick" if options.quick else "cpu")
    if options.stored:
        return made.run(options)
    if options.run is None:
        parser.error("give RUN, the folder of a run whose training is finished, or --stored")
    trials, seeds = options.sizes
    options.trials = options.trials or trials[options.quick]
    options.seeds = options.seeds or seeds[options.quick]
    try:
        return made.run(options)
    except (ConfigError, RunError) as error:
        print(f"{options.run}: {error}", file=sys.stderr)
        return 2


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval (Student's t); infinite with one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("inf")
    return mean, T_QUANTILES[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
