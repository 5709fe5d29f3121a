"""What the reference model takes on a device at its best: by it a machine that is busy all the time is told.

A neighbour on the other thread of a core slows networks by a third to a half, some more than others, so that
ratios to the reference model change with it. One that comes and goes shows within a measurement; one that
stays shows only beside what the device has been seen to do before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.store import MeasurementStore, StoreError

FACT = "fastest reference"
KEPT_SECONDS = 30 * 86400.0
"""A best time that was not seen again for so long holds no more: clocks and firmware change."""
SEEN_AGAIN = 1.05
"""A time of at most so many times the best has seen it again."""


def state_file() -> Path:
    """Where best times are kept for this user: below XDG_STATE_HOME or `~/.local/state`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nestling/devices.db"


class QuietTimes:
    """The best median time of the reference model on each device, known to all processes of a user.

    Where the file cannot be written, this process alone knows them.

    Args:
        path: the file; made, with its folder, when it is missing.
        now: seconds since 1970.
    """

    def __init__(self, path: Path | None = None, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._known: dict[str, tuple[float, float]] = {}
        self._store: MeasurementStore | None = None
        try:
            path = state_file() if path is None else path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store = MeasurementStore(path)
        except (OSError, RuntimeError):  # no home, no permission, a full disk, a damaged file
            pass

    def heard(self, measurement: Measurement) -> Measurement:
        """`judged` of one taken just now: if it is sound and faster than ever, it is the best from now on."""
        took, best = _took(measurement), self._best(measurement.fingerprint)
        sound = not _slowed(measurement, None).unstable
        if sound and (best is None or took <= SEEN_AGAIN * best):
            self._keep(measurement.fingerprint, took if best is None else min(took, best))
        return self.judged(measurement)

    def judged(self, measurement: Measurement) -> Measurement:
        """`measurement`, its conditions telling how much slower than at its best the device was.

        What it was judged by before is forgotten.
        """
        best = self._best(measurement.fingerprint)
        return _slowed(measurement, None if best is None else _took(measurement) / best)

    def _best(self, fingerprint: Fingerprint) -> float | None:
        if self._store is not None:
            try:
                told = self._store.recall(FACT, fingerprint=fingerprint)
                if told is not None:
                    content = json.loads(told)
                    self._known[fingerprint.key] = float(content["seconds"]), float(content["seen"])
            except (StoreError, ValueError, KeyError, TypeError):
                pass
        best, seen = self._known.get(fingerprint.key, (None, 0.0))
        return best if self._now() - seen < KEPT_SECONDS else None

    def _keep(self, fingerprint: Fingerprint, best: float) -> None:
        self._known[fingerprint.key] = best, self._now()
        if self._store is not None:
            try:
                content = json.dumps({"seconds": best, "seen": self._now()})
                self._store.remember(FACT, content, fingerprint=fingerprint)
            except StoreError:
                pass


def _took(measurement: Measurement) -> float:
    return float(np.median(measurement.reference_seconds))


def _slowed(measurement: Measurement, slowed: float | None) -> Measurement:
    return replace(measurement, conditions=replace(measurement.conditions, slowed=slowed))
