"""Ending: where a search ends early, settled in its study once that is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nestling.search.objectives import Problem
from nestling.search.opening import open_queue
from nestling.search.queue import Queue
from nestling.search.record import is_begun
from nestling.search.result import Trial
from nestling.search.stopping import Stop, Stopping


class Ending:
    """What `stopping` finds among the trials of `queue`'s study, or has found when it was first asked.

    Metrics may be taken again after a search has ended, and its trials then tell another end, or none: the
    first one holds, for all processes, as long as limits and `stopping.below` are the same.
    """

    def __init__(self, queue: Queue, stopping: Stopping) -> None:
        self._queue, self._stopping = queue, stopping
        self._fact = _fact(stopping.problem, stopping.below)
        self._found = _read(queue.settled(self._fact))

    def look(self, trials: Sequence[Trial]) -> Stop | None:
        """Where the search ends, given its `trials` in their order; None where it goes on."""
        if self._found is None and (stop := self._stopping.look(trials)) is not None:
            self._found = _read(self._queue.settle(self._fact, json.dumps(asdict(stop))))
        return self._found


def load_stop(problem: Problem, below: float, *, storage: Path | str, name: str) -> Stop | None:
    """Where the search of that study has ended early under these limits; None where it has not.

    Args:
        problem: of the study.
        below: see `Stopping`.
        storage, name: of the study, as `search` has them.

    Raises:
        Exception: as `open_queue`.
    """
    if below == 0 or not is_begun(storage, name):
        return None
    with open_queue(problem, storage, name) as queue:
        return _read(queue.settled(_fact(problem, below)))


def _fact(problem: Problem, below: float) -> str:
    """The name under which the end is settled."""
    asked = json.dumps([below, {limit.metric: limit.bound for limit in problem.limits}], sort_keys=True)
    return f"stop {hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def _read(content: str | None) -> Stop | None:
    return None if content is None else Stop(**json.loads(content))
