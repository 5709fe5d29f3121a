"""Record: a study's trials in a database, which other Optuna tools can read.

A trial reaches the database when it is finished, in one transaction: one that was under way when its process
died is not there at all. Trials are numbered in the order in which they were finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from nestling.search import tables
from nestling.search.database import Database, StudyMismatch, sqlite_path, study_url
from nestling.search.objectives import Problem
from nestling.search.result import SearchResult, Trial
from nestling.search.samplers import directions
from nestling.space import Arch


class Record:
    """The study `name` in `database`.

    Args:
        problem: what the study is of.
        database: with Optuna's tables and ours.
        name: of the study, which is begun where there is none.
        about: what else must be the same for all who add to the study, such as the supernet's weights.

    Raises:
        StudyMismatch: the study is of another problem, or others than Nestling wrote into it.
    """

    def __init__(
        self, problem: Problem, database: Database, name: str, *, about: Mapping[str, str] | None = None
    ) -> None:
        self.problem, self.database, self.name = problem, database, name
        self.trials: list[Trial] = []
        with database.reading() as connection:
            found = find_study(connection, name)
        if found is None:
            begin_study(database, problem, name)
            with database.reading() as connection:
                found = find_study(connection, name)
            assert found is not None
        self.study = found
        with database.writing() as connection:
            check_problem(connection, self.study, problem, about or {}, where=str(database), name=name)
            _note_problem(connection, self.study, problem, about or {})
            self._begun_with = self._problem(connection)
        self.sync()

    @property
    def result(self) -> SearchResult:
        """Everything that was tried so far, as far as it was read."""
        return SearchResult(self.problem, tuple(self.trials))

    def sync(self) -> list[Trial]:
        """The trials that were added since this was last asked, by whomever.

        Raises:
            StudyMismatch: a trial was not written by a search of Nestling.
        """
        with self.database.reading() as connection:
            new = self.new(connection)
        self.trials += new
        return new

    def add(self, connection: sa.Connection, trial: Trial) -> Trial:
        """`trial` with the number under which it is now written, as part of a writing transaction.

        Raises:
            StudyMismatch: the study was given other limits meanwhile.
        """
        if self._problem(connection) != self._begun_with:
            raise StudyMismatch(
                f"{self.database}: the study {self.name!r} was given other limits meanwhile; start again"
            )
        count = connection.execute(
            sa.select(sa.func.count()).where(tables.trials.c.study_id == self.study)
        ).scalar_one()
        numbered = replace(trial, number=count)
        tables.insert_trial(connection, self.study, self.problem, numbered)
        return numbered

    def new(self, connection: sa.Connection) -> list[Trial]:
        """The trials that are in the database and not yet in `trials`, as part of a transaction."""
        return read_trials(
            connection, self.study, first=len(self.trials), where=str(self.database), study_name=self.name
        )

    def _problem(self, connection: sa.Connection) -> str:
        table = tables.study_attributes
        here = sa.and_(table.c.study_id == self.study, table.c.key == "problem")
        return str(connection.execute(sa.select(table.c.value_json).where(here)).scalar_one())


def read_record(problem: Problem, where: Path | str, name: str) -> SearchResult:
    """What the study `name` at `where` holds; nothing where there is no such file or study.

    Raises:
        StudyMismatch: no study that Nestling can read, or one of another problem.
        StudyUnavailable: the database cannot be reached.
    """
    path = sqlite_path(study_url(where))
    if path is not None and not path.exists():
        return SearchResult(problem, ())
    database = Database(where)
    try:
        with database.reading() as connection:
            if not sa.inspect(connection).has_table(tables.studies.name):
                return SearchResult(problem, ())
            study = find_study(connection, name)
            if study is None:
                return SearchResult(problem, ())
            check_problem(connection, study, problem, {}, where=str(database), name=name)
            trials = read_trials(connection, study, first=0, where=str(database), study_name=name)
            return SearchResult(problem, tuple(trials))
    finally:
        database.close()


def is_begun(where: Path | str, name: str) -> bool:
    """Whether there is a study `name` at `where`; nothing is made.

    Raises:
        StudyMismatch: the file is no SQLite file.
        StudyUnavailable: the database cannot be reached.
    """
    path = sqlite_path(study_url(where))
    if path is not None and not path.exists():
        return False
    database = Database(where)
    try:
        with database.reading() as connection:
            laid_out = sa.inspect(connection).has_table(tables.studies.name)
            return laid_out and find_study(connection, name) is not None
    finally:
        database.close()


def begin_study(database: Database, problem: Problem, name: str) -> None:
    """Makes the empty study `name` where there is none; Optuna's tables are there."""
    with database.writing() as connection:
        if find_study(connection, name) is not None:
            return
        study = connection.execute(
            sa.insert(tables.studies).values(study_name=name).returning(tables.studies.c.study_id)
        ).scalar_one()
        connection.execute(
            sa.insert(tables.directions),
            [
                {"study_id": study, "objective": number, "direction": direction.name}
                for number, direction in enumerate(directions(problem))
            ],
        )


def read_trials(
    connection: sa.Connection, study: int, *, first: int, where: str, study_name: str
) -> list[Trial]:
    """The trials of a study from number `first` on, in order.

    Raises:
        StudyMismatch: a trial was not written by a search of Nestling.
    """
    trials, attributes = tables.trials, tables.attributes
    rows = connection.execute(
        sa.select(trials.c.number, trials.c.state, attributes.c.key, attributes.c.value_json)
        .select_from(trials.outerjoin(attributes, trials.c.trial_id == attributes.c.trial_id))
        .where(trials.c.study_id == study, trials.c.number >= first)
        .order_by(trials.c.number)
    )
    found: dict[int, dict[str, Any]] = {}
    states: dict[int, str] = {}
    for number, state, key, value in rows:
        content = found.setdefault(number, {})
        states[number] = state
        if key is not None:
            content[key] = json.loads(value)
    for expected, (number, content) in enumerate(found.items(), first):
        if number != expected or not {"arch", "state", "seconds"} <= content.keys():
            raise StudyMismatch(
                f"{where}: trial {number} ({states[number]}) of the study {study_name!r} was not written by "
                "a search of Nestling; search in a new run folder, or remove that study"
            )
    return [_trial(number, content) for number, content in found.items()]


def signature(problem: Problem) -> dict[str, Any]:
    """What tells one problem from another."""
    space = json.dumps([problem.space.family, [asdict(choice) for choice in problem.space.choices]])
    return {
        "objectives": [objective.name for objective in problem.objectives],
        "limits": {limit.metric: limit.bound for limit in problem.limits},
        "space": hashlib.sha256(space.encode()).hexdigest()[:12],
    }


def _trial(number: int, content: Mapping[str, Any]) -> Trial:
    state: Literal["complete", "failed", "duplicate"] = content["state"]
    return Trial(
        number=number,
        arch=Arch.from_json(content["arch"]),
        metrics=content.get("metrics", {}),
        state=state,
        reason=content.get("reason", ""),
        seconds=content["seconds"],
    )


def find_study(connection: sa.Connection, name: str) -> int | None:
    """The study's number in Optuna's tables; None where there is none of that name."""
    studies = tables.studies
    found = connection.execute(sa.select(studies.c.study_id).where(studies.c.study_name == name)).scalar()
    return None if found is None else int(found)


def check_problem(
    connection: sa.Connection,
    study: int,
    problem: Problem,
    about: Mapping[str, str],
    *,
    where: str,
    name: str,
    but_for_limits: bool = False,
) -> None:
    """Refuses a study of another problem; one that tells no problem yet is of any with its objectives.

    Args:
        study: its number in Optuna's tables, reached by `connection`.
        problem, about: what it should be of, see `Record`.
        where, name: how the study is called in messages.
        but_for_limits: allows other limits.

    Raises:
        StudyMismatch: it differs in objectives, space, limits or something of `about`.
    """
    asked, text = signature(problem), _stored_problem(connection, study)
    there = asked if text is None else json.loads(text)
    differing = [key for key in asked if there.get(key) != asked[key]]
    told = tables.directions
    found = connection.execute(
        sa.select(told.c.direction).where(told.c.study_id == study).order_by(told.c.objective)
    ).scalars()
    if list(found) != [direction.name for direction in directions(problem)] and "objectives" not in differing:
        differing.append("objectives")
    known = there.get("about", {})
    differing += [key for key, value in about.items() if known.get(key, value) != value]
    if differing == ["limits"]:
        if but_for_limits:
            return
        raise StudyMismatch(
            f"{where} holds the study {name!r} with other limits; `nestling search` lays the run's "
            "limits over it"
        )
    if differing:
        raise StudyMismatch(
            f"{where} holds the study {name!r} of another problem (it differs in {', '.join(differing)}); "
            "search in a new run folder, or remove that study"
        )


def _note_problem(connection: sa.Connection, study: int, problem: Problem, about: Mapping[str, str]) -> None:
    """Makes a study that tells no problem yet this problem's."""
    if _stored_problem(connection, study) is None:
        asked = {**signature(problem), **({"about": dict(about)} if about else {})}
        connection.execute(
            sa.insert(tables.study_attributes).values(
                study_id=study, key="problem", value_json=json.dumps(asked)
            )
        )


def _stored_problem(connection: sa.Connection, study: int) -> str | None:
    table = tables.study_attributes
    here = sa.and_(table.c.study_id == study, table.c.key == "problem")
    text: str | None = connection.execute(sa.select(table.c.value_json).where(here)).scalar()
    return text
