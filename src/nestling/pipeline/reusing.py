"""What a run of the same supernet for another device has found out: accuracy and size need not be had again.

Accuracy is that of weights, images and precisions, and the same wherever a file runs; latency is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import is_precision
from nestling.pipeline.studies import REFERENCE, searched, weights
from nestling.pipeline.workbench import Workbench
from nestling.run import Run, RunError
from nestling.search import Metrics, SearchResult
from nestling.space import Arch, SearchSpace, SpaceError, load_space

KEPT = "reused.json"
"""The run's file of what was taken over, for workers on machines that do not see the other run."""
OF_A_FILE = ("top1", "top1_images", "size_mb", "mmacs", "peak_mb")
"""What a file has on every device."""


@dataclass(frozen=True, slots=True)
class Reused:
    """What another run has found out of archs of this one's space.

    Attributes:
        metrics: `OF_A_FILE`, of each arch that was scored on all images.
        front: those of them that are on the other run's front.
    """

    metrics: Mapping[Arch, Metrics]
    front: tuple[Arch, ...] = ()


def reused(bench: Workbench, *, listener: Listener) -> Reused:
    """What the run `search.warm_from` has found out; nothing where none is named.

    Precisions that only one of the two devices can use are no obstacle: archs that have them are passed over.
    So are quantized ones where 8-bit sums of only one device saturate, as weights then differ.

    Raises:
        RunError: no such run, one that was not searched, or one whose candidates are other networks; what
            differs is named.
        StudyMismatch, StudyUnavailable: its study cannot be read.
    """
    named = bench.config.search.warm_from
    if named is None:
        return Reused({})
    kept = _kept(bench, named)
    if kept is not None:
        return Reused(
            {Arch.from_json(row["arch"]): row["metrics"] for row in kept},
            tuple(Arch.from_json(row["arch"]) for row in kept if row["on_front"]),
        )
    other = Workbench(Run.open(Path(named)))
    try:
        result = _searched(bench, other)
        same = _same_integers(bench, other)
        found: dict[Arch, Metrics] = {}
        front = []
        best = {trial.arch for trial in result.front}
        for trial in result.complete:
            if trial.is_partial or not (same or _in_floats(bench, trial.arch)):
                continue
            try:
                arch = bench.space.canonical(trial.arch)
            except SpaceError:  # a precision that this device cannot use
                continue
            found[arch] = {name: trial.metrics[name] for name in OF_A_FILE if name in trial.metrics}
            if trial.arch in best:
                front.append(arch)
    finally:
        other.close()
    rows = [
        {"arch": arch.to_json(), "metrics": metrics, "on_front": arch in front}
        for arch, metrics in found.items()
    ]
    bench.run.write_json(KEPT, {"from": named, "candidates": rows})
    listener.note(
        f"accuracy and size of {len(found)} candidates of {named} are taken over, of {len(result.complete)} "
        "that were evaluated there"
    )
    return Reused(found, tuple(front))


def check_reused(bench: Workbench) -> None:
    """Refuses a run `search.warm_from` of which nothing can be taken over.

    Raises:
        Exception: as `reused`.
    """
    named = bench.config.search.warm_from
    if named is not None and _kept(bench, named) is None:
        _searched(bench, Workbench(Run.open(Path(named))))


def _kept(bench: Workbench, named: str) -> list[Any] | None:
    """The rows that were taken over from the run `named`, where that is not seen from here."""
    kept = bench.run.read_json(KEPT)
    known = kept is not None and kept["from"] == named and not Path(named).exists()
    return list(kept["candidates"]) if known else None


def _searched(bench: Workbench, other: Workbench) -> SearchResult:
    """What `other` has found out, whose candidates are those of `bench`.

    Raises:
        Exception: as `reused`.
    """
    _refuse_different(bench, other)
    other.data = bench.data  # the same, and read already
    result = searched(other)
    if not result.complete:
        there = other.run.folder
        raise RunError(f"{there} was not searched yet; `nestling search {there}` does that")
    return result


def _refuse_different(bench: Workbench, other: Workbench) -> None:
    """Refuses a run whose candidates are other networks, or were scored otherwise.

    Raises:
        RunError: see there.
    """
    here, there = bench.run.folder, other.run.folder
    if here.resolve() == there.resolve():
        raise RunError(f"{here} cannot begin with its own candidates; it continues by itself, without --from")
    other.check_trained()
    mine, its = bench.config, other.config
    images = (other.run.read_json("data.json") or {}).get("fingerprint")
    differing = {
        "the space (but for its precisions)": but_for_precisions(load_space(bench.run.space_file))
        != but_for_precisions(load_space(other.run.space_file)),
        "the supernet's weights": weights(bench) != weights(other),
        "the images, or how they are split": images != bench.data.fingerprint,
        "[quant]": mine.quant != its.quant,
        "search.recalibration_images": mine.search.recalibration_images != its.search.recalibration_images,
        "search.calibration_images": mine.search.calibration_images != its.search.calibration_images,
    }
    told = [name for name, differs in differing.items() if differs]
    if told:
        raise RunError(
            f"the candidates of {there} are not those of {here}: the runs differ in {', '.join(told)}. "
            f"`nestling search NEW --from {there} --set profile.device=...` begins a run with its supernet"
        )


def but_for_precisions(space: SearchSpace) -> tuple[object, ...]:
    """What two spaces have in common whose networks have the same weights."""
    return (space.family, tuple(choice for choice in space.choices if not is_precision(choice.name)))


def _same_integers(bench: Workbench, other: Workbench) -> bool:
    """Whether weights have as many bits on both devices, see `Fingerprint.int8_saturates`."""
    reference = other.run.read_json(REFERENCE)
    if reference is None:  # nothing was timed there, and what its device does is not known
        return False
    saturates: bool = reference["fingerprint"]["int8_saturates"]
    return saturates == bench.device.fingerprint.int8_saturates


def _in_floats(bench: Workbench, arch: Arch) -> bool:
    chosen = {value for name, value in arch.items() if is_precision(name)}
    return chosen | set(bench.config.quant.keep.values()) <= {"fp32"}
