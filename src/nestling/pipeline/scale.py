"""What a ratio to the reference model is in milliseconds, for all candidates of a run alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nestling.pipeline.listening import Listener
from nestling.pipeline.studies import REFERENCE, Place, problem
from nestling.pipeline.workbench import Workbench
from nestling.profile import Measurement
from nestling.profile.worker import SLOWED
from nestling.run import RunError
from nestling.search import SearchResult, agree, amend, correct_trial, load_result

_SETTINGS = re.compile(r" \(settings \d+\)")
"""What the worker says of its settings in the name of a runtime."""


def run_reference(bench: Workbench, place: Place, measurement: Measurement) -> dict[str, Any]:
    """The reference model on the run's device, as the first measurement of all processes found it.

    Other settings of the same runtime are no other device: a run that began with them goes on.

    Raises:
        RunError: the run was measured on another device or runtime.
    """
    fingerprint = measurement.fingerprint
    here = {
        "key": fingerprint.key,
        "latency_ms": measurement.reference_ms,
        "fingerprint": asdict(fingerprint),
    }
    mine = json.dumps(bench.run.read_json(REFERENCE) or here)
    known: dict[str, Any] = json.loads(
        agree(problem(bench), "reference", mine, storage=place.storage, name=place.name)
    )
    if not same_device(known["fingerprint"], asdict(fingerprint)):
        raise RunError(
            f"{bench.run.folder} was measured on another device or runtime ({known['fingerprint']}) than "
            f"this one ({fingerprint}); their latencies do not compare: search in a new run"
        )
    if bench.run.read_json(REFERENCE) != known:
        bench.run.write_json(REFERENCE, known)
    return known


def other_settings(bench: Workbench, reference: Mapping[str, Any], taken: Measurement) -> str | None:
    """What there is to say where candidates of before were timed with other settings of the runtime."""
    if reference["key"] == taken.fingerprint.key:
        return None
    return (
        "candidates of before were timed with other settings of the runtime "
        f"({reference['fingerprint']['runtime']}) than those of now ({taken.fingerprint.runtime}), by which "
        f"files in some precisions run otherwise; `nestling search NEW --from {bench.run.folder}` times all "
        "alike"
    )


def rescaled(bench: Workbench, place: Place, result: SearchResult, listener: Listener) -> SearchResult:
    """The result, its milliseconds those of the device at its best.

    What the reference model takes is settled by the first measurement, and that may be from when others
    slowed the device and its best was not known. Ratios hold whatever it takes; of a pool, milliseconds are
    those of the fastest board then. Killed in between, it goes on when it is called again.
    """
    reference: dict[str, Any] | None = bench.run.read_json(REFERENCE)
    timed = [
        trial for trial in result.trials if trial.state == "complete" and "latency_ratio" in trial.metrics
    ]
    if reference is None or not timed:
        return result
    asked = problem(bench)
    known = agree(asked, "reference", json.dumps(reference), storage=place.storage, name=place.name)
    settled = json.loads(known)
    # of unstable ones too: nothing makes a device faster than its best
    best = min(trial.metrics.get("reference_ms", math.inf) for trial in timed)
    if best < settled["latency_ms"] / SLOWED:
        told = json.dumps({**settled, "latency_ms": best})
        settled = json.loads(
            amend(asked, "reference", told, before=known, storage=place.storage, name=place.name)
        )
        listener.note(
            f"the reference model takes {best:.4g} ms on this device at its best, and not "
            f"{reference['latency_ms']:.4g} as when the search began: all latencies are told anew"
        )
    changed = False
    for trial in timed:
        latency_ms = trial.metrics["latency_ratio"] * settled["latency_ms"]
        if not math.isclose(trial.metrics["latency_ms"], latency_ms, rel_tol=1e-9):
            correct_trial(asked, trial, {"latency_ms": latency_ms}, storage=place.storage, name=place.name)
            changed = True
    if settled != reference:
        bench.run.write_json(REFERENCE, settled)
    return load_result(asked, storage=place.storage, name=place.name) if changed else result


def same_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints, as fields, differ at most in the worker's settings of the runtime."""
    return _comparable(one) == _comparable(other)


def without_settings(told: str) -> str:
    """`told`, the name of a runtime or what has it in it, without the worker's settings of it."""
    return _SETTINGS.sub("", told)


def _comparable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `fingerprint` in the types of JSON, its runtime without settings."""
    told: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return told | {"runtime": without_settings(told["runtime"])}
