"""What each choice of a space does to its networks, found by building them and looking."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.models.building import Build
from nestling.models.looking import cost_of, differing_settings, look_at, same_images
from nestling.space import SearchSpace, Value

Axis = tuple[str, int]
"""A tensor's name in the network's state, and one of its axes."""

RESOLUTION = 224
"""Side in pixels of the images with which a network is tried where its arch does not tell."""
_GOVERNED_WIDTH = 80


@dataclass(frozen=True, slots=True)
class ChoiceAxes:
    """What becomes of the largest network where one choice is a step smaller.

    Attributes:
        choice: its name.
        values: its values, cheapest first.
        axes: the axes that become shorter.
        vanishing: the layers that are not there any more.
        settings: where no tensor changes, what does: `conv_stem.stride`.
        macs: multiply-accumulates that are left, as a fraction of the largest network's.
        params: parameters that are left, as a fraction.
    """

    choice: str
    values: tuple[Value, ...]
    axes: tuple[Axis, ...]
    vanishing: tuple[str, ...]
    settings: tuple[str, ...]
    macs: float
    params: float


@dataclass(frozen=True, slots=True)
class Axes:
    """What each open choice of a space governs; as text, a table.

    Attributes:
        choices: a row for each open choice, in the space's order.
        tensors: the shapes of the largest network's tensors, by name.
        layers: the names of its layers.
    """

    choices: tuple[ChoiceAxes, ...]
    tensors: Mapping[str, tuple[int, ...]]
    layers: tuple[str, ...]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """For each choice: name, values, change of multiply-accumulates, layers that vanish, what it governs.

        Names that differ in numbers alone are one pattern: `blocks.2.*.conv_pw.weight[0]` stands for all
        blocks that there are, `blocks.2.{1,3}.bn1.*[0]` for all tensors of the norms of two of them.
        """
        rows = []
        for row in self.choices:
            governed = self._governed(row)
            if not governed and not row.vanishing:
                keys = {name.rpartition(".")[2] for name in row.settings}
                universe = [f"{layer}.{key}" for layer in self.layers for key in keys]
                governed = [f"{name} (no tensor)" for name in patterns(row.settings, universe)]
            rows.append(
                (
                    row.choice,
                    ", ".join(map(str, row.values)),
                    f"{row.macs - 1:+.1%}",
                    " ".join(patterns(row.vanishing, self.layers)) or "-",
                    " ".join(governed) or "-",
                )
            )
        return rows

    def _governed(self, row: ChoiceAxes) -> list[str]:
        """The row's axes as patterns, those of one tensor and those of one layer drawn together."""
        by_tensor: dict[str, list[int]] = {}
        for name, axis in row.axes:
            by_tensor.setdefault(name, []).append(axis)
        by_layer: dict[str, list[str]] = {}
        for name, shape in self.tensors.items():
            if shape:  # the count of batches that a norm keeps has no axis
                by_layer.setdefault(name.rpartition(".")[0], []).append(name)
        words, layers = [], set()
        for name, axes in by_tensor.items():
            layer = name.rpartition(".")[0]
            if len(by_layer[layer]) > 1 and all(by_tensor.get(other) == [0] for other in by_layer[layer]):
                if layer not in layers:
                    words.append(f"{layer}.*[0]")
                layers.add(layer)
            else:
                words.append(f"{name}[{','.join(map(str, axes))}]")
        labels = {f"[{word.rpartition('[')[2]}" for word in words}
        return patterns(
            words,
            [
                *(f"{name}{label}" for name in self.tensors for label in labels),
                *(f"{layer}.*[0]" for layer in by_layer),
            ],
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain values, every axis spelled out as `name[axis]`."""
        return [
            {
                "choice": row.choice,
                "values": list(row.values),
                "axes": [f"{name}[{axis}]" for name, axis in row.axes],
                "vanishing": list(row.vanishing),
                "settings": list(row.settings),
                "macs": row.macs,
                "params": row.params,
            }
            for row in self.choices
        ]

    def __str__(self) -> str:
        table = [("choice", "values", "MACs", "layers that vanish", "governs"), *self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = []
        for *cells, governed in table:
            start = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            wrapped = textwrap.wrap(governed, _GOVERNED_WIDTH, break_long_words=False, break_on_hyphens=False)
            lines.append(f"{start}  {wrapped[0]}")
            lines += [" " * (len(start) + 2) + line for line in wrapped[1:]]
        return "\n".join(lines)


def probe(space: SearchSpace, build: Build, *, resolution: int = RESOLUTION) -> Axes:
    """What each open choice of `space` governs: the largest network against one a step smaller in it.

    Args:
        space: the choices.
        build: makes the plain network of an arch.
        resolution: side of the images in pixels, where the space has no `resolution`.

    Raises:
        SpaceError: a network cannot be built, or does not run.
    """
    large = look_at(build, space.largest)
    large_cost = cost_of(large, resolution)
    rows = []
    for choice in space.open_choices:
        small = look_at(build, space.canonical({**space.largest, choice.name: choice.values[-2]}))
        axes = [
            (name, axis)
            for name, shape in large.shapes.items()
            if name in small.shapes
            for axis in range(len(shape))
            if len(small.shapes[name]) == len(shape) and small.shapes[name][axis] != shape[axis]
        ]
        gone = [
            name
            for name in large.settings
            if name not in small.settings and name.rpartition(".")[0] in small.settings
        ]
        settings = [] if axes or gone else differing_settings(large, small)
        small_cost = (
            large_cost if large.is_like(small) and same_images(large, small) else cost_of(small, resolution)
        )
        rows.append(
            ChoiceAxes(
                choice.name, choice.values, tuple(axes), tuple(gone), tuple(settings),
                macs=small_cost.macs / max(large_cost.macs, 1),
                params=small_cost.params / max(large_cost.params, 1),
            )
        )  # fmt: skip
    return Axes(tuple(rows), large.shapes, tuple(large.settings))


def patterns(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """`names` in fewer words: those that differ in the numbers between dots alone become one.

    `*` stands for every number that `universe` has there, `{1,3}` for these.
    """
    wanted: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    there: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for names_of, by_template in ((names, wanted), (universe, there)):
        for name in names_of:
            parts = name.split(".")
            template = tuple("#" if part.isdigit() else part for part in parts)
            by_template.setdefault(template, []).append(tuple(int(part) for part in parts if part.isdigit()))
    found = []
    for template, numbers in wanted.items():
        for fold in _fold(numbers, there.get(template, numbers)):
            rest = iter(fold)
            found.append(".".join(next(rest) if part == "#" else part for part in template))
    return found


def _fold(numbers: Iterable[tuple[int, ...]], universe: Iterable[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Tuples of numbers as tuples of words that each stand for one number or several."""
    if not all(numbers):
        return [()]
    inside: dict[int, list[tuple[int, ...]]] = {}
    around: dict[int, list[tuple[int, ...]]] = {}
    for tuples, by_first in ((numbers, inside), (universe, around)):
        for first, *rest in tuples:
            by_first.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for first, rests in inside.items():
        alike.setdefault(tuple(_fold(rests, around.get(first, rests))), []).append(first)
    folded = []
    for endings, firsts in alike.items():
        every = set(firsts) == set(around)
        listed = str(firsts[0]) if len(firsts) == 1 else "{" + ",".join(map(str, sorted(firsts))) + "}"
        folded += [("*" if every else listed, *ending) for ending in endings]
    return folded
