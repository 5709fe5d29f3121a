"""Trials that are written in one go are, row by row, what Optuna itself would have written."""

from __future__ import annotations

import datetime
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from nestling.search import Metrics, Problem, Trial
from nestling.search.database import Database
from nestling.search.record import Record, begin_study
from nestling.search.samplers import directions, distributions, quiet
from nestling.search.tables import user_attributes, violations
from nestling.space import Arch, Choice, Need, SearchSpace

TABLES = (
    "trials",
    "trial_params",
    "trial_values",
    "trial_user_attributes",
    "trial_system_attributes",
    "studies",
    "study_directions",
)
SPACE = SearchSpace(
    "toy",
    (
        Choice("depth", (1, 2)),
        Choice("kernel", (3, 5), (Need("depth", 2),)),
        Choice("wide", (False, True)),
        Choice("ratio", (0.5, 1.0, 2.0)),
        Choice("precision", ("w8a8", 'a "quoted" wörd')),
        Choice("classes", (10,)),
    ),
)
PROBLEM = Problem.parse(SPACE, objectives=["top1", "mmacs"], limits={"mmacs": 2.0, "top1": 0.25})


def rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    with closing(sqlite3.connect(file)) as database:
        database.row_factory = sqlite3.Row
        for table in TABLES:
            found[table] = [dict(row) for row in database.execute(f"select * from {table} order by 1")]
    for trial in found["trials"]:
        for key in ("datetime_start", "datetime_complete"):
            trial[key] = abs(datetime.datetime.fromisoformat(trial[key]) - now()) < datetime.timedelta(
                hours=1
            )
    return found


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def written_by_optuna(file: Path, trials: list[Trial]) -> None:
    with quiet():
        study = optuna.create_study(
            study_name="toy", storage=f"sqlite:///{file}", directions=directions(PROBLEM)
        )
        for trial in trials:
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if trial.metrics else TrialState.FAIL,
                    values=[trial.metrics[o.name] for o in PROBLEM.objectives] if trial.metrics else None,
                    params={choice.name: trial.arch[choice.name] for choice in SPACE.open_choices},
                    distributions=distributions(PROBLEM),
                    user_attrs=user_attributes(trial),
                    constraints=violations(PROBLEM, trial),
                )
            )


def written_by_us(file: Path, trials: list[Trial]) -> None:
    database = Database(file)
    begin_study(database, PROBLEM, "toy")
    record = Record(PROBLEM, database, "toy")
    for trial in trials:
        with database.writing() as connection:
            assert record.add(connection, trial).number == trial.number
    database.close()


@pytest.fixture
def trials() -> list[Trial]:
    def metrics(arch: Arch) -> Metrics:
        return {"top1": 1 / 3, "mmacs": arch.integer("depth") * 1.5, "size_mb": 1e-9}

    archs = [SPACE.smallest, SPACE.largest, SPACE.canonical({**SPACE.largest, "depth": 1, "ratio": 1.0})]
    done = [Trial(n, arch, metrics(arch), "complete", seconds=0.25) for n, arch in enumerate(archs)]
    return [*done, Trial(3, SPACE.canonical({**SPACE.smallest, "wide": True}), {}, "failed", "it crashed")]


def test_every_row_is_the_one_that_optuna_writes(
    trials: list[Trial], empty_study_file: Path, tmp_path: Path
) -> None:
    files = [Path(shutil.copy(empty_study_file, tmp_path / name)) for name in ("theirs.db", "ours.db")]
    written_by_optuna(files[0], trials)
    written_by_us(files[1], trials)
    theirs, ours = rows(files[0]), rows(files[1])
    assert ours == theirs
    assert len(ours["trial_params"]) == 4 * len(SPACE.open_choices)


def test_optuna_goes_on_with_a_study_that_we_wrote(
    trials: list[Trial], empty_study_file: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(empty_study_file, tmp_path / "study.db"))
    written_by_us(file, trials)
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{file}")
    assert [trial.params for trial in study.trials] == [
        {choice.name: trial.arch[choice.name] for choice in SPACE.open_choices} for trial in trials
    ]
    asked = study.ask(distributions(PROBLEM))
    study.tell(asked, [0.9, 1.0])
    assert study.best_trials[-1].number == asked.number == len(trials)
