"""The tables of a study: Optuna's, of which a trial is written in one go, and our own beside them.

Optuna's tables are known by what its files hold, which later versions must read too, not by its private
modules; `tests/unit/search/test_tables.py` compares every row with the one that Optuna writes itself.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, distribution_to_json

from nestling.search.objectives import Problem
from nestling.search.result import Trial
from nestling.space import Choice

CONSTRAINT = "constraints:"
"""What the names of constraints begin with among a trial's system attributes."""
BEFORE = "metrics_before"
"""The attribute of a trial whose metrics were taken again: what it had before, oldest first."""
FAILED_VIOLATION = 1.0
"""The constraint of a trial without metrics: it must never count as feasible."""

_optuna = sa.MetaData()
# in PostgreSQL the columns of states and kinds have types of their own, which take plain words
_State = sa.Enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", name="trialstate")
_Kind = sa.Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")

studies = sa.Table(
    "studies", _optuna, sa.Column("study_id", sa.Integer, primary_key=True), sa.Column("study_name", sa.Text)
)
study_attributes = sa.Table(
    "study_user_attributes",
    _optuna,
    sa.Column("study_user_attribute_id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.Integer),
    sa.Column("key", sa.Text),
    sa.Column("value_json", sa.Text),
)
directions = sa.Table(
    "study_directions",
    _optuna,
    sa.Column("study_direction_id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.Integer),
    sa.Column("objective", sa.Integer),
    sa.Column("direction", sa.Enum("NOT_SET", "MINIMIZE", "MAXIMIZE", name="studydirection")),
)
trials = sa.Table(
    "trials",
    _optuna,
    sa.Column("trial_id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer),
    sa.Column("study_id", sa.Integer),
    sa.Column("state", _State),
    sa.Column("datetime_start", sa.DateTime),
    sa.Column("datetime_complete", sa.DateTime),
)
_params = sa.Table(
    "trial_params",
    _optuna,
    sa.Column("param_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("param_name", sa.Text),
    sa.Column("param_value", sa.Double),
    sa.Column("distribution_json", sa.Text),
)
_values = sa.Table(
    "trial_values",
    _optuna,
    sa.Column("trial_value_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("objective", sa.Integer),
    sa.Column("value", sa.Double),
    sa.Column("value_type", _Kind),
)
attributes = sa.Table(
    "trial_user_attributes",
    _optuna,
    sa.Column("trial_user_attribute_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("key", sa.Text),
    sa.Column("value_json", sa.Text),
)
_system = sa.Table(
    "trial_system_attributes",
    _optuna,
    sa.Column("trial_system_attribute_id", sa.Integer, primary_key=True),
    sa.Column("trial_id", sa.Integer),
    sa.Column("key", sa.Text),
    sa.Column("value_json", sa.Text),
)

_ours = sa.MetaData()
candidates = sa.Table(
    "nestling_candidates",
    _ours,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("arch_key", sa.String(64), nullable=False),
    sa.Column("arch", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("owner", sa.Text),
    sa.Column("until", sa.Double),
    sa.Column("begun", sa.Integer, nullable=False),
    sa.UniqueConstraint("study_id", "arch_key"),
)
"""Every arch that was proposed: `waiting`, `running` (leased to an owner until then), or `done`."""
leases = sa.Table(
    "nestling_leases",
    _ours,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)
"""What one process does for all, such as proposing."""
losses = sa.Table(
    "nestling_losses",
    _ours,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("watch", sa.Text, nullable=False),
    sa.Column("unseen", sa.Integer, nullable=False),
)
"""Of each candidate that was begun: who kept watch then, and how often it was lost unseen."""
facts = sa.Table(
    "nestling_facts",
    _ours,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
)
"""What all processes must agree on, such as the reference model's latency; the first one's word holds."""


def lay_out_ours(connection: sa.Connection) -> None:
    """Makes our tables where they are not there."""
    for table in _ours.sorted_tables:
        connection.execute(sa.schema.CreateTable(table, if_not_exists=True))


def insert_trial(connection: sa.Connection, study: int, problem: Problem, trial: Trial) -> None:
    """Adds `trial` as Optuna would, in a few statements: Optuna's own way takes several for each choice."""
    complete = bool(trial.metrics)
    ended = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    identity = connection.execute(
        sa.insert(trials)
        .values(
            number=trial.number,
            study_id=study,
            state="COMPLETE" if complete else "FAIL",
            datetime_start=ended - datetime.timedelta(seconds=trial.seconds),
            datetime_complete=ended,
        )
        .returning(trials.c.trial_id)
    ).scalar_one()
    rows: list[tuple[sa.Table, list[dict[str, Any]]]] = [
        (_values, _value_rows(problem, trial) if complete else []),
        (_params, [_param_row(choice, trial.arch[choice.name]) for choice in problem.space.open_choices]),
        (attributes, _attribute_rows(user_attributes(trial))),
        (_system, _attribute_rows(_constraints(problem, trial))),
    ]
    for table, content in rows:
        if content:
            connection.execute(sa.insert(table), [{"trial_id": identity, **row} for row in content])


def replace_constraints(
    connection: sa.Connection, study: int, problem: Problem, judged: Sequence[Trial]
) -> None:
    """Writes the constraints of all trials of `study` anew; `judged` are these trials, in order."""
    asked = sa.select(trials.c.trial_id).where(trials.c.study_id == study).order_by(trials.c.number)
    identities = list(connection.execute(asked).scalars())
    connection.execute(
        sa.delete(_system).where(
            _system.c.trial_id.in_(sa.select(trials.c.trial_id).where(trials.c.study_id == study)),
            _system.c.key.startswith(CONSTRAINT, autoescape=True),
        )
    )
    rows = [
        {"trial_id": identity, **row}
        for identity, trial in zip(identities, judged, strict=True)
        for row in _attribute_rows(_constraints(problem, trial))
    ]
    if rows:
        connection.execute(sa.insert(_system), rows)


def replace_metrics(
    connection: sa.Connection, study: int, problem: Problem, *, before: Trial, now: Trial
) -> None:
    """Writes what `now` has in place of what that trial had `before`, which is kept beside it."""
    identity = connection.execute(
        sa.select(trials.c.trial_id).where(trials.c.study_id == study, trials.c.number == now.number)
    ).scalar_one()
    here = sa.and_(attributes.c.trial_id == identity, attributes.c.key == BEFORE)
    kept = connection.execute(sa.select(attributes.c.value_json).where(here)).scalar()
    earlier = [*json.loads(kept or "[]"), dict(before.metrics)]
    replaced: list[tuple[sa.Table, list[dict[str, Any]]]] = [
        (_values, _value_rows(problem, now)),
        (attributes, _attribute_rows({"metrics": dict(now.metrics), BEFORE: earlier})),
        (_system, _attribute_rows(_constraints(problem, now))),
    ]
    for table, content in replaced:
        keyed = "objective" if table is _values else "key"
        for row in content:
            one = sa.and_(table.c.trial_id == identity, table.c[keyed] == row[keyed])
            connection.execute(sa.delete(table).where(one))
            connection.execute(sa.insert(table).values(trial_id=identity, **row))


def user_attributes(trial: Trial) -> dict[str, Any]:
    """What Optuna keeps of `trial` beside parameters and values; `read_trials` reads it."""
    told: dict[str, Any] = {"arch": trial.arch.to_json(), "state": trial.state, "seconds": trial.seconds}
    if trial.metrics:
        told["metrics"] = dict(trial.metrics)
    if trial.reason:
        told["reason"] = trial.reason
    return told


def violations(problem: Problem, trial: Trial) -> dict[str, float]:
    """How far `trial` is beyond each limit: what Optuna calls its constraints."""
    return {
        limit.metric: limit.violation(trial.metrics) if trial.metrics else FAILED_VIOLATION
        for limit in problem.limits
    }


def _constraints(problem: Problem, trial: Trial) -> dict[str, float]:
    return {f"{CONSTRAINT}{metric}": value for metric, value in violations(problem, trial).items()}


def _value_rows(problem: Problem, trial: Trial) -> list[dict[str, Any]]:
    return [
        {"objective": number, "value": trial.metrics[objective.name], "value_type": "FINITE"}
        for number, objective in enumerate(problem.objectives)
    ]


def _param_row(choice: Choice, value: Any) -> dict[str, Any]:
    return {
        "param_name": choice.name,
        "param_value": float(choice.values.index(value)),
        "distribution_json": _distribution(json.dumps(choice.values)),
    }


def _attribute_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in content.items()]


@cache
def _distribution(values: str) -> str:
    # by their JSON: 1, 1.0 and true are equal to a cache, and are not the same value
    return distribution_to_json(CategoricalDistribution(json.loads(values)))
