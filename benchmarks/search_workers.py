"""Several processes at one study: how much faster they are, and what is left when they are killed.

Claims, for a toy whose evaluation sleeps, in an SQLite file and in a real PostgreSQL:

1. Two worker processes evaluate at least 1.7 times as many candidates in the same time as one, where an
   evaluation takes one second. Counted are the evaluations that end while all workers are at work: after
   each has ended its first one, until one of them has ended its last.
2. A search with two workers under a controller, of which one process is killed with `kill -9` 50 times at
   random moments (the controller is started again by hand, workers by the controller): no trial that was in
   the database at the moment of a kill is lost or changed, no arch is recorded twice, nothing is left
   running in the queue or in Optuna's tables, no process outlives its controller, and as many archs as asked
   are evaluated.

    python benchmarks/search_workers.py [--check] [--quick] [--kills 50] [--evaluations 20] [--seed 0]

Takes about 7 minutes, half of it for starting processes. Without PostgreSQL the figures of SQLite alone are
taken, and said to be.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import postgres
from optuna.storages import RDBStorage
from record import Benchmark, Figures

from nestling.search import Problem, Trial, Workers, end_with_input, load_result, search, watch
from nestling.search.database import Database
from nestling.space import Arch, Choice, SearchSpace

LIMIT = 1.7
NAME = "toy"
WORKERS = 2
SLEEP = 1.0
KILLED_SLEEP = 0.25
KILL_WITHIN = 2.0
TRIALS = 100
END_SECONDS = 60.0
POLL_SECONDS = 0.02


def problem() -> Problem:
    """4,096 archs, whose metrics are a formula."""
    space = SearchSpace("toy", tuple(Choice(f"c{number}", (1, 2, 3, 4)) for number in range(6)))
    return Problem.parse(space, objectives=["top1", "mmacs"], limits={"mmacs": 1e4})


def metrics(arch: Arch) -> Mapping[str, float]:
    """The same for the same arch, in every process."""
    cost = 1.0
    for number, name in enumerate(arch):
        cost *= arch.integer(name) + number
    return {"top1": 1 - 1 / cost, "mmacs": cost}


def work(place: str, trials: int, seconds: float, *, tied: bool) -> None:
    """What a worker does; it tells each evaluation's end in seconds since 1970.

    Not `tied` to its starter, it says when it is ready and begins at a word.
    """
    if tied:
        end_with_input()
    else:
        print("ready", flush=True)
        sys.stdin.readline()

    def evaluate(arch: Arch) -> Mapping[str, float]:
        time.sleep(seconds)
        print(time.time(), flush=True)
        return metrics(arch)

    search(problem(), evaluate, storage=place, name=NAME, trials=trials, strategy="random", batch=4)


def control(place: str, trials: int, seconds: float, folder: Path) -> None:
    """What a controller does: it watches over workers, and tells their numbers."""
    words = [sys.executable, __file__, "work", place, str(trials), str(seconds), "--tied"]
    with Workers(words, WORKERS, logs=folder, environment={}) as workers:
        watch(problem(), storage=place, name=NAME, trials=trials, while_waiting=workers.check)


def child(*words: str, speaks: bool = True) -> subprocess.Popen[str]:
    """This script in a process of its own, which may be spoken with."""
    pipe = subprocess.PIPE if speaks else subprocess.DEVNULL
    return subprocess.Popen([sys.executable, __file__, *words], stdin=pipe, stdout=pipe, text=True)


def throughput(place: str, workers: int, evaluations: int) -> float:
    """Evaluations in a second, of `evaluations` for each worker."""
    count = evaluations * workers
    processes = [child("work", place, str(count), str(SLEEP)) for _ in range(workers)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [[float(line) for line in process.communicate()[0].split()] for process in processes]
    if any(process.returncode for process in processes) or sum(map(len, ended)) != count:
        raise SystemExit(f"{workers} workers evaluated {sum(map(len, ended))} of {count} archs")
    first, last = max(times[0] for times in ended), min(times[-1] for times in ended)
    return sum(first < time <= last for times in ended for time in times) / (last - first)


def children(pid: int) -> list[int]:
    """The processes that `pid` started, which are there."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def wait_for(done: Callable[[], bool]) -> bool:
    """Whether `done()` within a minute."""
    until = time.monotonic() + END_SECONDS
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stored(place: str) -> tuple[Trial, ...]:
    """What is in the database."""
    return load_result(problem(), storage=place, name=NAME).trials


class Campaign:
    """A search that is killed again and again."""

    def __init__(self, place: str, folder: Path, *, trials: int, rng: random.Random) -> None:
        self.place, self.folder, self.trials, self.rng = place, folder, trials, rng
        self.controller: subprocess.Popen[str] | None = None
        self.workers: set[int] = set()
        self.snapshots: list[tuple[Trial, ...]] = []
        self.killed = {"controller": 0, "worker": 0}
        self.outlived = 0

    def run(self, kills: int) -> int:
        """Kills up to so many times, and lets the search come to its end: how often it was killed."""
        try:
            while sum(self.killed.values()) < kills and self._kill_once():
                pass
            self._ensure()
            assert self.controller is not None
            code = self.controller.wait(END_SECONDS + self.trials)
        finally:
            if self.controller is not None:
                self.controller.kill()
                self.controller.wait()
        if code != 0:
            raise SystemExit(f"the controller ended with {code}; see {self.folder}")
        self._await_end(self.workers)
        return sum(self.killed.values())

    def account(self) -> dict[str, Any]:
        """What is left."""
        final = stored(self.place)
        keys = [trial.arch.key for trial in final]
        database = Database(self.place)
        storage = RDBStorage(database.optuna_url)
        study = optuna.load_study(study_name=NAME, storage=storage)
        states = [trial.state.name for trial in study.trials]
        storage.remove_session()
        storage.engine.dispose()
        with database.reading() as connection:
            queue = list(connection.exec_driver_sql("select state from nestling_candidates").scalars())
        database.close()
        return {
            "killed": self.killed,
            "wanted": self.trials,
            "evaluated": len(final),
            "lost_or_changed": sum(
                trial.number >= len(final) or final[trial.number] != trial
                for snapshot in self.snapshots
                for trial in snapshot
            ),
            "doubled": len(keys) - len(set(keys)),
            "left_running": queue.count("running") + states.count("RUNNING"),
            "outlived": self.outlived,
            "given_up": sum(trial.state == "failed" for trial in final),
        }

    def _await_end(self, workers: Collection[int]) -> None:
        """Counts the workers that outlive their controller by a minute."""
        if not wait_for(lambda: not any(map(is_there, workers))):
            self.outlived += sum(map(is_there, workers))

    def _ensure(self) -> None:
        if self.controller is None or self.controller.poll() is not None:
            words = ["control", self.place, str(self.trials), str(KILLED_SLEEP), str(self.folder)]
            self.controller = child(*words, speaks=False)

    def _kill_once(self) -> bool:
        """Kills one process after a while: whether there was one left to kill."""
        self._ensure()
        controller = self.controller
        assert controller is not None
        before = len(stored(self.place))
        # half of the kills while processes start, the others after they have done something
        if self.rng.random() < 0.5:
            wait_for(lambda: len(stored(self.place)) > before or controller.poll() is not None)
        try:
            controller.wait(self.rng.uniform(0.0, KILL_WITHIN))
            return False
        except subprocess.TimeoutExpired:
            pass
        workers = [pid for pid in children(controller.pid) if is_there(pid)]
        self.workers |= set(workers)
        victim = self.rng.choice([controller.pid, *workers])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # it came to its end just now
            return True
        self.snapshots.append(stored(self.place))
        self.killed["controller" if victim == controller.pid else "worker"] += 1
        if victim == controller.pid:
            controller.wait()
            self._await_end(workers)
        print(f"  kill {sum(self.killed.values())}: {len(self.snapshots[-1])} trials", flush=True)
        return True


def measure_place(make: Iterator[str], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one kind of database, of which `make` gives empty ones."""
    speeds = {count: throughput(next(make), count, options.evaluations) for count in (1, WORKERS)}
    print(f"  {speeds[1]:.3f} evaluations a second, with {WORKERS} workers {speeds[WORKERS]:.3f}", flush=True)
    rng, left, campaigns = random.Random(options.seed), options.kills, []
    while left > 0:
        logs = folder / f"campaign-{len(campaigns)}"
        logs.mkdir()
        campaign = Campaign(next(make), logs, trials=options.trials, rng=rng)
        left -= campaign.run(left)
        campaigns.append(campaign.account())
    return {
        "evaluations": options.evaluations,
        "per_second": {str(count): round(speed, 4) for count, speed in speeds.items()},
        "speedup": speeds[WORKERS] / speeds[1],
        "campaigns": campaigns,
    }


@contextmanager
def places(folder: Path) -> Iterator[dict[str, Iterator[str]]]:
    """For each kind of database, endless empty ones."""
    with ExitStack() as stack:
        found = {"SQLite": (str(folder / f"{number}.db") for number in range(1000))}
        try:
            server = stack.enter_context(postgres.server())
            found["PostgreSQL"] = (server.new_database(f"study{number}") for number in range(1000))
        except postgres.NoServer as error:
            print(f"without PostgreSQL: {error}", flush=True)
        yield found


def measure(options: argparse.Namespace) -> Figures:
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="search_workers-") as work_folder,
        places(Path(work_folder)) as there,
    ):
        for name, make in there.items():
            print(f"{name}:", flush=True)
            folder = Path(work_folder) / name
            folder.mkdir()
            found[name] = measure_place(make, folder, options)
    return {
        "settings": {
            "sleep_seconds": SLEEP,
            "workers": WORKERS,
            "seed": options.seed,
            "kills": options.kills,
        },
        "places": found,
    }


def total(campaigns: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(campaign[key] for campaign in campaigns)


def kills_of(campaigns: Sequence[Mapping[str, Any]]) -> int:
    return sum(sum(campaign["killed"].values()) for campaign in campaigns)


def misses(figures: Figures) -> list[str]:
    found = []
    for place, told in figures["places"].items():
        if not told["speedup"] >= LIMIT:
            found.append(f"{place}: {told['speedup']:.2f} times as fast, {LIMIT} were to be")
        campaigns = told["campaigns"]
        if kills_of(campaigns) != figures["settings"]["kills"]:
            found.append(f"{place}: {kills_of(campaigns)} kills, {figures['settings']['kills']} were to be")
        for key in ("lost_or_changed", "doubled", "left_running", "outlived"):
            if count := total(campaigns, key):
                found.append(f"{place}: {count} {key.replace('_', ' ')}")
        if total(campaigns, "evaluated") != total(campaigns, "wanted"):
            found.append(
                f"{place}: {total(campaigns, 'evaluated')} of {total(campaigns, 'wanted')} evaluated"
            )
    return found


def sentence(figures: Figures) -> str:
    told = []
    for place, found in figures["places"].items():
        campaigns = found["campaigns"]
        told.append(
            f"{place}: {found['speedup']:.2f} times the throughput, {kills_of(campaigns)} kills "
            f"({total([c['killed'] for c in campaigns], 'controller')} of the controller), "
            f"{total(campaigns, 'lost_or_changed')} trials lost, {total(campaigns, 'doubled')} doubled, "
            f"{total(campaigns, 'left_running')} left running"
        )
    return f"{figures['settings']['workers']} workers; " + "; ".join(told)


BENCHMARK = Benchmark("search_workers", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--quick", action="store_true", help="4 kills, 6 evaluations, 20 trials")
    parser.add_argument("--kills", type=int, default=50, help="in each kind of database [default: 50]")
    parser.add_argument("--evaluations", type=int, default=20, help="of a second [default: 20]")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    options = parser.parse_args(words)
    if options.quick:
        options.kills, options.evaluations, options.trials = 4, 6, 20
    return BENCHMARK.run(options)


def part(role: str, place: str, trials: str, seconds: str, *rest: str) -> None:
    """What this script does in a process that it started."""
    if role == "control":
        control(place, int(trials), float(seconds), Path(rest[0]))
    else:
        work(place, int(trials), float(seconds), tied=rest == ("--tied",))


if __name__ == "__main__":
    if sys.argv[1:2] in (["work"], ["control"]):
        part(*sys.argv[1:])
    else:
        sys.exit(main())
