"""Looking things up: a space's size, extremes and axes, spaces of timm's models, an arch by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestling.models.building import build_shapes
from nestling.models.convert import convert_timm
from nestling.models.cost import cost
from nestling.models.families import Family, family
from nestling.models.probing import RESOLUTION, Axes, probe
from nestling.models.proposals import native_resolution, propose
from nestling.pipeline.checking import check_space
from nestling.pipeline.studies import searched
from nestling.pipeline.workbench import Workbench
from nestling.space import Arch, SearchSpace, SpaceError, Value, load_space, space_toml


def space_summary(path: Path, *, classes: int, resolution: int | None = None) -> dict[str, Any]:
    """The size of the space in the file `path`, its choices, and the cost of its smallest and largest arch.

    `classes` and `resolution` stand in for what the space leaves to the data.

    Raises:
        SpaceError: the file is no space, its networks cannot be built, or it lends wrongly.
    """
    with _space(path, classes=classes, resolution=resolution) as (space, its):
        check_space(space, its)
        costs = {}
        for name, arch in (("smallest", space.smallest), ("largest", space.largest)):
            side = arch.integer("resolution")
            costs[name] = {"resolution": side, **asdict(cost(build_shapes(its.build, arch), side))}
        return {
            "family": space.family,
            "size": space.size,
            "choices": {choice.name: list(choice.values) for choice in space.choices},
            **costs,
        }


def space_axes(path: Path, *, classes: int, resolution: int | None = None) -> Axes:
    """Which axes of which tensors each choice of the space in the file `path` governs.

    Raises:
        SpaceError: the file is no space, its networks cannot be built, or it lends wrongly.
    """
    with _space(path, classes=classes, resolution=resolution) as (space, its):
        check_space(space, its)
        return probe(space, its.build)


def propose_space(model: str, *, classes: int, resolution: int | None = None) -> str:
    """A space file of timm's `model`: its elastic arguments, their effect on cost, and why others are not.

    Raises:
        SpaceError: no such model, or it does not run at that resolution.
    """
    try:
        return propose(model, classes=classes, resolution=resolution).to_toml()
    except ValueError as error:
        raise SpaceError(str(error)) from error


def convert_space(model: str, *, classes: int, resolution: int | None = None) -> str:
    """A space file of the channels and blocks of timm's `model`, in comments which layers became elastic.

    Raises:
        SpaceError: no such model, or it does not turn such images into logits.
    """
    try:
        side = resolution or native_resolution(model)
        conversion = convert_timm(model, classes=classes, resolution=side)
    except ValueError as error:
        raise SpaceError(str(error)) from error
    told = [f"The channels and blocks of timm's {model} that can be fewer.", "", str(conversion.coverage)]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in "\n".join(told).splitlines())
    return comment + space_toml(conversion.space)


@contextmanager
def _space(path: Path, *, classes: int, resolution: int | None) -> Iterator[tuple[SearchSpace, Family]]:
    """The space in the file `path` and its family; what goes wrong with them names the file."""
    space = load_space(path)
    left: dict[str, Value] = {"classes": classes, "resolution": resolution or RESOLUTION}
    space = space.with_constants({name: v for name, v in left.items() if name not in space.by_name})
    try:
        yield space, family(space.family)
    except (ValueError, KeyError, TypeError) as error:
        # a KeyError shows what it was given in quotes
        raise SpaceError(f"{path}: {error.args[0] if isinstance(error, KeyError) else error}") from error


def find_arch(bench: Workbench, name: str) -> Arch:
    """The arch that `name` means.

    It is `smallest`, `largest`, the key of a trial or of a network that was evaluated, the name of an
    exported network such as `03-9e7cfc498c6a`, decisions as JSON, or a file of such.

    Raises:
        SpaceError: none of these, or decisions that are not of the run's space.
    """
    if name in ("smallest", "largest"):
        return bench.space.smallest if name == "smallest" else bench.space.largest
    if name.lstrip().startswith("{"):
        return _decided(bench, name, told="the JSON that was given")
    if Path(name).is_file():
        return _decided(bench, Path(name).read_text(), told=name)
    for trial in searched(bench).trials:
        if trial.arch.key == name:
            return trial.arch
    if Path(name).name == name:  # no way out of the run's folder
        for file in (f"exports/{name}/card.json", f"evaluation/{name}.json"):
            known = bench.run.read_json(file)
            if known is not None:
                return bench.space.canonical(known["decisions"])
    raise SpaceError(
        f"no arch {name!r} in {bench.run.folder}: give smallest, largest, a trial's key (`nestling report` "
        "lists them), an exported network's name, or decisions as JSON or in a JSON file"
    )


def _decided(bench: Workbench, text: str, *, told: str) -> Arch:
    """The arch of the decisions that `text` holds as JSON."""
    try:
        return bench.space.canonical(Arch.from_json(text))
    except ValueError as error:
        raise SpaceError(f"{told}: {error}") from error
