"""What a search costs beside evaluating: proposing candidates, leasing and recording them.

Claim: at 1,000 trials, 60 choices and 3 objectives at most 100 ms for a candidate, of which recording takes
at most 50.

A toy of 60 choices with 3 objectives and a limit, whose evaluation takes no time, is searched to 1,000 trials
by the real `search()`. Of the last candidates the wall and the processor time from the end of one evaluation
to the beginning of the next are taken: recording the trial with its 60 parameters in one transaction, leasing
the next candidate, and every few candidates proposing a batch. Proposing is also timed by itself, at 1,000
trials; the rest is recording. The first batch is told apart: a process that goes on with a search decides
there once what one that began it has decided on the way. Beside them, Optuna's own way to add one such trial
to the same file. The same in PostgreSQL, where there is one.

    python benchmarks/search_overhead.py [--check] [--quick] [--strategy NAME]

Takes 1 to 3 minutes. Each commit waits for the disk, so that the figures are those of a machine's disk, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import postgres
from optuna.storages import RDBStorage
from optuna.trial import create_trial
from record import Benchmark, Figures

from nestling.config import SearchConfig
from nestling.search import Problem, make_proposer, search
from nestling.search.proposing import usual_batch
from nestling.search.samplers import distributions, quiet
from nestling.space import Arch, Choice, SearchSpace

TRIALS, CHOICES, POPULATION = 1000, 60, 20
MEASURED_BATCHES = 13
LIMIT_MS = 100.0
RECORDING_MS = 50.0
OPTUNA_TRIALS = 5


def toy(choices: int) -> Problem:
    """A space of that many choices, with 3 objectives and a limit."""
    space = SearchSpace("toy", tuple(Choice(f"b{n}.kernel", (3, 5, 7, 9)) for n in range(choices)))
    limit = 24.0 * choices  # about half of all keep it
    return Problem.parse(space, objectives=["top1", "latency_ms", "size_mb"], limits={"mmacs": limit})


def evaluate(arch: Arch) -> Mapping[str, float]:
    """Metrics at once; choices matter differently."""
    cost = sum(arch.integer(name) * (1 + number % 7) for number, name in enumerate(arch, 1))
    size = sum(arch.integer(name) * (1 + number % 3) for number, name in enumerate(arch, 1))
    top1 = 1 - 1 / (1 + sum(arch.integer(name) ** 0.5 for name in arch))
    return {"top1": top1, "latency_ms": cost / 100, "size_mb": size / 100, "mmacs": float(cost)}


def measure_place(place: str, strategy: str, *, trials: int, choices: int, seed: int) -> dict[str, float]:
    """Milliseconds for a candidate in the study at `place`; with another seed its trials are new."""
    problem = toy(choices)
    # as many at a time as a search asks for that is not told otherwise
    batch = usual_batch(strategy, tried=trials, population=POPULATION)
    measured = batch * min(MEASURED_BATCHES, trials // (2 * batch))
    before = trials - measured - batch
    shared: dict[str, Any] = {"storage": place, "name": "toy", "population": POPULATION, "seed": seed}
    search(problem, evaluate, trials=before, strategy="random", **shared)
    began = time.perf_counter()
    search(problem, evaluate, trials=before + batch, strategy=strategy, **shared)
    first = time.perf_counter() - began
    left: list[tuple[float, float]] = []
    entered: list[tuple[float, float]] = []

    def timed(arch: Arch) -> Mapping[str, float]:
        entered.append((time.perf_counter(), time.process_time()))
        metrics = evaluate(arch)
        left.append((time.perf_counter(), time.process_time()))
        return metrics

    result = search(problem, timed, trials=trials, strategy=strategy, **shared)
    wall = [after[0] - done[0] for done, after in zip(left, entered[1:], strict=False)]
    processor = [after[1] - done[1] for done, after in zip(left, entered[1:], strict=False)]
    proposer = make_proposer(strategy, problem, population=POPULATION)
    began = time.perf_counter()
    rounds = 3
    for seed in range(rounds):
        proposer.propose(problem, result.trials, pending=(), count=batch, seed=seed)
    proposing = (time.perf_counter() - began) / rounds / batch
    total = statistics.fmean(wall)
    return {
        "batch": batch,
        "first_batch_s": first,
        "total_ms": total * 1e3,
        "total_processor_ms": statistics.fmean(processor) * 1e3,
        "proposing_ms": proposing * 1e3,
        # a batch's candidates after its first wait for no proposal
        "recording_ms": statistics.median(wall) * 1e3,
    }


def optuna_ms(file: Path, problem: Problem) -> float:
    """Milliseconds that Optuna takes to add one trial to the study in `file`."""
    template = create_trial(
        values=[0.5, 1.0, 1.0],
        params=dict(problem.space.largest),
        distributions=distributions(problem),
        user_attrs={"arch": problem.space.largest.to_json()},
    )
    with quiet():
        storage = RDBStorage(f"sqlite:///{file}")
        study = storage.get_study_id_from_name("toy")
        storage.create_new_trial(study, template)
        began = time.perf_counter()
        for _ in range(OPTUNA_TRIALS):
            storage.create_new_trial(study, template)
        seconds = time.perf_counter() - began
        storage.remove_session()
        storage.engine.dispose()
    return seconds / OPTUNA_TRIALS * 1e3


def measure(options: argparse.Namespace) -> Figures:
    trials, choices = (100, 20) if options.quick else (TRIALS, CHOICES)
    places: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="search_overhead-")))
        at = {"SQLite": str(folder / "study.db")}
        try:
            at["PostgreSQL"] = stack.enter_context(postgres.server()).new_database("overhead")
        except postgres.NoServer as error:
            print(f"without PostgreSQL: {error}", flush=True)
        for seed, (name, place) in enumerate(at.items()):
            places[name] = measure_place(place, options.strategy, trials=trials, choices=choices, seed=seed)
            print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in places[name].items()), flush=True)
        optuna = optuna_ms(folder / "study.db", toy(choices))
    return {
        "settings": {"trials": trials, "choices": choices, "objectives": 3},
        "strategy": options.strategy,
        "places": places,
        "optuna_adds_one_ms": optuna,
    }


def misses(figures: Figures) -> list[str]:
    found = []
    for place, told in figures["places"].items():
        if not told["total_ms"] <= LIMIT_MS:
            found.append(f"{place}: {told['total_ms']:.0f} ms a candidate, at most {LIMIT_MS:.0f} were to be")
        if not told["recording_ms"] <= RECORDING_MS:
            found.append(
                f"{place}: {told['recording_ms']:.0f} ms to record, at most {RECORDING_MS:.0f} were to be"
            )
    return found


def sentence(figures: Figures) -> str:
    settings = figures["settings"]
    told = "; ".join(
        f"{place} {figures['places'][place]['total_ms']:.0f} ms "
        f"(recording {figures['places'][place]['recording_ms']:.0f}, "
        f"proposing {figures['places'][place]['proposing_ms']:.0f})"
        for place in figures["places"]
    )
    return (
        f"overhead of a candidate at {settings['trials']:,} trials, {settings['choices']} choices, "
        f"{settings['objectives']} objectives, {figures['strategy']}: {told}; Optuna itself takes "
        f"{figures['optuna_adds_one_ms']:.0f} ms to add a trial"
    )


BENCHMARK = Benchmark("search_overhead", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--quick", action="store_true", help="100 trials, 20 choices")
    parser.add_argument(
        "--strategy", default=SearchConfig().strategy, help="who proposes [default: the configuration's]"
    )
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
