"""Comparison: how many times faster one file is than another on a device, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestling.profile.devices import Device
from nestling.profile.turns import turn

ROUNDS = 8
"""Fresh workers in which two files are timed beside each other."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 20
WIDEST_HALF = 0.05
"""An interval whose half is wider than this part of the figure makes a comparison unstable."""
MOST_UNSTABLE = 0.25
"""So does a larger part of the rounds than this whose own measurement is unstable."""
_STUDENT: tuple[float, ...] = (9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)
_STUDENT += (3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861)
"""Student's t that 99.5 % stay below, for 2 degrees of freedom and more."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two files that were timed beside each other, round after round, each round in a worker of its own.

    Where a file's weights come to lie in memory changes its time by a percent or two for as long as the
    worker lives, so that the times of one worker agree too well: the interval is taken over the rounds.

    Raises:
        ValueError: fewer rounds than 3, or more than 20.
    """

    device: str
    first: Path
    second: Path
    speedups: tuple[float, ...]
    """The second file's time divided by the first one's, of each round: above 1 where the first is faster."""
    first_ms: float
    second_ms: float
    """The medians over the rounds."""
    unstable_rounds: int = 0
    """Rounds whose own measurement was unstable."""

    def __post_init__(self) -> None:
        if not LEAST_ROUNDS <= len(self.speedups) <= MOST_ROUNDS:
            raise ValueError(
                f"a comparison needs {LEAST_ROUNDS} to {MOST_ROUNDS} rounds, not {len(self.speedups)}"
            )

    @property
    def speedup(self) -> float:
        """How many times faster the first file is: the geometric mean of the rounds."""
        return statistics.geometric_mean(self.speedups)

    @property
    def half_width(self) -> float:
        """Half the 99 % interval of `speedup`, by Student's t over the rounds."""
        spread = statistics.stdev(math.log(ratio) for ratio in self.speedups)
        student = _STUDENT[len(self.speedups) - LEAST_ROUNDS]
        return self.speedup * math.expm1(student * spread / math.sqrt(len(self.speedups)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 99 % interval of `speedup`: it leaves out 1 for one in a hundred pairs of equal files."""
        part = 1 + self.half_width / self.speedup
        return self.speedup / part, self.speedup * part

    @property
    def differs(self) -> bool:
        """Whether the interval leaves no room for the two being equally fast."""
        low, high = self.interval
        return not low <= 1.0 <= high

    @property
    def unstable(self) -> bool:
        """Whether the rounds, or too many of their measurements, are too restless to be relied on."""
        return bool(self.unstable_because)

    @property
    def unstable_because(self) -> tuple[str, ...]:
        """Why the figures cannot be relied on; nothing where they can."""
        reasons = []
        if self.half_width > WIDEST_HALF * self.speedup:
            reasons.append(f"the rounds disagree by {self.half_width / self.speedup:.0%}")
        if self.unstable_rounds > MOST_UNSTABLE * len(self.speedups):
            reasons.append(f"{self.unstable_rounds} of {len(self.speedups)} rounds were unstable")
        return tuple(reasons)

    def sentence(self) -> str:
        """The comparison in words; of an unstable one nothing is claimed."""
        first, second = (str(path) for path in (self.first, self.second))
        if self.unstable:
            return (
                f"whether {first} or {second} is faster cannot be told: {', '.join(self.unstable_because)}; "
                "compare again on a quieter machine, or for longer"
            )
        speedup, half = self.speedup, self.half_width
        if not self.differs:
            return f"no difference between {first} and {second} can be told ({speedup:.3f} +- {half:.3f})"
        if speedup < 1:
            first, second, speedup, half = second, first, 1 / speedup, half / speedup**2
        # enough digits that a difference never reads as 1.00
        digits = 2 if speedup >= 1.05 else 3
        return f"{first} is {speedup:.{digits}f} +- {half:.{digits}f} times faster than {second}"

    def to_json(self) -> Mapping[str, Any]:
        """The figures as JSON knows them."""
        return {
            **asdict(self),
            "first": str(self.first),
            "second": str(self.second),
            "speedup": self.speedup,
            "interval": list(self.interval),
            "differs": self.differs,
            "unstable": self.unstable,
            "unstable_because": list(self.unstable_because),
            "sentence": self.sentence(),
        }


def compare_files(
    device: Device, first: Path, second: Path, *, seconds: float = 3.0, rounds: int = ROUNDS
) -> Comparison:
    """How many times faster `first` is than `second`. Every round has a worker of its own.

    Which of the two is loaded first alternates. For each round it waits for its turn on this machine.

    Args:
        device: where.
        first, second: ONNX files.
        seconds: the longest that timing may take, all rounds together, on a device that is not slowed; each
            times 10 pairs at least.
        rounds: how many.

    Raises:
        DeviceError: as `Device.measure`.
        ValueError: fewer rounds than 3, or more than 20.
    """
    if not LEAST_ROUNDS <= rounds <= MOST_ROUNDS:
        raise ValueError(f"a comparison needs {LEAST_ROUNDS} to {MOST_ROUNDS} rounds, not {rounds}")
    speedups: list[float] = []
    unstable = 0
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        pair = (second, first) if number % 2 == 0 else (first, second)
        with turn(device.name):
            taken = device.compare(*pair, seconds=seconds / rounds, fresh=True)
        if number % 2 == 0:
            own, other, speedup = taken.reference_seconds, taken.seconds, taken.ratio
        else:
            own, other, speedup = taken.seconds, taken.reference_seconds, 1 / taken.ratio
        speedups.append(speedup)
        unstable += taken.unstable
        times[0].append(statistics.median(own))
        times[1].append(statistics.median(other))
    first_ms, second_ms = (statistics.median(side) * 1e3 for side in times)
    return Comparison(device.name, first, second, tuple(speedups), first_ms, second_ms, unstable)
