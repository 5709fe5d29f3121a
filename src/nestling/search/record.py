"""Record: a study's finished trials in an SQLite file, and a copy in memory for samplers to read.

A trial reaches the file when it is finished, in one transaction: one that was under way when the process died
is not there at all. What a sampler notes about the study while it proposes (NSGA-II: the parents of a
generation) is stored with the trial that it proposed: a reopened record shows a sampler what it saw before.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from nestling.search.objectives import Problem
from nestling.search.result import SearchResult, Trial
from nestling.search.samplers import SteadySampler, directions, distributions, quiet
from nestling.space import Arch

FAILED_VIOLATION = 1.0
"""The constraint of a trial without metrics: it must never count as feasible."""
LOCK_SECONDS = 60
SQLITE_HEADER = b"SQLite format 3\0"


class StudyMismatch(ValueError):  # noqa: N818 - it names what is wrong
    """A file that does not hold a study of this problem; the message says what differs and what would do."""


class Record:
    """The study `name` in the SQLite file `path`, which other Optuna tools can read.

    Args:
        problem: what the study is of.
        path: made where it is not there.
        name: of the study, likewise.

    Raises:
        StudyMismatch: the file is no Optuna study, or one of another problem, or one that others wrote into.
        FileNotFoundError: no folder to make the file in.
    """

    def __init__(self, problem: Problem, path: Path, name: str) -> None:
        self.problem = problem
        self._path = path
        with quiet():
            if not path.exists() and path.parent.is_dir():
                _begin(path, problem, name)
            self._file = _open(path)
            stored = optuna.create_study(
                study_name=name, storage=self._file, directions=directions(problem), load_if_exists=True
            )
            self._file_id = self._file.get_study_id_from_name(name)
            self.trials = _read(stored, problem, path)
            if "problem" not in stored.user_attrs:
                stored.set_user_attr("problem", _signature(problem))
            finished = stored.get_trials(deepcopy=False)
            self._memory = InMemoryStorage()
            self._memory_id = self._memory.create_new_study(stored.directions, name)
            self._study = _AskedStudy(name, self._memory)
            for trial in finished:
                self._study.add_trial(trial)
                for key, value in trial.user_attrs.get("sampler_notes", {}).items():
                    self._memory.set_study_system_attr(self._memory_id, key, value)
        self._distributions = distributions(problem)
        self._inferred: dict[str, BaseDistribution] = {}
        self._asked: optuna.Trial | None = None

    @property
    def result(self) -> SearchResult:
        """Everything that was tried so far."""
        return SearchResult(self.problem, tuple(self.trials))

    def ask(self, sampler: BaseSampler, *, forced: Arch | None = None) -> Arch:
        """The arch that `sampler` proposes next, or `forced`, of which the sampler then is told."""
        space = self.problem.space
        before = self._notes()
        self._study.sampler = SteadySampler(sampler, self._inferred)
        with quiet():
            if forced is not None:
                self._study.enqueue_trial({choice.name: forced[choice.name] for choice in space.open_choices})
            self._asked = self._study.ask(self._distributions)
        notes = {key: value for key, value in self._notes().items() if before.get(key) != value}
        if notes:
            self._asked.set_user_attr("sampler_notes", notes)
        if forced is not None:
            return forced
        params = self._asked.params
        return space.canonical({c.name: params.get(c.name, c.values[0]) for c in space.choices})

    def tell(self, trial: Trial, *, original: Trial | None = None) -> None:
        """Adds `trial`, the outcome of what was asked for last; `original` is what it duplicates.

        Raises:
            StudyMismatch: another process writes into the study.
        """
        if self._asked is None:
            raise RuntimeError("nothing was asked for")
        asked, self._asked = self._asked, None
        asked.set_user_attr("arch", trial.arch.to_json())
        asked.set_user_attr("state", trial.state)
        asked.set_user_attr("seconds", trial.seconds)
        if trial.metrics:
            asked.set_user_attr("metrics", dict(trial.metrics))
        if trial.reason:
            asked.set_user_attr("reason", trial.reason)
        if original is not None:
            asked.set_user_attr("duplicate_of", original.number)
        with quiet():
            for limit in self.problem.limits:
                violation = limit.violation(trial.metrics) if trial.metrics else FAILED_VIOLATION
                asked.set_constraint(limit.metric, violation)
            if trial.metrics:
                self._study.tell(asked, [trial.metrics[o.name] for o in self.problem.objectives])
            else:
                self._study.tell(asked, state=TrialState.FAIL)
            finished = self._study.get_trials(deepcopy=False)[-1]
            stored = self._file.create_new_trial(self._file_id, template_trial=finished)
            number = self._file.get_trial_number_from_id(stored)
        if number != trial.number:
            raise StudyMismatch(
                f"trial {trial.number} of {self._path} became trial {number}: another process writes into "
                "the same study; let one of them end, then start again"
            )
        self.trials.append(trial)

    def _notes(self) -> dict[str, Any]:
        return dict(self._memory.get_study_system_attrs(self._memory_id))


class _AskedStudy(optuna.Study):
    """A study that is asked, not run."""

    def stop(self) -> None:
        """Does nothing: a sampler that has proposed everything calls this, and there is no loop to end."""


def read_record(problem: Problem, path: Path, name: str) -> SearchResult:
    """What the study `name` in the SQLite file `path` holds; nothing where there is no such file or study.

    Raises:
        StudyMismatch: the file is no Optuna study, or one of another problem, or one that others wrote into.
    """
    if not path.exists():
        return SearchResult(problem, ())
    with quiet():
        storage = _open(path)
        if name not in optuna.get_all_study_names(storage):
            return SearchResult(problem, ())
        study = optuna.load_study(study_name=name, storage=storage)
        return SearchResult(problem, tuple(_read(study, problem, path)))


def _begin(path: Path, problem: Problem, name: str) -> None:
    """Makes the file with its tables and an empty study, all at once.

    Optuna makes them one after the other, and cannot open a file in which a kill has left some of them.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        storage = _open(Path(temporary))
        study = optuna.create_study(study_name=name, storage=storage, directions=directions(problem))
        study.set_user_attr("problem", _signature(problem))
        storage.remove_session()
        storage.engine.dispose()
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _open(path: Path) -> RDBStorage:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for the study {path.name}")
    if path.exists():
        with path.open("rb") as file:
            beginning = file.read(len(SQLITE_HEADER))
        if beginning not in (b"", SQLITE_HEADER):
            raise StudyMismatch(f"{path} is not an SQLite file; name another one, or move it away")
    # quoted, or a path with a question mark or braces would name another file
    url = f"sqlite:///{quote(str(path.resolve()))}"
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})


def _read(study: optuna.Study, problem: Problem, path: Path) -> list[Trial]:
    asked = _signature(problem)
    there = study.user_attrs.get("problem", asked)
    same = {key: there.get(key) == asked[key] for key in asked}
    same["objectives"] &= study.directions == directions(problem)
    differs = ", ".join(key for key, equal in same.items() if not equal)
    if differs:
        raise StudyMismatch(
            f"{path} holds the study {study.study_name!r} of another problem (it differs in {differs}); "
            "search in a new run folder, or remove that file"
        )
    return [_read_trial(trial, path) for trial in study.get_trials(deepcopy=False)]


def _read_trial(trial: FrozenTrial, path: Path) -> Trial:
    attributes = trial.user_attrs
    if not {"arch", "state", "seconds"} <= attributes.keys():
        raise StudyMismatch(
            f"{path}: trial {trial.number} ({trial.state.name}) was not written by a search of Nestling; "
            "search in a new run folder, or remove that file"
        )
    state: Literal["complete", "failed", "duplicate"] = attributes["state"]
    return Trial(
        number=trial.number,
        arch=Arch.from_json(attributes["arch"]),
        metrics=attributes.get("metrics", {}),
        state=state,
        reason=attributes.get("reason", ""),
        seconds=attributes["seconds"],
    )


def _signature(problem: Problem) -> dict[str, Any]:
    space = json.dumps([problem.space.family, [asdict(choice) for choice in problem.space.choices]])
    return {
        "objectives": [objective.name for objective in problem.objectives],
        "limits": {limit.metric: limit.bound for limit in problem.limits},
        "space": hashlib.sha256(space.encode()).hexdigest()[:12],
    }
