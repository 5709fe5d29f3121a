"""A trial's metrics, taken again after it was recorded: the new ones hold, those of before stay readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nestling.search import tables
from nestling.search.database import Database, StudyMismatch
from nestling.search.objectives import Metrics, Problem
from nestling.search.record import find_study, read_trials
from nestling.search.result import Trial


def correct_trial(
    problem: Problem, trial: Trial, metrics: Metrics, *, storage: Path | str, name: str
) -> Trial:
    """`trial` with `metrics` in place of its own of these names, as it now stands in the study.

    Values and constraints, which other Optuna tools read, are written anew in the same transaction. What the
    trial had before is appended to its attribute `metrics_before`.

    Args:
        problem: of the study.
        trial: a complete one.
        metrics: finite numbers.
        storage, name: of the study, as `search` has them.

    Raises:
        StudyMismatch: there is no such trial, or it is of another arch.
        StudyUnavailable: the database cannot be reached or written.
    """
    database = Database(storage)
    try:
        with database.writing() as connection:
            study = find_study(connection, name)
            found = (
                []
                if study is None
                else read_trials(connection, study, first=trial.number, where=str(database), study_name=name)[
                    :1
                ]
            )
            if study is None or [(one.arch, one.state) for one in found] != [(trial.arch, "complete")]:
                raise StudyMismatch(
                    f"{database}: the study {name!r} has no complete trial {trial.number} of the arch "
                    f"{trial.arch.key}; was its file replaced? Search again"
                )
            corrected = replace(found[0], metrics={**found[0].metrics, **metrics})
            tables.replace_metrics(connection, study, problem, before=found[0], now=corrected)
            return corrected
    finally:
        database.close()
