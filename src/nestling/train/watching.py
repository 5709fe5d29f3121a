"""Watch: whether training runs away, told by the loss on the labels of all that a step visits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nestling.train.strategies import Visit

DIVERGED = 3.0
KNOWS_NOTHING = 0.9
"""Of the loss of who gives all classes the same probability. A network that has gone dead gives each its part
of the labels, which is a little better where classes are not equally many."""
RECENT_STEPS = 50


class Watch:
    """The losses on the labels of the latest steps, and where those of such visits began.

    What a visit learns from differs within a run, by kind and by weight; its loss on the labels means the
    same everywhere. Where a step visits another number of subnets than the one before, or others of them
    learn from soft labels, networks have joined that nobody trained before: what they begin with is then what
    later steps are compared with. That is one batch's loss, and tells little where it is next to nothing, as
    of a network that is trained further: what runs away is also about as bad as who knows nothing.

    Args:
        state: what `state` gave, to go on from there.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = state or {"kind": None, "first": None, "recent": []}
        self._kind: str | None = given["kind"]
        self.first: float | None = given["first"]
        """The mean of the first step of this kind."""
        self._recent: deque[float] = deque(given["recent"], maxlen=RECENT_STEPS)
        self._bad = 0.0

    def note(self, visits: Sequence[Visit], losses: Sequence[float], *, classes: int) -> None:
        """Takes in a step: its visits, of each the loss on the labels, and how many `classes` these have."""
        self._bad = KNOWS_NOTHING * math.log(classes)
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
        """Whether so many steps have losses that are, on average, `DIVERGED` times the first's, and bad."""
        long_enough = len(self._recent) == self._recent.maxlen
        return self.first is not None and long_enough and self.mean > max(DIVERGED * self.first, self._bad)

    def state(self) -> dict[str, Any]:
        """What a `Watch` needs to go on from here."""
        return {"kind": self._kind, "first": self.first, "recent": list(self._recent)}
