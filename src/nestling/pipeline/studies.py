"""A run's study: where it is, what it is after, and what it holds so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.config import ConfigError
from nestling.pipeline.workbench import Workbench
from nestling.search import Problem, SearchResult, is_begun, load_result, parse_limits, study_url

STUDY = "nestling"
REFERENCE = "reference.json"
"""The run's file of the reference model, as its first measurement found it."""


def problem(bench: Workbench) -> Problem:
    """What the run's search is after.

    Raises:
        ConfigError: an unknown objective or limit.
    """
    config = bench.config.search
    try:
        return Problem.parse(bench.space, objectives=config.objectives, limits=config.limits)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a study is: an SQLite file or a database's URL, and the study's name there."""

    storage: Path | str
    name: str


def study_place(bench: Workbench, *, given: str | None = None) -> Place:
    """Where the run's study is: in the database `given`, in the configuration's, or in the run's own file.

    In a PostgreSQL database, which many runs may share, the run's name is part of the study's.

    Raises:
        ConfigError: it is of a kind that no study can be in.
    """
    asked = bench.config.search.study if given is None else given
    if asked is None:
        return Place(bench.run.study_file, STUDY)
    try:
        study_url(asked)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Place(asked, f"{STUDY}/{bench.config.name}" if asked.startswith("postgres") else STUDY)


def searched(bench: Workbench) -> SearchResult:
    """What the run's search has tried so far; nothing before it has begun.

    Raises:
        StudyMismatch: the study is of another problem.
        StudyUnavailable: its database cannot be reached.
    """
    place = study_place(bench)
    return load_result(problem(bench), storage=place.storage, name=place.name)


def is_searched(bench: Workbench) -> bool:
    """Whether the run's search has begun, with whatever limits.

    Raises:
        StudyMismatch, StudyUnavailable: as `searched`.
    """
    place = study_place(bench)
    return is_begun(place.storage, place.name)


def limit_overrides(*, at_most: Sequence[str], at_least: Sequence[str]) -> list[str]:
    """Overrides of the configuration for limits such as `latency_ms=5`.

    Raises:
        ConfigError: one that cannot be used.
    """
    try:
        limits = parse_limits(at_most=at_most, at_least=at_least)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [f"search.limits.{metric}={bound!r}" for metric, bound in limits.items()]


def about(bench: Workbench) -> dict[str, str]:
    """What must be the same for all processes that search the run's study, on whichever machine."""
    facts = {"images": bench.data.fingerprint}
    found = weights(bench)
    return facts if found is None else {**facts, "weights": found}


def weights(bench: Workbench) -> str | None:
    """The SHA-256 of the supernet's newest checkpoint; None where there is none."""
    index = bench.checkpoints / "checkpoints.json"
    if not index.exists():
        return None
    newest: str = json.loads(index.read_text(encoding="utf-8"))[0]["sha256"]
    return newest
