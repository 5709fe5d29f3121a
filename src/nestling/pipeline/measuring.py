"""What a device makes of a file: how accurate it is there, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nestling.data import EvalImages
from nestling.profile import Device, DeviceError, Measurement
from nestling.profile.turns import turn
from nestling.profile.worker import SLOWED
from nestling.search import EvaluationFailed
from nestling.train.evaluate import Accuracy

SCORED_BATCH = 512
"""Images that the device's runtime is given at a time; each has the whole time limit."""
HELD_BYTES = 2**28
"""Images of one resolution that the runtime keeps, so that the next candidate finds them there."""
PAUSES = (0.0, 3.0)
"""Seconds before an unstable measurement is taken again, and again: what made it so may have passed."""


def score(
    device: Device, path: Path, images: EvalImages, *, resolution: int, part_of: int | None = None
) -> Accuracy:
    """The accuracy of the file at `path`, run by the device's runtime.

    Args:
        device: where.
        path: the file.
        images: what it is scored on.
        resolution: of its images, in pixels.
        part_of: how many images there are, where these are some of them.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
        DevicesGoneError: the device cannot be used any more.
    """
    correct = 0
    held = (part_of or len(images)) * 12 * resolution**2 <= HELD_BYTES
    try:
        for number, batch in enumerate(images.at(resolution, batch_size=SCORED_BATCH)):
            key = f"{images.key}@{resolution}/{number}" if held else None
            logits = device.predict(path, batch.images.numpy(), key=key)
            correct += int((logits.argmax(axis=1) == batch.labels.numpy()).sum())
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error
    return Accuracy(correct, len(images))


def measure(
    device: Device,
    path: Path,
    *,
    pauses: Sequence[float] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> Measurement:
    """The latency of the file at `path`; an unstable measurement is taken again, later each time.

    One that is unstable as others slow the device all the time is not: timing has waited for them already. A
    search goes on meanwhile, times the members of its front once more when it ends, and flags the others.
    Where all are unstable, the one from when the device was least slowed, as others change the ratio, and of
    those from when it was not the one whose ratio has the narrowest interval: it is still flagged. Of the
    processes of this machine one at a time measures on it; who shares a pool's leases, on each board.

    Args:
        device: where.
        path: the file.
        pauses: seconds before each further measurement.
        sleep: waits for so many seconds.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
        DevicesGoneError: the device cannot be used any more.
    """
    try:
        taken = [_measured(device, path)]
        for pause in pauses:
            if not taken[-1].unstable or taken[-1].slowness > SLOWED:
                break
            sleep(pause)
            taken.append(_measured(device, path))
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error
    return taken[-1] if not taken[-1].unstable else min(taken, key=_doubt)


def _measured(device: Device, path: Path) -> Measurement:
    with turn(device.name, tell=None):  # workers of a search wait for each other all the time
        return device.measure(path)


def _doubt(measurement: Measurement) -> tuple[float, float]:
    """How much slower the device was than at its best, where that matters, and how wide the interval is."""
    low, high = measurement.ratio_interval
    slowed = measurement.slowness
    return (slowed if slowed > SLOWED else 1.0, (high - low) / measurement.ratio)


def latency_metrics(measurement: Measurement, *, reference_ms: float) -> dict[str, float]:
    """Latency as a search weighs it.

    It is the ratio to the device's reference model times that model's milliseconds, one figure for the run:
    ratios repeat better than plain medians, and a front needs latencies that can be compared. The record of
    the search tells which of them were unstable to the last: `latency_unstable` is 1 for those; and what the
    reference model takes on the device at its best, as far as that was known then.
    """
    return {
        "latency_ms": measurement.ratio * reference_ms,
        "latency_ratio": measurement.ratio,
        "latency_unstable": float(measurement.unstable),
        "reference_ms": measurement.reference_ms,
    }
