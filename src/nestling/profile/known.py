"""DeviceSummary: a device that this machine has, or that measurements were taken on, and how noisy it was."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nestling.profile.comparison import ROUNDS, compare_files
from nestling.profile.devices import connect
from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.reference import reference_model
from nestling.profile.store import MeasurementStore
from nestling.profile.transport import DeviceError, DevicesGoneError
from nestling.profile.transport_local import LocalProcess
from nestling.profile.worker import PROVIDERS
from nestling.profile.worker_device import START_SECONDS


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """What is known of one device."""

    address: str
    fingerprint: Fingerprint | None
    """None where it could not be used."""
    source: str
    """`here` for a runtime of this machine, else the store that holds measurements of the device."""
    refusal: str = ""
    """Why it cannot be used, or its noise cannot be told, where it is here."""
    measurements: int = 0
    """In the store."""
    interval: float | None = None
    """The median of their intervals: half of one, as a part of the ratio."""
    reference_spread: float | None = None
    """The standard deviation of the reference model's time over them, as a part of its mean."""
    aa_spread: float | None = None
    """The standard deviation of the ratio of the reference model to itself over fresh workers."""

    def to_json(self) -> dict[str, Any]:
        """The fields, and the fingerprint's key."""
        key = None if self.fingerprint is None else self.fingerprint.key
        return {**asdict(self), "fingerprint_key": key}


def devices_here() -> list[DeviceSummary]:
    """Every runtime that is installed on this machine, each tried with the reference model.

    Raises:
        DeviceError: no worker can be started.
    """
    found = []
    for address in addresses_here():
        try:
            with connect(address) as device:
                found.append(DeviceSummary(address, device.fingerprint, "here"))
        except DeviceError as error:
            found.append(DeviceSummary(address, None, "here", refusal=str(error)))
    return found


def addresses_here() -> list[str]:
    """The addresses of the runtimes that are installed beside this program.

    Raises:
        DeviceError: no worker can be started.
    """
    transport = LocalProcess()
    transport.start()
    try:
        request = {"verb": "runtimes", "limit_seconds": START_SECONDS}
        told = transport.exchange(request, b"", timeout_seconds=START_SECONDS).message
    finally:
        transport.stop()
    if "refused" in told:
        raise DeviceError(f"this machine's runtimes cannot be told: {told['refused']}")
    targets = {provider: target for target, provider in PROVIDERS.items()}
    addresses = [f"ort:{targets[name]}" for name in told["providers"] if name in targets]
    if "openvino" in told["versions"]:
        addresses.append("openvino:cpu")
    if "torch" in told["versions"] and told["nvidia"]:
        addresses.append("torch:cuda")
    return sorted(set(addresses))


def devices_in(store: Path) -> list[DeviceSummary]:
    """The devices of which the store holds measurements, unstable ones included: they tell of noise.

    Raises:
        StoreError: no store, or one that cannot be read.
    """
    by_key: dict[str, list[Measurement]] = {}
    known = MeasurementStore(store)
    for measurement in (*known.all(), *known.unstable()):
        by_key.setdefault(measurement.fingerprint.key, []).append(measurement)
    return [_summary(taken, str(store)) for taken in by_key.values()]


def with_aa_spread(summary: DeviceSummary, *, rounds: int = ROUNDS) -> DeviceSummary:
    """The summary with the spread of the reference model's ratio to itself, measured now.

    Where the device cannot be reached, or fails, the summary has that as its refusal.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, connect(summary.address) as device:
            same = Path(folder) / "reference.onnx"
            same.write_bytes(reference_model())
            compared = compare_files(device, same, same, rounds=rounds)
    except (DeviceError, DevicesGoneError) as error:
        return replace(summary, refusal=str(error))
    return replace(summary, aa_spread=statistics.stdev(compared.speedups))


def _summary(taken: Iterable[Measurement], source: str) -> DeviceSummary:
    measurements = list(taken)
    halves = [(high - low) / 2 / one.ratio for one in measurements for low, high in [one.ratio_interval]]
    references = [statistics.median(one.reference_seconds) for one in measurements]
    several = len(references) > 1
    return DeviceSummary(
        measurements[0].device,
        measurements[0].fingerprint,
        source,
        measurements=len(measurements),
        interval=statistics.median(halves),
        reference_spread=statistics.stdev(references) / statistics.mean(references) if several else None,
    )
