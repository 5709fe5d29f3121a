"""search(): asks a sampler for archs, evaluates each one once, and records every outcome.

The sampler is made anew for each trial, from the seed and (unless it follows one plan) the trial's number,
and reads what the record holds: a search that was killed and continued evaluates the same archs as one that
was not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nestling.search.objectives import Metrics, Problem, check_limits
from nestling.search.record import Record, read_record
from nestling.search.result import SearchResult, Trial
from nestling.search.samplers import PLANNED, check_sampler, make_sampler
from nestling.space import Arch

STUBBORN = 10
"""Known archs that a sampler may propose in a row before an unknown one is put in their place."""
ATTEMPTS = 1000
"""Random archs that are tried for an unknown one before the space is walked through."""


class EvaluationFailed(Exception):  # noqa: N818 - it names what happened
    """An arch that could not be evaluated; the trial fails with this reason, and the search goes on."""


def search(
    problem: Problem,
    evaluate: Callable[[Arch], Metrics],
    *,
    storage: Path,
    name: str,
    trials: int,
    sampler: str = "NSGAIISampler",
    population: int = 20,
    seed: int = 0,
    warm_start: int = 6,
    seeds: Sequence[Arch] = (),
    on_trial: Callable[[Trial, SearchResult], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Everything that was tried, once `trials` different archs are evaluated, those stored before included.

    Begins with the smallest and the largest arch, `warm_start` archs spread between them, and `seeds`. An
    arch that the sampler proposes again is answered from the record. Where the space has fewer archs than
    `trials`, the search ends when all are known.

    Args:
        problem: the space, what to improve, what to keep.
        evaluate: the metrics of an arch; raises `EvaluationFailed` where there are none. Any other exception
            ends the search; the next one asks for that arch again.
        storage: the SQLite file, which other Optuna tools can read.
        name: of the study.
        trials: how many different archs, failed ones included.
        sampler: the class name of one of Optuna's samplers.
        population: for samplers that have one.
        seed: of every random decision.
        warm_start: archs spread from smallest to largest that are evaluated first.
        seeds: archs of the space that are evaluated next.
        on_trial: called after each trial, duplicates included, when it is stored.
        clock: seconds.

    Raises:
        InfeasibleLimit: not even the smallest network keeps a limit on a cost.
        StudyMismatch: the file holds a study of that name for another problem, or no study.
        ValueError: no such sampler, or one that cannot search this space.
    """
    check_sampler(sampler, problem, population=population)
    record = Record(problem, storage, name)
    known = {trial.arch: trial for trial in record.trials if trial.state != "duplicate"}
    begin = _first_archs(problem, warm_start, seeds)
    _check_smallest(problem, known)
    while len(known) < min(trials, problem.space.size):
        number = len(record.trials)
        rng = random.Random(f"{seed}/{number}")
        drawn = seed if sampler in PLANNED else rng.getrandbits(31)
        made = make_sampler(sampler, problem, seed=drawn, population=population)
        forced = begin[number] if number < len(begin) else None
        if forced is None and _is_stuck(record.trials):
            forced = _unknown(record.result, known, rng)
        arch = record.ask(made, forced=forced)
        if original := known.get(arch):
            trial = replace(original, number=number, state="duplicate", seconds=0.0)
            record.tell(trial, original=original)
        else:
            trial = known[arch] = _evaluate(problem, evaluate, arch, number=number, clock=clock)
            record.tell(trial)
        if on_trial is not None:
            on_trial(trial, record.result)
        if arch == problem.space.smallest:
            _check_smallest(problem, known)
    return record.result


def load_result(problem: Problem, *, storage: Path, name: str) -> SearchResult:
    """What the study `name` in the SQLite file `storage` has so far; nothing where there is no such study.

    Raises:
        StudyMismatch: the study is of another problem.
    """
    return read_record(problem, storage, name)


def _check_smallest(problem: Problem, known: Mapping[Arch, Trial]) -> None:
    trial = known.get(problem.space.smallest)
    if trial is not None and trial.state == "complete":
        check_limits(problem, smallest=trial.metrics)


def _first_archs(problem: Problem, warm_start: int, seeds: Sequence[Arch]) -> list[Arch]:
    ends = [problem.space.smallest, problem.space.largest]
    return list(dict.fromkeys([*ends, *problem.space.spread(warm_start), *seeds]))


def _is_stuck(trials: Sequence[Trial]) -> bool:
    last = trials[-STUBBORN:]
    return len(last) == STUBBORN and all(trial.state == "duplicate" for trial in last)


def _evaluate(
    problem: Problem,
    evaluate: Callable[[Arch], Metrics],
    arch: Arch,
    *,
    number: int,
    clock: Callable[[], float],
) -> Trial:
    began = clock()
    try:
        metrics = {metric: float(value) for metric, value in evaluate(arch).items()}
    except EvaluationFailed as error:
        reason = str(error) or "the evaluation failed without a reason"
        return Trial(number, arch, {}, "failed", reason, seconds=clock() - began)
    seconds = clock() - began
    missing = [f"{metric} was not measured" for metric in problem.needed() if metric not in metrics]
    bad = [f"{metric} is {value}" for metric, value in metrics.items() if not math.isfinite(value)]
    if missing or bad:
        return Trial(number, arch, {}, "failed", "; ".join([*missing, *bad]), seconds=seconds)
    return Trial(number, arch, metrics, "complete", seconds=seconds)


def _unknown(result: SearchResult, known: Mapping[Arch, Trial], rng: random.Random) -> Arch:
    """An arch that was not tried: near the front, else anywhere."""
    space = result.problem.space
    for attempt in range(ATTEMPTS):
        if result.front and attempt < ATTEMPTS // 2:
            # about two choices change at first, more and more where everything near is known
            probability = min(1.0, 2 / len(space.open_choices) * (1 + attempt / 50))
            arch = space.mutate(rng.choice(result.front).arch, rng, probability=probability)
        else:
            arch = space.sample(rng)
        if arch not in known:
            return arch
    return next(arch for arch in space.walk() if arch not in known)
