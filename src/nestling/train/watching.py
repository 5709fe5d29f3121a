"""Watch: whether training runs away, told by the loss on the labels of all that a step visits."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nestling.train.strategies import Visit

DIVERGED = 3.0
RECENT_STEPS = 50


class Watch:
    """The losses on the labels of the latest steps, and where those of such visits began.

    What a visit learns from differs within a run, by kind and by weight; its loss on the labels means the
    same everywhere. Where a step visits another number of subnets than the one before, or others of them
    learn from soft labels, networks have joined that nobody trained before: what they begin with is then what
    later steps are compared with.

    Args:
        state: what `state` gave, to go on from there.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = state or {"kind": None, "first": None, "recent": []}
        self._kind: str | None = given["kind"]
        self.first: float | None = given["first"]
        """The mean of the first step of this kind."""
        self._recent: deque[float] = deque(given["recent"], maxlen=RECENT_STEPS)

    def note(self, visits: Sequence[Visit], losses: Sequence[float]) -> None:
        """Takes in a step: its visits, and of each the loss on the labels."""
        kind = "".join("s" if v.learns_from is not None or v.teacher else "l" for v in visits)
        mean = sum(losses) / len(losses)
        if kind != self._kind:
            self._kind, self.first = kind, mean
            self._recent.clear()
        self._recent.append(mean)

    @property
    def mean(self) -> float:
        """Of the latest steps of this kind, at most `RECENT_STEPS`."""
        return sum(self._recent) / len(self._recent)

    @property
    def runs_away(self) -> bool:
        """Whether so many steps have losses that are, on average, `DIVERGED` times the first's."""
        long_enough = len(self._recent) == self._recent.maxlen
        return self.first is not None and long_enough and self.mean > DIVERGED * self.first

    def state(self) -> dict[str, Any]:
        """What a `Watch` needs to go on from here."""
        return {"kind": self._kind, "first": self.first, "recent": list(self._recent)}
