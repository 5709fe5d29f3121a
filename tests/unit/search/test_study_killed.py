"""A search that is killed with SIGKILL, again and again, loses nothing and does nothing twice."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.trial import TrialState

KILLED_AGAIN_AND_AGAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
from nestling.search import Problem, load_result, search
from nestling.space import Choice, SearchSpace

choices = tuple(Choice(f"c{number}", (1, 2, 3, 4)) for number in range(4))
problem = Problem.parse(SearchSpace("toy", choices), objectives=["top1", "mmacs"], limits={"mmacs": 200.0})


def evaluate(arch):
    if told is not None:
        os.write(told, b".")
    time.sleep(0.02)
    cost = 1.0
    for number, value in enumerate(arch.values()):
        cost *= value + number
    return {"top1": 1 - 1 / cost, "mmacs": cost}


def run(file):
    return search(problem, evaluate, storage=file, name="toy", trials=20, population=4, warm_start=0)


told = None
whole, killed = Path(sys.argv[1]), Path(sys.argv[2])
expected = [trial.arch.to_json() for trial in run(whole).trials]
rng, kills = random.Random(0), 0
while True:
    hears, told = os.pipe()
    child = os.fork()
    if child == 0:
        run(killed)
        os._exit(0)
    os.close(told)
    if kills < 6:
        # at first while the study is opened, then an evaluation or two on: there, or while the trial is
        # written; these are fewer than there are trials, so that no search ends before it is killed
        for _ in range(rng.randint(1, 2) if kills > 1 else 0):
            os.read(hears, 1)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        kills += 1
    _, status = os.waitpid(child, 0)
    os.close(hears)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
found = load_result(problem, storage=killed, name="toy").trials
print(json.dumps({"expected": expected, "found": [trial.arch.to_json() for trial in found], "kills": kills}))
"""


def test_a_search_killed_at_random_moments_ends_like_one_that_was_not(tmp_path: Path) -> None:
    killed = tmp_path / "killed.db"
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AGAIN_AND_AGAIN)
    command = [sys.executable, "-W", "error", str(script), str(tmp_path / "whole.db"), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["kills"] == 6
    assert outcome["found"] == outcome["expected"]
    trials = optuna.load_study(study_name="toy", storage=f"sqlite:///{killed}").trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    evaluated = [trial for trial in trials if trial.user_attrs["state"] == "complete"]
    assert len({trial.user_attrs["arch"] for trial in evaluated}) == len(evaluated) == 20
    with sqlite3.connect(killed) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
