"""search(): evaluates archs until enough are known, alone or beside other processes on the same study.

What is to be evaluated stands in a queue in the study's database, and whoever finds it empty proposes what
comes next, from the trials that are stored and the number of archs that were ever proposed: a search in one
process that was killed and continued evaluates the same archs as one that was not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nestling.search.ending import Ending
from nestling.search.losses import Exact
from nestling.search.objectives import Metrics, Problem
from nestling.search.opening import open_queue
from nestling.search.proposing import DEFAULT, PLANNED, Proposer, make_proposer, usual_batch
from nestling.search.queue import LEASE_SECONDS, Proposing, Task
from nestling.search.record import Record, read_record
from nestling.search.result import SearchResult, Trial, check_smallest
from nestling.search.stopping import Stopping
from nestling.space import Arch

ATTEMPTS = 1000
"""Random archs that are tried for an unknown one before the space is walked through."""
POLL_SECONDS = 0.2
"""How often a process that has nothing to do looks for something."""


class EvaluationFailed(Exception):  # noqa: N818 - it names what happened
    """An arch that could not be evaluated; the trial fails with this reason, and the search goes on."""


def search(
    problem: Problem,
    evaluate: Callable[[Arch], Metrics],
    *,
    storage: Path | str,
    name: str,
    trials: int,
    strategy: str = DEFAULT,
    population: int = 20,
    batch: int | None = None,
    seed: int = 0,
    warm_start: int = 6,
    seeds: Sequence[Arch] = (),
    exact: Mapping[str, Exact] | None = None,
    priors: Mapping[str, Exact] | None = None,
    stop_below: float = 0.0,
    elsewhere: Mapping[Arch, Metrics] | None = None,
    about: Mapping[str, str] | None = None,
    on_trial: Callable[[Trial, SearchResult], None] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Everything that was tried, once `trials` different archs are evaluated, those stored before included.

    Begins with the smallest and the largest arch, `warm_start` archs spread between them, and `seeds`. Where
    the space has fewer archs than `trials`, the search ends when all are known; with a strategy that has a
    plan, at the latest when that is done. Any number of processes may search one study at once, each with a
    call of its own: no arch is evaluated by two, unless one of them was silent for `lease_seconds`, and none
    is recorded twice.

    Args:
        problem: the space, what to improve, what to keep.
        evaluate: the metrics of an arch; raises `EvaluationFailed` where there are none. Any other exception
            ends the search; the next one asks for that arch again.
        storage: the SQLite file, or the URL of a PostgreSQL database; other Optuna tools can read either.
        name: of the study.
        trials: how many different archs, failed ones included.
        strategy: who proposes: see `make_proposer`.
        population: for strategies that have one.
        batch: how many archs are proposed at a time; None for what the strategy usually is asked for.
        seed: of every random decision.
        warm_start: archs spread from smallest to largest that are evaluated first.
        seeds: archs of the space that are evaluated next.
        exact: metrics that the strategy need not learn, see `make_proposer`; there are `priors` and
            `elsewhere` as well.
        stop_below: ends the search before `trials` where candidates add less than this: see `Stopping`.
        about: what else must be the same for all who search this study, by name.
        on_trial: called for each new trial, this process's or another's, when it is stored.
        lease_seconds: how long a process may be silent before another one does its work.
        clock: seconds.

    Raises:
        InfeasibleLimit: not even the smallest network keeps a limit on a cost.
        StudyMismatch: the database holds a study of that name for another problem, or no study.
        StudyUnavailable: the database cannot be reached or written.
        ValueError: no such strategy, or one that cannot search this space; or a bad `stop_below`.
    """
    proposer = make_proposer(
        strategy, problem, population=population, exact=exact, priors=priors, elsewhere=elsewhere
    )
    wanted = min(trials, problem.space.size)
    stopping = Stopping(problem, stop_below)

    with open_queue(problem, storage, name, about=about, lease_seconds=lease_seconds) as queue:
        record, ending = queue.record, Ending(queue, stopping)
        told = len(record.trials)
        check_smallest(problem, record.trials)
        queue.offer(_first_archs(problem, warm_start, seeds))
        with queue.renewing():
            todo = queue.next(wanted)
            while True:
                told = _tell(record, told, on_trial)
                check_smallest(problem, record.trials)
                if ending.look(record.trials) is not None:
                    return record.result
                if isinstance(todo, Task):
                    outcome = _evaluate(problem, evaluate, todo.arch, clock=clock)
                    todo = queue.next(wanted, outcome=(todo, outcome))
                elif isinstance(todo, Proposing):
                    size = batch or usual_batch(strategy, tried=len(record.trials), population=population)
                    proposals = _proposals(
                        proposer, record.result, todo, batch=size, seed=seed, planned=strategy in PLANNED
                    )
                    if not proposals and not todo.pending:
                        return record.result
                    if not proposals:  # what others evaluate may come back to this process
                        time.sleep(POLL_SECONDS)
                    todo = queue.next(wanted, proposals=proposals)
                elif todo.done:
                    return record.result
                else:
                    time.sleep(POLL_SECONDS)
                    todo = queue.next(wanted)


def watch(
    problem: Problem,
    *,
    storage: Path | str,
    name: str,
    trials: int,
    stop_below: float = 0.0,
    about: Mapping[str, str] | None = None,
    on_trial: Callable[[Trial, SearchResult], None] | None = None,
    while_waiting: Callable[[int], bool],
) -> SearchResult:
    """Everything that was tried, once other processes have evaluated `trials` different archs, or are done.

    Args:
        problem, storage, name, trials, stop_below, about, on_trial: as of `search`.
        while_waiting: called again and again with the number of archs that are evaluated: whether others are
            at work still; what it raises ends the watch.

    Raises:
        Exception: as `search`.
    """
    wanted = min(trials, problem.space.size)
    stopping = Stopping(problem, stop_below)
    with open_queue(problem, storage, name, about=about) as queue:
        record, ending = queue.record, Ending(queue, stopping)
        check_smallest(problem, record.trials)
        queue.keep_watch()

        told = len(record.trials)

        def look() -> int:
            nonlocal told
            record.sync()
            told = _tell(record, told, on_trial)
            check_smallest(problem, record.trials)
            return len(record.result.complete) + len(record.result.failed)

        with queue.renewing():
            while (done := look()) < wanted and ending.look(record.trials) is None:
                try:
                    working = while_waiting(done)
                except Exception:
                    look()  # which tells more than that others have ended, where a limit cannot be kept
                    raise
                if not working:  # as their strategy has come to the end of its plan
                    look()
                    break
                time.sleep(POLL_SECONDS)
        return record.result


def load_result(problem: Problem, *, storage: Path | str, name: str) -> SearchResult:
    """What the study `name` at `storage` has so far; nothing where there is no such study.

    Raises:
        StudyMismatch: the study is of another problem.
        StudyUnavailable: the database cannot be reached.
    """
    return read_record(problem, storage, name)


def _tell(record: Record, told: int, on_trial: Callable[[Trial, SearchResult], None] | None) -> int:
    """Calls `on_trial` for the trials after the first `told`: how many there are."""
    if on_trial is not None:
        for trial in record.trials[told:]:
            on_trial(trial, record.result)
    return len(record.trials)


def _first_archs(problem: Problem, warm_start: int, seeds: Sequence[Arch]) -> list[Arch]:
    ends = [problem.space.smallest, problem.space.largest]
    return list(dict.fromkeys([*ends, *problem.space.spread(warm_start), *seeds]))


def _proposals(
    proposer: Proposer, result: SearchResult, turn: Proposing, *, batch: int, seed: int, planned: bool
) -> list[Arch]:
    """At most `batch` archs that nobody tried or tries, in the order in which they are to be evaluated.

    None where the space has no more, or where the proposer has `planned` what it does and is done.
    """
    rng = random.Random(f"{seed}/{turn.position}")
    taken = {*(trial.arch for trial in result.trials), *turn.pending}
    count = min(batch, result.problem.space.size - len(taken))
    if count <= 0:
        return []
    found = proposer.propose(
        result.problem, result.trials, pending=turn.pending, count=count, seed=rng.getrandbits(31)
    )
    new = [arch for arch in dict.fromkeys(found) if arch not in taken][:count]
    if new or planned:
        return new
    # a proposer that is out of ideas must not end the search
    return [_unknown(result, taken, rng)]


def _evaluate(
    problem: Problem,
    evaluate: Callable[[Arch], Metrics],
    arch: Arch,
    *,
    clock: Callable[[], float],
) -> Trial:
    """The outcome of `arch`; its number is given when it is stored."""
    began = clock()
    try:
        metrics = {metric: float(value) for metric, value in evaluate(arch).items()}
    except EvaluationFailed as error:
        reason = str(error) or "the evaluation failed without a reason"
        return Trial(0, arch, {}, "failed", reason, seconds=clock() - began)
    seconds = clock() - began
    missing = [f"{metric} was not measured" for metric in problem.needed() if metric not in metrics]
    bad = [f"{metric} is {value}" for metric, value in metrics.items() if not math.isfinite(value)]
    if missing or bad:
        return Trial(0, arch, {}, "failed", "; ".join([*missing, *bad]), seconds=seconds)
    return Trial(0, arch, metrics, "complete", seconds=seconds)


def _unknown(result: SearchResult, taken: set[Arch], rng: random.Random) -> Arch:
    """An arch that is not `taken`, of which the space has one: near the front, else anywhere."""
    space = result.problem.space
    for attempt in range(ATTEMPTS):
        if result.front and attempt < ATTEMPTS // 2:
            # about two choices change at first, more and more where everything near is known
            probability = min(1.0, 2 / len(space.open_choices) * (1 + attempt / 50))
            arch = space.mutate(rng.choice(result.front).arch, rng, probability=probability)
        else:
            arch = space.sample(rng)
        if arch not in taken:
            return arch
    return next(arch for arch in space.walk() if arch not in taken)
