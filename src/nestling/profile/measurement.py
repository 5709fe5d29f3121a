"""Measurement: what a device took to run one file, raw times kept; Fingerprint: what the device was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestling.profile.worker import median_interval

WIDEST_INTERVAL = 0.05
"""A 95 % interval of the ratio that is wider than this fraction of it makes a measurement unstable."""
WIDEST_DRIFT = 0.10
"""So does a reference model that was slower in one half of the run than in the other by more than this."""


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
    """The runtime with its version: `onnxruntime 1.31.1`."""
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
    def ratio(self) -> float:
        """The median, over pairs of neighbours, of the file's time divided by the reference model's."""
        return float(np.median(self._ratios()))

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """The 95 % interval of `ratio`, from order statistics: it supposes no distribution."""
        low, _, high = median_interval(self._ratios())
        return low, high

    @property
    def p90_ms(self) -> float:
        """The time that nine calls in ten stayed within."""
        return float(np.quantile(self.seconds, 0.90, method="higher")) * 1e3

    @property
    def p99_ms(self) -> float:
        """The time that 99 calls in 100 stayed within."""
        return float(np.quantile(self.seconds, 0.99, method="higher")) * 1e3

    @property
    def unstable(self) -> bool:
        """Whether the machine was too restless for the figures to be relied on."""
        low, high = self.ratio_interval
        if high - low > WIDEST_INTERVAL * self.ratio:
            return True
        half = len(self.reference_seconds) // 2
        if half == 0:
            return True
        before, after = np.median(self.reference_seconds[:half]), np.median(self.reference_seconds[half:])
        return bool(max(before, after) > (1 + WIDEST_DRIFT) * min(before, after))

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
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a measurement ({error}): {text[:80]!r}") from None

    def _ratios(self) -> NDArray[np.float64]:
        ratios: NDArray[np.float64] = np.array(self.seconds) / np.array(self.reference_seconds)
        return ratios
