"""Whether others keep this machine's cores busy, as a loop in plain Python has it.

Other tenants of a host slow its cores by a third to a half, and no counter of this machine tells of it. What
is measured with `Thermometer.quietly` was measured while the loop took about its fastest time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

QUIET = 1.15
"""A core is quiet where the loop takes at most so many times its fastest time."""
PATIENCE = 6
"""Measurements on a machine that is not quiet before the last of them counts; so many waits before each."""
PAUSE_SECONDS = 5.0


class Thermometer:
    """Times the loop; its fastest time is that of all readings so far."""

    def __init__(self) -> None:
        self._fastest = float("inf")
        self.slowness()

    def slowness(self) -> float:
        """How many times its fastest time the loop takes now, on the slower one of the cores."""
        allowed, medians = os.sched_getaffinity(0), []
        try:
            for core in allowed:
                os.sched_setaffinity(0, {core})
                times = [self._loop() for _ in range(15)]
                medians.append(statistics.median(times))
                self._fastest = min(self._fastest, medians[-1])
        finally:
            os.sched_setaffinity(0, allowed)
        return max(medians) / self._fastest

    def quietly(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gave while the machine was quiet; `restless` tells how often it was made in vain.

        It is `PATIENCE` where the machine was not quiet to the last.
        """
        for vain in range(PATIENCE):
            for _ in range(PATIENCE):
                if self.slowness() <= QUIET:
                    break
                time.sleep(PAUSE_SECONDS)
            found = measure()
            if self.slowness() <= QUIET:
                return {**found, "restless": vain}
        return {**found, "restless": PATIENCE}

    @staticmethod
    def _loop() -> float:
        begun, total = time.perf_counter(), 0
        for number in range(100_000):
            total += number
        return time.perf_counter() - begun
