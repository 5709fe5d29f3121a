"""Board: a member of a pool and how it stands: in service, or set aside until it is probed again."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nestling.profile.measurement import Fingerprint
from nestling.profile.worker_device import WorkerDevice

MOST_FAILURES = 3
"""So many in a row, and a board is set aside."""
FIRST_REST, LONGEST_REST = 5.0, 300.0
"""Seconds until a board that was set aside is probed; twice as long after each probe that it fails."""


@dataclass(slots=True)
class Board:
    """One device of a pool. Its methods say what befell it; who calls them holds the pool's lock."""

    device: WorkerDevice
    failures: int = 0
    """In a row."""
    rest_seconds: float = FIRST_REST
    aside_until: float | None = None
    """When it is probed again; None while it is in service."""
    cause: str = ""
    """Why it was set aside last."""
    probing: bool = field(default=False)
    is_member: bool = False
    """Whether it was found to be of the pool's class when it was calibrated."""
    recent: list[float] = field(default_factory=list)
    """What the reference model took in its last measurements that were not restless, in milliseconds."""

    @property
    def name(self) -> str:
        """Its address."""
        return self.device.name

    @property
    def in_service(self) -> bool:
        """Whether it may be given work."""
        return self.aside_until is None

    def due(self, now: float) -> bool:
        """Whether it is time to probe it."""
        return self.aside_until is not None and not self.probing and now >= self.aside_until

    def succeeded(self) -> None:
        """It did what was asked."""
        self.failures, self.rest_seconds = 0, FIRST_REST

    def failed(self, cause: str, *, now: float) -> bool:
        """Counts a lost worker or line: whether the board is set aside by it."""
        self.failures += 1
        if self.failures < MOST_FAILURES or not self.in_service:
            return False
        self.set_aside(cause, now=now)
        return True

    def set_aside(self, cause: str, *, now: float) -> None:
        """Gives it no more work until it has rested and passed a probe."""
        self.cause, self.aside_until = cause, now + self.rest_seconds
        self.rest_seconds = min(2 * self.rest_seconds, LONGEST_REST)

    def admit(self) -> None:
        """Puts it into service; one failure more, and it is set aside again, for longer."""
        self.aside_until, self.failures = None, MOST_FAILURES - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a board said it is, and how long the reference model takes there."""

    fingerprint: Fingerprint
    reference_ms: float


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """What the boards of a pool have in common; ratios to the reference model compare within it.

    Attributes:
        fingerprint: of the whole class.
        reference_ms: what the reference model takes on most boards.
        spread: how much more or less it may take on a board of the class, as a part.
    """

    fingerprint: Fingerprint
    reference_ms: float
    spread: float

    @classmethod
    def of(cls, found: Mapping[str, Calibration], *, device: str, spread: float) -> DeviceClass:
        """The class that most boards are of; of several that as many are of, the one found first.

        Its reference time is the median of theirs, and the faster one's of two: something slows a board
        down, nothing speeds one up.
        """
        named = {name: replace(one.fingerprint, device=device) for name, one in found.items()}
        [(fingerprint, _)] = Counter(named.values()).most_common(1)
        times = [found[name].reference_ms for name, one in named.items() if one == fingerprint]
        return cls(fingerprint, statistics.median_low(times), spread)

    def renewed(self, found: Calibration, *, alone: bool) -> DeviceClass:
        """The class, with the time of a board that is faster than one of it may be.

        Nothing speeds a board up, so the class was calibrated while something slowed its boards down. A board
        that is `alone` has nothing but itself to be compared with, and its own time holds, whatever it is.
        """
        faster = found.reference_ms * (1 + self.spread) < self.reference_ms
        if (alone or faster) and self._is_of(found.fingerprint):
            return replace(self, reference_ms=found.reference_ms)
        return self

    def objection(self, found: Calibration) -> str | None:
        """Why a board is not of this class; None where it is."""
        if not self._is_of(found.fingerprint):
            theirs = replace(found.fingerprint, device=self.fingerprint.device)
            return f"it is another kind of device ({theirs}) than the others ({self.fingerprint})"
        ratio = found.reference_ms / self.reference_ms
        if 1 / (1 + self.spread) <= ratio <= 1 + self.spread:
            return None
        return (
            f"the reference model takes {found.reference_ms:.3g} ms there and {self.reference_ms:.3g} ms on "
            f"the others, {ratio:.2f} times as long; {1 + self.spread:.2f} times is the most in one class"
        )

    def _is_of(self, fingerprint: Fingerprint) -> bool:
        return replace(fingerprint, device=self.fingerprint.device) == self.fingerprint
