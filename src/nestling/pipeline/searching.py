"""The search stage: candidates become files, are scored and timed, alone or by several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from nestling.models.graph import Untraceable
from nestling.pipeline.candidate import cost_metrics, write_candidate
from nestling.pipeline.concluding import concluded, tidy
from nestling.pipeline.costs import Costs, known_costs
from nestling.pipeline.listening import Listener
from nestling.pipeline.measuring import latency_metrics, measure
from nestling.pipeline.racing import Scoring
from nestling.pipeline.reusing import reused
from nestling.pipeline.scale import other_settings, rescaled, run_reference
from nestling.pipeline.seeding import seeds
from nestling.pipeline.settling import settle
from nestling.pipeline.studies import Place, about, problem, study_place
from nestling.pipeline.workbench import Workbench
from nestling.quant import Unquantizable
from nestling.search import (
    EvaluationFailed,
    Metrics,
    SearchResult,
    Trial,
    Workers,
    load_result,
    load_stop,
    search,
    suspects,
    watch,
)
from nestling.search.proposing import PLANNED
from nestling.space import Arch

REUSED = {"top1_partial": 0.0, "top1_reused": 1.0}
"""What the metrics say of a candidate whose accuracy is that of another run."""


def search_supernet(bench: Workbench, *, listener: Listener) -> SearchResult:
    """The result of the run's search, continued where it was stopped.

    Each candidate is written to a file; accuracy (on the search split) and latency are those of the file.
    With `search.workers` above 1 as many processes of this machine search together, and this one watches; it
    watches over one where a candidate may be what killed the search before. In the end the front's members of
    an unstable latency are timed again, and the front is taken anew.

    Raises:
        RunError: training is not finished, or the run was measured on another device or runtime.
        InfeasibleLimit: no network of the space can keep a limit.
        ConfigError, StudyMismatch: see `settle`; the run and its study are as they were.
        StudyUnavailable: the study's database cannot be reached.
        WorkersLost: a worker ended with an error.
    """
    listener.stage("search")
    bench.check_trained()
    settle(bench, note=listener.note)
    asked, place = problem(bench), study_place(bench)
    with bench.timed("search"):
        alone = bench.config.search.workers == 1 and not _is_suspicious(bench, place, listener)
        before = rescaled(bench, place, load_result(asked, storage=place.storage, name=place.name), listener)
        result = (_search if alone else _watch)(bench, place, listener)
        fresh = len(result.trials) > len(before.trials)
        result = concluded(bench, place, result, listener, fresh=fresh)
    below = bench.config.search.stop_below
    stop = load_stop(asked, below, storage=place.storage, name=place.name)
    if stop is not None:
        listener.note(
            f"the search has ended early: {stop}, less than search.stop_below ({below:.2%}); "
            "`--set search.stop_below=0` goes on"
        )
    tried, wanted = len(result.complete) + len(result.failed), bench.config.search.trials
    if bench.config.search.strategy in PLANNED and stop is None and tried < min(wanted, bench.space.size):
        listener.note(
            f"{bench.config.search.strategy} has come to the end of its plan: {tried} candidates are "
            f"evaluated, not {wanted}; another `search.strategy` goes on"
        )
    for told in result.unmet:
        listener.note(told)
    tidy(bench, place, result)
    return result


def join_search(bench: Workbench, *, study: str | None = None, listener: Listener) -> SearchResult:
    """The result of the run's search, in which this process takes part beside others.

    The study is in the database `study`, where that is given. What the bench is asked for is not kept.

    Raises:
        Exception: as `search_supernet`.
    """
    listener.stage("search")
    bench.check_trained()
    return _search(bench, study_place(bench, given=study), listener)


def _search(bench: Workbench, place: Place, listener: Listener) -> SearchResult:
    config = bench.config.search
    so_far = load_result(problem(bench), storage=place.storage, name=place.name)
    costs = _costs(bench, so_far, listener)
    known = reused(bench, listener=listener)
    scoring = Scoring(bench)
    scoring.trials = so_far.trials
    return search(
        problem(bench),
        _evaluation(bench, place, scoring, known.metrics, note=listener.note),
        storage=place.storage,
        name=place.name,
        trials=config.trials,
        strategy=config.strategy,
        population=config.population,
        batch=config.batch,
        seed=bench.config.seed,
        warm_start=config.warm_start,
        seeds=[*known.front, *_seeds(bench, listener)],
        exact=costs.exact,
        priors=costs.priors,
        stop_below=config.stop_below,
        elsewhere=known.metrics,
        about=about(bench),
        on_trial=_telling(bench, listener, scoring),
    )


def _costs(bench: Workbench, so_far: SearchResult, listener: Listener) -> Costs:
    """What the search need not learn; nothing where there is nothing left to propose."""
    done = len(so_far.complete) + len(so_far.failed)
    if done >= min(bench.config.search.trials, bench.space.size):
        return Costs({}, {})
    return known_costs(bench, listener=listener)


def _is_suspicious(bench: Workbench, place: Place, listener: Listener) -> bool:
    """Whether the search was lost with a candidate so often that it must be told from somebody's kills."""
    found = suspects(problem(bench), storage=place.storage, name=place.name, about=about(bench))
    if found:
        listener.note(
            f"the search was lost again and again with {found} of its candidates; a worker evaluates now, so "
            "that it is seen whether a candidate kills it"
        )
    return found > 0


def _watch(bench: Workbench, place: Place, listener: Listener) -> SearchResult:
    config = bench.config.search
    reused(bench, listener=listener)  # refuses what workers would refuse one by one
    _seeds(bench, listener)  # found once, and read by the workers
    _costs(bench, load_result(problem(bench), storage=place.storage, name=place.name), listener)  # the same
    count = (
        "1 worker; what it prints" if config.workers == 1 else f"{config.workers} workers; what they print"
    )
    listener.note(f"{count} is in {bench.run.folder / 'workers'}")
    with _workers(bench) as workers:
        return watch(
            problem(bench),
            storage=place.storage,
            name=place.name,
            trials=config.trials,
            stop_below=config.stop_below,
            about=about(bench),
            on_trial=_telling(bench, listener),
            while_waiting=workers.check,
        )


def _workers(bench: Workbench) -> Workers:
    """Processes of this machine that search the run's study, each computing with its share of the cores."""
    folder, count = bench.run.folder, bench.config.search.workers
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "nestling.cli", "worker", str(folder), "--tied"]
    return Workers(command, count, logs=folder / "workers", environment=environment)


def _telling(
    bench: Workbench, listener: Listener, scoring: Scoring | None = None
) -> Callable[[Trial, SearchResult], None]:
    def on_trial(trial: Trial, result: SearchResult) -> None:
        if scoring is not None:
            scoring.trials = result.trials
        listener.trial(trial, result, bench.config.search.trials)

    return on_trial


def _evaluation(
    bench: Workbench,
    place: Place,
    scoring: Scoring,
    known: Mapping[Arch, Metrics],
    *,
    note: Callable[[str], None],
) -> Callable[[Arch], Metrics]:
    """What gives the metrics of an arch; files and measurements are the run's.

    Of archs that are `known` only latency is measured; where none is asked for, not even a file is written.
    """
    wanted = problem(bench).needed()
    reference: dict[str, Any] = {}

    def evaluate(arch: Arch) -> Metrics:
        if arch in known and "latency_ms" not in wanted:
            return {**known[arch], **REUSED}
        path = bench.candidate_path(arch)
        candidate = write_candidate(bench, arch, path)
        simulated = candidate.policy.simulated
        if simulated and "latency_ms" in wanted:  # a limit may have come after the space was settled
            raise EvaluationFailed(
                f"{simulated[0]} is for research: no runtime computes it, so it has no latency; begin a new "
                "run with the limit on latency, which leaves such precisions out"
            )
        metrics = cost_metrics(candidate)
        if "latency_ms" in wanted:
            measurement = measure(bench.device, path)
            if not reference:
                reference.update(run_reference(bench, place, measurement))
                if (told := other_settings(bench, reference, measurement)) is not None:
                    note(told)
            metrics |= latency_metrics(measurement, reference_ms=float(reference["latency_ms"]))
        if arch in known:
            return {**metrics, **known[arch], **REUSED}
        # last, as what it costs says how accurate it must be
        return scoring(path, resolution=candidate.resolution, costs=metrics) | metrics

    return evaluate


def _seeds(bench: Workbench, listener: Listener) -> list[Arch]:
    """What `seeds` gives; nothing, and a note, where the largest network is one that cannot be quantized."""
    try:
        return seeds(bench, problem(bench), listener=listener)
    except (Untraceable, Unquantizable) as error:
        listener.note(f"no archs by sensitivity: {error}")
        return []
