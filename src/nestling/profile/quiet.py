"""What the reference model takes on a device at its best: by it moments are told in which others slow it.

A neighbour on the other thread of a core slows networks by a third to a half, some more than others, so that
ratios to the reference model change with it. A measurement counts the moments in which the device is about
as fast as it was ever seen to be, and one that finds too few of them is unstable.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.store import MeasurementStore, StoreError
from nestling.profile.worker import LEAST_PAIRS, SLOWED

FACT = "fastest reference"
KEPT_SECONDS = 30 * 86400.0
"""A best time that was not seen again for so long holds no more: clocks and firmware change."""
SEEN_AGAIN = 1.05
"""A time of at most so many times the best has seen it again."""


def state_file() -> Path:
    """Where best times are kept for this user: below XDG_STATE_HOME or `~/.local/state`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nestling/devices.db"


class QuietTimes:
    """The best time of the reference model on each device of each machine, known to all processes of a user.

    Where the file cannot be written, this process alone knows them.

    Args:
        path: the file; made, with its folder, when it is missing.
        now: seconds since 1970.
    """

    def __init__(self, path: Path | None = None, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._known: dict[tuple[str, str], tuple[float, float]] = {}
        self._store: MeasurementStore | None = None
        try:
            path = state_file() if path is None else path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store = MeasurementStore(path)
        except (OSError, RuntimeError):  # no home, no permission, a full disk, a damaged file
            pass

    def heard(self, measurement: Measurement) -> Measurement:
        """`judged` of one taken just now: if the device was faster than ever, that is its best from now on.

        What counts is the fastest part of a measurement: one during which others came and went tells too.
        """
        took = _fastest(measurement)
        if took is not None:
            self._keep(measurement.fingerprint, measurement.machine, took)
        return self.judged(measurement)

    def judged(self, measurement: Measurement) -> Measurement:
        """`measurement`, its conditions telling how much slower than at its best the device was.

        What it was judged by before is forgotten.
        """
        best = self.best(measurement.fingerprint, machine=measurement.machine)
        slowed = None if best is None else float(np.median(measurement.reference_seconds)) / best
        return replace(measurement, conditions=replace(measurement.conditions, slowed=slowed))

    def best(self, fingerprint: Fingerprint, *, machine: str) -> float | None:
        """The seconds of the reference model on the device at its best; None where that is not known."""
        told = None
        if self._store is not None:
            with contextlib.suppress(StoreError):
                told = self._store.recall(_fact(machine), fingerprint=fingerprint)
        # of its own too, where the file could not be written
        known = (_parsed(told), self._known.get((fingerprint.key, machine)))
        return min((one[0] for one in known if one and self._now() - one[1] < KEPT_SECONDS), default=None)

    def _keep(self, fingerprint: Fingerprint, machine: str, took: float) -> None:
        """Makes `took` the best, unless a better one is known; which was seen again where they are close."""
        now = self._now()

        def later(known: tuple[float, float] | None) -> tuple[float, float]:
            if known is None or now - known[1] >= KEPT_SECONDS:
                return took, now
            return min(took, known[0]), now if took <= SEEN_AGAIN * known[0] else known[1]

        key = fingerprint.key, machine
        self._known[key] = later(self._known.get(key))
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._store.revise(
                    _fact(machine), lambda told: _told(*later(_parsed(told))), fingerprint=fingerprint
                )


def _fact(machine: str) -> str:
    return f"{FACT} of {machine}"


def _told(seconds: float, seen: float) -> str:
    return json.dumps({"seconds": seconds, "seen": seen})


def _parsed(told: str | None) -> tuple[float, float] | None:
    """Seconds and when they were last seen; None where nothing that can be read was told."""
    try:
        content = json.loads(told or "")
        return float(content["seconds"]), float(content["seen"])
    except (ValueError, KeyError, TypeError):
        return None


def _fastest(measurement: Measurement) -> float | None:
    """The median seconds of the reference model while the device was as fast as in its fastest tenth.

    None where these are few, or where the machine was not the worker's alone.
    """
    told, times = measurement.conditions, np.array(measurement.reference_seconds)
    fast = times[times <= SLOWED * np.quantile(times, 0.1)]
    if len(fast) < min(LEAST_PAIRS, len(times)) or told.interrupted or told.missed:
        return None
    return float(np.median(fast))
