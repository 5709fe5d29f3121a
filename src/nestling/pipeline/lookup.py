"""Looking things up: a space's size and extremes, an arch by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import family
from nestling.pipeline.stages import STUDY, problem
from nestling.pipeline.workbench import Workbench
from nestling.search import load_result
from nestling.space import Arch, SearchSpace, SpaceError, load_space


def space_summary(path: Path, *, classes: int, resolution: int) -> dict[str, Any]:
    """The size of the space in the file `path`, its choices, and the cost of its smallest and largest arch.

    `classes` and `resolution` stand in for what the space leaves to the data.

    Raises:
        SpaceError: the file is no space, or its networks cannot be built.
    """
    space = load_space(path)
    try:
        return _summary(space, classes=classes, resolution=resolution)
    except (ValueError, KeyError, TypeError) as error:
        raise SpaceError(f"{path}: {error}") from error


def _summary(space: SearchSpace, *, classes: int, resolution: int) -> dict[str, Any]:
    if "classes" not in {choice.name for choice in space.choices}:
        space = space.with_constants({"classes": classes})
    build = family(space.family).build
    costs = {}
    for name, arch in (("smallest", space.smallest), ("largest", space.largest)):
        side = arch.integer("resolution") if "resolution" in arch else resolution
        found = cost(build_shapes(build, arch), side)
        costs[name] = {
            "resolution": side,
            "macs": found.macs,
            "params": found.params,
            "activation_bytes": found.activation_bytes,
            "peak_bytes": found.peak_bytes,
        }
    return {
        "family": space.family,
        "size": space.size,
        "choices": {choice.name: list(choice.values) for choice in space.choices},
        **costs,
    }


def find_arch(bench: Workbench, name: str) -> Arch:
    """The arch that `name` means: `smallest`, `largest`, the key of a trial, or a JSON file of decisions.

    Raises:
        SpaceError: none of these, or decisions that are not of the run's space.
    """
    if name in ("smallest", "largest"):
        return bench.space.smallest if name == "smallest" else bench.space.largest
    if Path(name).is_file():
        try:
            return bench.space.canonical(Arch.from_json(Path(name).read_text()))
        except ValueError as error:
            raise SpaceError(f"{name}: {error}") from error
    found = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
    for trial in found.trials:
        if trial.arch.key == name:
            return trial.arch
    raise SpaceError(
        f"no arch {name!r} in {bench.run.folder}: give smallest, largest, a trial's key (`nestling report` "
        "lists them), or a JSON file of decisions"
    )
