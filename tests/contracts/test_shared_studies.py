"""Several processes at one study, in an SQLite file and in a real PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from nestling.search import Problem, StudyMismatch, StudyUnavailable, load_result, search
from nestling.search.database import Database, study_url
from nestling.search.opening import open_queue
from nestling.search.queue import Task
from nestling.space import Arch, Choice, SearchSpace

ROOT = Path(__file__).parents[2]
NewStudy = Callable[[], str]

WORKER = """
import sys, time
from nestling.search import Problem, search
from nestling.space import Choice, SearchSpace

choices = tuple(Choice(f"c{number}", (1, 2, 3, 4)) for number in range(4))
problem = Problem.parse(SearchSpace("toy", choices), objectives=["top1", "mmacs"], limits={"mmacs": 200.0})
seconds = float(sys.argv[3])


def evaluate(arch):
    print(arch.to_json(), flush=True)
    time.sleep(seconds)
    cost = 1.0
    for number, value in enumerate(arch.values()):
        cost *= value + number
    return {"top1": 1 - 1 / cost, "mmacs": cost}


search(
    problem, evaluate, storage=sys.argv[1], name="toy", trials=int(sys.argv[2]), batch=3, warm_start=3,
    strategy="random",
)
"""
CHOICES = tuple(Choice(f"c{number}", (1, 2, 3, 4)) for number in range(4))
PROBLEM = Problem.parse(SearchSpace("toy", CHOICES), objectives=["top1", "mmacs"], limits={"mmacs": 200.0})


def evaluate(arch: Arch) -> Mapping[str, float]:
    cost = 1.0
    for number, _ in enumerate(arch.values()):
        cost *= arch.integer(f"c{number}") + number
    return {"top1": 1 - 1 / cost, "mmacs": cost}


def postgres() -> ModuleType:
    """The module that starts a server."""
    spec = importlib.util.spec_from_file_location("postgres", ROOT / "benchmarks" / "postgres.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["postgres"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A PostgreSQL server of our own."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'nestling[postgres]'")
    module = postgres()
    with ExitStack() as stack:
        try:
            started = stack.enter_context(module.server())
        except module.NoServer as error:
            pytest.skip(str(error))
        yield started


@pytest.fixture(params=["sqlite", "postgresql"])
def new_study(request: pytest.FixtureRequest, tmp_path: Path) -> NewStudy:
    """Gives places for studies, each an empty one."""
    numbers = count()
    if request.param == "sqlite":
        return lambda: str(tmp_path / f"{next(numbers)}.db")
    server = request.getfixturevalue("server")
    return lambda: str(server.new_database(f"{tmp_path.name[-30:]}{next(numbers)}".lower()))


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Ends what a test has started, and closes its pipes."""
    yield
    while started:
        process = started.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def worker(place: str, *, trials: int, seconds: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-W", "error", "-c", WORKER, place, str(trials), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started.append(
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    )
    return started[-1]


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The archs that a worker evaluated, as JSON."""
    said, wrong = process.communicate()
    assert process.returncode == 0, wrong
    return said.split()


@contextmanager
def by_optuna(place: str) -> Iterator[optuna.Study]:
    url = study_url(place).render_as_string(hide_password=False)
    storage = optuna.storages.RDBStorage(url)
    yield optuna.load_study(study_name="toy", storage=storage)
    storage.remove_session()
    storage.engine.dispose()


def states_in_queue(place: str) -> set[str]:
    database = Database(place)
    with database.reading() as connection:
        found = connection.exec_driver_sql("select state from nestling_candidates").scalars()
        states = {str(state) for state in found}
    database.close()
    return states


def test_a_search_tries_the_same_archs_wherever_its_study_is(new_study: NewStudy, tmp_path: Path) -> None:
    place = new_study()
    found = search(PROBLEM, evaluate, storage=place, name="toy", trials=12, batch=2, population=4)
    beside = search(
        PROBLEM, evaluate, storage=tmp_path / "beside.db", name="toy", trials=12, batch=2, population=4
    )
    assert [trial.arch for trial in found.trials] == [trial.arch for trial in beside.trials]
    assert load_result(PROBLEM, storage=place, name="toy").trials == found.trials
    with by_optuna(place) as study:
        archs = [trial.user_attrs["arch"] for trial in study.trials]
        assert archs == [trial.arch.to_json() for trial in found.trials]
        assert {trial.number for trial in study.best_trials} == {trial.number for trial in found.front}


def test_processes_that_begin_together_share_the_work(new_study: NewStudy) -> None:
    place = new_study()
    workers = [worker(place, trials=16, seconds=0.05) for _ in range(3)]
    evaluated = [arch for process in workers for arch in finish(process)]
    found = load_result(PROBLEM, storage=place, name="toy")
    assert sorted(evaluated) == sorted(trial.arch.to_json() for trial in found.trials)
    assert len(evaluated) == len(set(evaluated)) == len(found.complete) == 16
    assert [trial.number for trial in found.trials] == list(range(16))


def test_what_a_killed_process_began_is_evaluated_by_another(new_study: NewStudy) -> None:
    place = new_study()
    killed = worker(place, trials=5, seconds=600)
    assert killed.stdout is not None
    begun = killed.stdout.readline().strip()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert states_in_queue(place) == {"running", "waiting"}
    evaluated = finish(worker(place, trials=5))
    assert begun == evaluated[0]
    found = load_result(PROBLEM, storage=place, name="toy")
    assert [trial.arch.to_json() for trial in found.trials] == evaluated
    assert "running" not in states_in_queue(place)
    with by_optuna(place) as study:
        assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_a_process_that_is_interrupted_gives_back_what_it_began(new_study: NewStudy) -> None:
    place = new_study()
    interrupted = worker(place, trials=3, seconds=600)
    assert interrupted.stdout is not None
    interrupted.stdout.readline()
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate()
    assert states_in_queue(place) == {"waiting"}


def test_two_queues_of_one_study_give_out_different_archs(new_study: NewStudy) -> None:
    place = new_study()
    with open_queue(PROBLEM, place, "toy") as first, open_queue(PROBLEM, place, "toy") as second:
        first.offer([PROBLEM.space.smallest, PROBLEM.space.largest])
        begun = [first.next(2), second.next(2)]
        assert [task.arch for task in begun if isinstance(task, Task)] == [
            PROBLEM.space.smallest, PROBLEM.space.largest,
        ]  # fmt: skip


def test_a_study_of_another_problem_is_refused(new_study: NewStudy) -> None:
    place = new_study()
    search(PROBLEM, evaluate, storage=place, name="toy", trials=1)
    other = Problem.parse(PROBLEM.space, objectives=["top1"], limits={})
    with pytest.raises(StudyMismatch, match=r"the study 'toy' of another problem \(it differs in objectives"):
        search(other, evaluate, storage=place, name="toy", trials=1)
    assert load_result(other, storage=place, name="another name").trials == ()


def test_a_server_that_does_not_answer_is_named(server: Any) -> None:
    folder = server.folder
    for url, said in [
        (f"postgresql://me:secret@/nothing?host={folder}", "cannot be used: .*"),
        ("postgresql://me:secret@127.0.0.1:1/nothing", "127.0.0.1:1/nothing cannot be used: .*refused"),
    ]:
        with pytest.raises(StudyUnavailable, match=said) as told:
            search(PROBLEM, evaluate, storage=url, name="toy", trials=1)
        assert "secret" not in str(told.value)
