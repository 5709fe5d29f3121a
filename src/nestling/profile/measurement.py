"""Measurement: what a device took to run one file, raw times kept; Fingerprint: what the device was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestling.profile.worker import SLOWED, median_interval

WIDEST_INTERVAL = 0.05
"""A 95 % interval of the ratio that is wider than this fraction of it makes a measurement unstable."""
WIDEST_DRIFT = 0.10
"""So does a reference model that was slower in one half of the run than in the other by more than this."""
MOST_INTERRUPTED = 0.05
"""So does a part of the pairs, larger than this, that other programs interrupted.

A file that takes longer than the system's turns is interrupted more often than a short reference model, so
the ratio is off, however tight its interval.
"""
WIDEST_SLOWDOWN = 0.10
"""So does a clock that was slower at the end than at the beginning by more than this part."""
MOST_STOLEN = 0.05
"""So does a part that the hypervisor gave to other machines."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a device is, as far as latencies depend on it: two with the same `key` may share measurements."""

    device: str
    """The address, in full: `ort:cpu?threads=1`."""
    cpu: str
    instructions: tuple[str, ...]
    """The vector and 8-bit instruction sets present, of those that matter to a network."""
    cores: int
    platform: str
    runtime: str
    """The runtime with its version, and the worker's settings of it: `onnxruntime 1.31.1 (settings 2)`."""
    reference: str
    """The first twelve hexadecimal digits of the reference model's SHA-256."""
    int8_saturates: bool
    """Whether sums of two 8-bit products are cut to 16 bits: there weights must keep to 7 bits (-64..63)."""

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name this fingerprint."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    def __str__(self) -> str:
        extras = f" ({', '.join(self.instructions)})" if self.instructions else ""
        return f"{self.device} on {self.cpu}{extras}, {self.cores} cores, {self.platform}, {self.runtime}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the machine told of itself while a file was timed; None where it does not tell."""

    waited: float | None = None
    """The part of the time in which the worker was ready to run and was not let run."""
    left_out: float | None = None
    """Pairs of calls that other programs interrupted, and that are not among the times."""
    interrupted: float | None = None
    """The part of the pairs among the times that were interrupted: above 0 where few were not."""
    slow_pairs: float | None = None
    """Pairs of calls from when others slowed the device, and that are not among the times."""
    missed: float | None = None
    """Pairs that the least number of them lacks, because half of the time limit was gone."""
    stolen: float | None = None
    """The part that the hypervisor gave to other machines."""
    others: float | None = None
    """How many of the machine's other cores were at work, on average."""
    switches: float | None = None
    """How often the worker was made to leave a core."""
    load: float | None = None
    """The machine's load average of a minute."""
    throttled: float | None = None
    """How often the processor slowed itself down, for heat or power."""
    curbed: float | None = None
    """How often the worker's control group had used up its share of the processor, and had to wait."""
    celsius_before: float | None = None
    celsius: float | None = None
    """The hottest sensor, at the end."""
    mhz_before: float | None = None
    mhz: float | None = None
    """The clock of the slowest core used, at the end."""
    slowed: float | None = None
    """How many times as long as on this device at its best the reference model took."""
    peak_bytes: float | None = None
    """The most memory that the worker had, beyond what it had before it read the file."""

    @classmethod
    def of(cls, told: Mapping[str, float]) -> Conditions:
        """What a worker answered; names that are not known here are passed over."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in told.items() if name in names})


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What ran on another provider than the address asks for, because the address allows it."""

    kernels: float
    """The part of the kernels."""
    time: float
    """The part of the time."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The times of one file on one device, interleaved with those of the device's reference model.

    The i-th of `seconds` and of `reference_seconds` are neighbours in time, so whatever slows the machine for
    a while slows both, and their ratio repeats better than either.

    Raises:
        ValueError: no times, not as many of the one as of the other, or a time that is not above zero.
    """

    fingerprint: Fingerprint
    seconds: tuple[float, ...]
    reference_seconds: tuple[float, ...]
    load_seconds: float
    """From bytes to a session."""
    first_seconds: float
    """The first call, which pays for what later ones find done."""
    conditions: Conditions = Conditions()
    elsewhere: Elsewhere | None = None
    """None where nothing was allowed to run elsewhere."""
    machine: str = ""
    """Twelve hexadecimal digits of the machine among those with this fingerprint; empty: it is not known."""

    def __post_init__(self) -> None:
        if not self.seconds or len(self.seconds) != len(self.reference_seconds):
            counts = f"{len(self.seconds)} and {len(self.reference_seconds)}"
            raise ValueError(
                f"a measurement needs as many times of the file as of the reference, not {counts}"
            )
        if min(*self.seconds, *self.reference_seconds) <= 0:
            raise ValueError("a measured time must be above zero")

    @property
    def device(self) -> str:
        """The device's address."""
        return self.fingerprint.device

    @property
    def latency_ms(self) -> float:
        """The median time of a call."""
        return float(np.median(self.seconds)) * 1e3

    @property
    def interval_ms(self) -> tuple[float, float]:
        """The 95 % interval of the median time."""
        low, _, high = median_interval(self.seconds)
        return low * 1e3, high * 1e3

    @property
    def reference_ms(self) -> float:
        """The median time of the reference model; where its best is known, that of a device at its best."""
        took = float(np.median(self.reference_seconds)) * 1e3
        return took if self.conditions.slowed is None else took / self.conditions.slowed

    @property
    def ratio(self) -> float:
        """The median, over pairs of neighbours, of the file's time divided by the reference model's."""
        return float(np.median(self._ratios()))

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """The 95 % interval of `ratio`, from order statistics: it supposes no distribution."""
        low, _, high = median_interval(self._ratios())
        return low, high

    @property
    def ratio_noise(self) -> float:
        """The standard error of `ratio`, as a part of it, as its interval tells: of this process alone."""
        low, high = self.ratio_interval
        return (high - low) / (2 * 1.96 * self.ratio)

    @property
    def p90_ms(self) -> float:
        """The time that nine calls in ten stayed within."""
        return float(np.quantile(self.seconds, 0.90, method="higher")) * 1e3

    @property
    def p99_ms(self) -> float:
        """The time that 99 calls in 100 stayed within."""
        return float(np.quantile(self.seconds, 0.99, method="higher")) * 1e3

    @property
    def slowness(self) -> float:
        """How many times as long as on this device at its best the reference model took; 1 if not known."""
        return 1.0 if self.conditions.slowed is None else self.conditions.slowed

    @property
    def restless(self) -> bool:
        """Whether it is unstable for another reason than that the device was slower than at its best."""
        return replace(self, conditions=replace(self.conditions, slowed=None)).unstable

    @property
    def unstable(self) -> bool:
        """Whether the machine was too restless for the figures to be relied on."""
        return bool(self.unstable_because)

    @property
    def unstable_because(self) -> tuple[str, ...]:
        """Why the figures cannot be relied on; nothing where they can."""
        told = self.conditions
        reasons = []
        low, high = self.ratio_interval
        if high - low > WIDEST_INTERVAL * self.ratio:
            reasons.append(f"the interval of the ratio is {(high - low) / self.ratio:.0%} of it")
        half = len(self.reference_seconds) // 2
        before, after = (
            float(np.median(part or self.reference_seconds))
            for part in (self.reference_seconds[:half], self.reference_seconds[half:])
        )
        drift = max(before, after) / min(before, after) - 1
        if half == 0:
            reasons.append("there is only one time")
        elif drift > WIDEST_DRIFT:
            reasons.append(f"the reference model was {drift:.0%} slower in one half than in the other")
        if told.slowed is not None and told.slowed > SLOWED:
            reasons.append(
                f"the reference model took {told.slowed:.2f} times as long as on this device at its best"
            )
        if told.missed:
            reasons.append(f"half of the time limit was gone after {len(self.seconds)} pairs of calls")
        if told.interrupted is not None and told.interrupted > MOST_INTERRUPTED:
            reasons.append(f"other programs interrupted {told.interrupted:.0%} of the pairs")
        if told.stolen is not None and told.stolen > MOST_STOLEN:
            reasons.append(f"other machines of the host had the core for {told.stolen:.0%} of the time")
        if told.throttled:
            reasons.append(f"the processor slowed itself down {told.throttled:.0f} times")
        if told.curbed:
            reasons.append(
                f"its control group had used up its share of the processor {told.curbed:.0f} times"
            )
        if told.mhz and told.mhz_before and told.mhz < (1 - WIDEST_SLOWDOWN) * told.mhz_before:
            reasons.append(f"the processor's clock fell from {told.mhz_before:.0f} to {told.mhz:.0f} MHz")
        return tuple(reasons)

    def to_json(self) -> str:
        """Every field as one JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """The measurement that `to_json` wrote.

        Raises:
            ValueError: `text` is something else.
        """
        try:
            content: Mapping[str, Any] = json.loads(text)
            fingerprint = dict(content["fingerprint"])
            fingerprint["instructions"] = tuple(fingerprint["instructions"])
            return cls(
                fingerprint=Fingerprint(**fingerprint),
                seconds=tuple(content["seconds"]),
                reference_seconds=tuple(content["reference_seconds"]),
                load_seconds=content["load_seconds"],
                first_seconds=content["first_seconds"],
                conditions=Conditions.of(content.get("conditions", {})),
                elsewhere=Elsewhere(**moved) if (moved := content.get("elsewhere")) else None,
                machine=content.get("machine", ""),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a measurement ({error}): {text[:80]!r}") from None

    def _ratios(self) -> NDArray[np.float64]:
        ratios: NDArray[np.float64] = np.array(self.seconds) / np.array(self.reference_seconds)
        return ratios
