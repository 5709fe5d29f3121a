"""Limits: read from words, and laid anew over what a study has already tried."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import sqlalchemy as sa

from nestling.search import tables
from nestling.search.database import Database, StudyMismatch, sqlite_path, study_url
from nestling.search.objectives import Limit, Problem
from nestling.search.record import check_problem, find_study, read_trials, signature
from nestling.search.result import check_smallest


def parse_limits(*, at_most: Iterable[str], at_least: Iterable[str]) -> dict[str, float]:
    """Metric -> bound, of words such as `latency_ms=5`.

    Raises:
        ValueError: not a metric and a number, an unknown metric, one that is given twice, or an accuracy
            among the ceilings or a cost among the floors.
    """
    found: dict[str, float] = {}
    for words, ceiling in ((at_most, True), (at_least, False)):
        option = "--at-most" if ceiling else "--at-least"
        for word in words:
            metric, equals, text = word.partition("=")
            try:
                bound = float(text)
            except ValueError:
                equals = ""
            if not equals:
                raise ValueError(f"{option} {word!r} must be a metric and a number, such as latency_ms=5")
            limit = Limit(metric, bound)
            if limit.is_ceiling != ceiling:
                other = "--at-most" if limit.is_ceiling else "--at-least"
                raise ValueError(f"{option} {word} would keep nothing good; {other} {word} is meant")
            if metric in found:
                raise ValueError(f"{metric} is limited twice, to {found[metric]:g} and {bound:g}; give one")
            found[metric] = bound
    return found


def change_limits(
    problem: Problem, *, storage: Path | str, name: str, about: Mapping[str, str] | None = None
) -> int:
    """Lays `problem`'s limits over the study `name` in place of its own: the number of trials judged anew.

    What was tried stays; Optuna's constraints of every trial are written anew, in one transaction. Nothing is
    done where there is no such study, or where it has these limits. A search that is under way with other
    limits ends with an error when it has its next outcome.

    Args:
        problem, storage, name, about: as of `search`.

    Raises:
        InfeasibleLimit: the smallest network was tried, and is beyond a limit on a cost.
        StudyMismatch: the study is of another problem or `about` something else, has trials without a metric
            that is limited, or trials that no search of Nestling wrote.
        StudyUnavailable: the database cannot be reached or written.
    """
    path = sqlite_path(study_url(storage))
    if path is not None and not path.exists():
        return 0
    database = Database(storage)
    try:
        with database.writing() as connection:
            return _change(connection, problem, name, about or {}, where=str(database))
    finally:
        database.close()


def _change(
    connection: sa.Connection, problem: Problem, name: str, about: Mapping[str, str], *, where: str
) -> int:
    laid_out = sa.inspect(connection).has_table(tables.studies.name)
    study = find_study(connection, name) if laid_out else None
    if study is None:
        return 0
    check_problem(connection, study, problem, about, where=where, name=name, but_for_limits=True)
    trials = read_trials(connection, study, first=0, where=where, study_name=name)
    table = tables.study_attributes
    here = sa.and_(table.c.study_id == study, table.c.key == "problem")
    text = connection.execute(sa.select(table.c.value_json).where(here)).scalar()
    there, limits = {} if text is None else json.loads(text), signature(problem)["limits"]
    if text is None or there["limits"] == limits:
        return 0
    for limit in problem.limits:
        without = sum(bool(trial.metrics) and limit.metric not in trial.metrics for trial in trials)
        if without:
            raise StudyMismatch(
                f"{where}: {without} candidates of the study {name!r} were evaluated without "
                f"{limit.metric}, which is to be {limit}; search in a new run, with that limit or objective "
                "from the beginning"
            )
    check_smallest(problem, trials)
    tables.replace_constraints(connection, study, problem, trials)
    connection.execute(
        sa.update(table).where(here).values(value_json=json.dumps({**there, "limits": limits}))
    )
    return len(trials)
