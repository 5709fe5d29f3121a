"""FileProfile: what one file is like on one device: how long it takes, where the time goes, what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.profile.devices import Device
from nestling.profile.kernels import Kernel, MadeUp
from nestling.profile.measurement import Measurement
from nestling.profile.turns import turn

TIMED_RUNS = 50
"""Runs over which the times of nodes are medians, at most."""
ENERGY_SECONDS = 1.0
"""Counters of energy move a thousand times a second or so: this is long beside it."""


@dataclass(frozen=True, slots=True)
class FileProfile:
    """One file on one device."""

    path: Path
    measurement: Measurement
    inputs: tuple[MadeUp, ...]
    """What the file was fed with."""
    joules: Mapping[str, float] = field(default_factory=dict)
    """Of one call, by the name of the counter that tells it; empty where the machine tells nothing."""
    nodes: tuple[Kernel, ...] = ()
    """Every node that the runtime ran, with its time; empty where nobody asked."""

    @property
    def nodes_ms(self) -> float:
        """The times of all nodes together: a run's time less what the runtime spends between them."""
        return sum(node.microseconds or 0.0 for node in self.nodes) / 1e3

    def by_operator(self) -> list[tuple[str, int, float]]:
        """(operator, how many nodes, milliseconds) of every kind of node, dearest first."""
        counts: dict[str, int] = {}
        times: dict[str, float] = {}
        for node in self.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
            times[node.op] = times.get(node.op, 0.0) + (node.microseconds or 0.0) / 1e3
        return sorted(((op, counts[op], times[op]) for op in counts), key=lambda row: -row[2])

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON knows them; raw times are left out."""
        taken = self.measurement
        return {
            "model": str(self.path),
            "device": taken.device,
            "fingerprint": asdict(taken.fingerprint),
            "latency_ms": taken.latency_ms,
            "interval_ms": list(taken.interval_ms),
            "p90_ms": taken.p90_ms,
            "p99_ms": taken.p99_ms,
            "ratio_to_reference": taken.ratio,
            "ratio_interval": list(taken.ratio_interval),
            "runs": len(taken.seconds),
            "load_seconds": taken.load_seconds,
            "first_seconds": taken.first_seconds,
            "inputs": [asdict(given) for given in self.inputs],
            "conditions": asdict(taken.conditions),
            "elsewhere": None if taken.elsewhere is None else asdict(taken.elsewhere),
            "joules": dict(self.joules),
            "unstable": taken.unstable,
            "unstable_because": list(taken.unstable_because),
            "nodes": [asdict(node) for node in self.nodes],
        }


@dataclass(frozen=True, slots=True)
class Refusal:
    """What one device, or what was wanted of it, failed with, in the place of its figures."""

    what: str
    """The files that it was to be told of."""
    device: str
    """The address, as it was given."""
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {"model": self.what, "device": self.device, "refusal": self.reason}


def profile_file(device: Device, path: Path, *, nodes: bool = False) -> FileProfile:
    """What the file is like on the device; with the time of each node where `nodes` says so.

    For each measurement it waits for its turn on this machine.

    Raises:
        DeviceError: no such file, a file that the runtime refuses, or a worker that crashed or hung.
    """
    with turn(device.name):
        measurement = device.measure(path)
    with turn(device.name):
        inputs, joules = device.inputs(path), device.energy(path, seconds=ENERGY_SECONDS)
    timed: tuple[Kernel, ...] = ()
    if nodes:
        with turn(device.name):
            timed = device.kernels(path, runs=TIMED_RUNS)
    return FileProfile(path=path, measurement=measurement, inputs=inputs, joules=joules, nodes=timed)
