"""Whether others keep this machine's cores busy, as a loop in plain Python has it.

Other tenants of a host slow its cores by a third to a half, and no counter of this machine tells of it. What
is measured with `Thermometer.quietly` was measured while the loop took about its fastest time. That is kept
for each user, processor and version of Python, beside what Nestling keeps of devices: on a host that is busy
throughout, the fastest time of one run alone would be a busy one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import processor, store

from nestling.profile.quiet import KEPT_SECONDS, SEEN_AGAIN, state_file

QUIET = 1.15
"""A core is quiet where the loop takes at most so many times its fastest time."""
PATIENCE = 6
"""Measurements on a machine that is not quiet before the last of them counts, at most."""
PAUSE_SECONDS = 5.0
WAITED_SECONDS = 600.0
"""What a whole run may spend on waiting, and on measurements that are made again."""
SHARES = 8
"""What one measurement may take of what is left of that: so that later ones have some, too."""
REMEMBERED_SECONDS = 86400.0
"""That a time was seen again is written down so often, at most."""


class Thermometer:
    """Times the loop; its fastest time is that of all readings so far, of earlier runs too.

    Where it cannot be kept, it is that of this run.

    Args:
        path: where fastest times are kept; beside those of devices where it is None.
        waited_seconds: see WAITED_SECONDS.
    """

    def __init__(self, path: Path | None = None, *, waited_seconds: float = WAITED_SECONDS) -> None:
        self._path = path
        with contextlib.suppress(RuntimeError):  # a user without a home
            self._path = path or state_file().with_name("loops.json")
        self._name = f"{processor()}, Python {platform.python_version()}"
        self._left_seconds = waited_seconds
        self._fastest, self._seen = self._known().get(self._name, (float("inf"), 0.0))
        self.slowness()

    def slowness(self) -> float:
        """How many times its fastest time the loop takes now, on the slower one of the cores."""
        allowed, medians = os.sched_getaffinity(0), []
        try:
            for core in allowed:
                os.sched_setaffinity(0, {core})
                medians.append(statistics.median(loop_seconds() for _ in range(15)))
        finally:
            os.sched_setaffinity(0, allowed)
        self._heard(min(medians))
        return max(medians) / self._fastest

    def quietly(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gave while the machine was quiet, before and after.

        `restless` is added, how often it was made on a machine that was not quiet, and `quiet`: False where
        the last was such a one, too, and counts since there was no more time, or after `PATIENCE` of them.
        """
        slow, restless = self.slowness(), 0
        begun, share = time.monotonic(), self._left_seconds / SHARES
        while True:
            while slow > QUIET and time.monotonic() + PAUSE_SECONDS <= begun + share:
                time.sleep(PAUSE_SECONDS)
                slow = self.slowness()
            spent = time.monotonic() - begun
            found = measure()
            before, slow = slow, self.slowness()
            quiet = before <= QUIET and slow <= QUIET
            restless += not quiet
            if quiet or restless == PATIENCE or time.monotonic() >= begun + share:
                self._left_seconds -= min(spent, self._left_seconds)
                return {**found, "restless": restless, "quiet": quiet}

    def beside(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gave, made once, and `quiet`: whether the machine was so before and after."""
        before = self.slowness()
        found = measure()
        return {**found, "quiet": max(before, self.slowness()) <= QUIET}

    def _heard(self, seconds: float) -> None:
        """Keeps `seconds` where they are the fastest, and when a time about as fast was seen last."""
        now, known = time.time(), self._fastest
        if seconds > SEEN_AGAIN * known:
            return
        self._fastest = min(seconds, known)
        if seconds < known or now - self._seen > REMEMBERED_SECONDS:
            self._seen = now
            kept = self._known()  # anew: another benchmark may run beside
            self._fastest = min(self._fastest, kept.get(self._name, (seconds, now))[0])
            kept[self._name] = self._fastest, now
            if self._path is not None:
                with contextlib.suppress(OSError):  # no permission, a full disk
                    store(self._path, kept)

    def _known(self) -> dict[str, tuple[float, float]]:
        """What is kept: the fastest seconds, and when they were seen last, of those seen in 30 days."""
        try:
            told = {} if self._path is None else json.loads(self._path.read_text())
            kept = {str(name): (float(seconds), float(seen)) for name, (seconds, seen) in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
            return {}
        now = time.time()
        return {name: one for name, one in kept.items() if one[0] > 0 and now - one[1] < KEPT_SECONDS}


def loop_seconds() -> float:
    """What the loop takes now."""
    begun, total = time.perf_counter(), 0
    for number in range(100_000):
        total += number
    return time.perf_counter() - begun
