"""The queue of a study, opened: what all who search it agree on, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from nestling.search.database import Database, StudyUnavailable
from nestling.search.objectives import Problem
from nestling.search.queue import LEASE_SECONDS, Queue
from nestling.search.record import Record, begin_study, is_begun


@contextmanager
def open_queue(
    problem: Problem,
    storage: Path | str,
    name: str,
    *,
    about: Mapping[str, str] | None = None,
    lease_seconds: float = LEASE_SECONDS,
) -> Iterator[Queue]:
    """The queue of the study `name`, begun where there is none; what is begun and not done is given back.

    Raises:
        StudyMismatch: the database holds a study of that name for another problem, or no study.
        StudyUnavailable: the database cannot be reached or written.
    """
    database = Database(storage, prepare=partial(begin_study, problem=problem, name=name))
    try:
        queue = Queue(Record(problem, database, name, about=about), lease_seconds=lease_seconds)
        try:
            yield queue
        finally:
            with suppress(StudyUnavailable):  # the lease ends by itself, too
                queue.give_back()
    finally:
        database.close()


def agree(problem: Problem, fact: str, content: str, *, storage: Path | str, name: str) -> str:
    """What all processes that search the study take for `fact`: the `content` that was told first.

    Raises:
        Exception: as `open_queue`.
    """
    with open_queue(problem, storage, name) as queue:
        return queue.settle(fact, content)


def amend(problem: Problem, fact: str, content: str, *, before: str, storage: Path | str, name: str) -> str:
    """What all processes take for `fact` from now on: `content`, unless it is not `before` any more.

    Raises:
        Exception: as `open_queue`.
    """
    with open_queue(problem, storage, name) as queue:
        return queue.amend(fact, content, before=before)


def suspects(
    problem: Problem, *, storage: Path | str, name: str, about: Mapping[str, str] | None = None
) -> int:
    """How many archs may be what kills the command, which was lost with each of them again and again.

    Evaluated by another process than the one that watches, it can be told from a person or a machine that
    ends the command. No study is begun.

    Raises:
        Exception: as `open_queue`.
    """
    if not is_begun(storage, name):
        return 0
    with open_queue(problem, storage, name, about=about) as queue:
        return queue.suspects()


def evaluated(problem: Problem, *, storage: Path | str, name: str) -> frozenset[str]:
    """The keys of the archs whose outcome is stored, whoever evaluated them; none where no study is begun.

    All others that were proposed are waiting, or somebody is at work on them.

    Raises:
        Exception: as `open_queue`.
    """
    if not is_begun(storage, name):
        return frozenset()
    with open_queue(problem, storage, name) as queue:
        return queue.evaluated()
