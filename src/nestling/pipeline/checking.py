"""Refusing a space that a run could not use, before anything trains."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping

from torch import nn

from nestling.models.building import build_shapes
from nestling.models.families import Family
from nestling.models.meaning import complaints
from nestling.models.probing import RESOLUTION
from nestling.models.siblings import linear_siblings
from nestling.models.soundness import check, smallest_with
from nestling.pipeline.policies import governing, is_precision
from nestling.quant import covers, most_exact
from nestling.space import Arch, Choice, SearchSpace, SpaceError, Value

TRIED_BY_MEANING = ("timm",)
"""Families whose layouts are not all known. Those of our own tables are tried by our tests, and a conversion
follows the channels; for a function of the user's it is a warning, as its norms may count channels."""


def check_space(space: SearchSpace, family: Family) -> None:
    """Refuses a space that lends wrongly; warns where a user's function may.

    Raises:
        SpaceError: the choice and its value are named, and what would do.
    """
    check(space, family.build, layout=family.layout)
    _check_precisions(space, family)
    users = ":" in space.family
    if users or space.family in TRIED_BY_MEANING:
        for told in complaints(space, family.build, layout=family.layout):
            if not users:
                raise SpaceError(told)
            warnings.warn(told, stacklevel=2)


def _check_precisions(space: SearchSpace, family: Family) -> None:
    """Refuses precisions by which one network would have two names, or that part what belongs together."""
    choices = {choice.name: choice for choice in space.choices if is_precision(choice.name)}
    if not choices:
        return
    largest = build_shapes(family.build, space.largest)
    _check_names(choices, family, largest)
    prefixes = governing(family, choices)
    known: dict[Arch, frozenset[str]] = {}

    def decided(arch: Arch) -> frozenset[str]:
        """The choices that decide about some layer with weights of the arch's network."""
        if arch not in known:
            network = build_shapes(family.build, arch)
            deciding = {most_exact(prefixes, layer) for layer in _weighted(network)}
            known[arch] = frozenset(prefixes[prefix] for prefix in deciding if prefix is not None)
        return known[arch]

    for choice in choices.values():
        if choice.name not in decided(space.largest):
            raise SpaceError(f"{choice.name} decides nothing: other choices name all its layers more exactly")
        smallest = smallest_with(space, choice)
        if len(choice.values) > 1 and choice.name not in decided(smallest):
            raise SpaceError(
                f"{choice.name} is the precision of no layer of the network of {smallest.to_json()}, which "
                f"would have several names; {_remedy(space, choice, smallest, decided)}"
            )
    _check_siblings(space, choices, prefixes, largest)


def _check_names(choices: Mapping[str, Choice], family: Family, largest: nn.Module) -> None:
    layers = [name for name, _ in largest.named_modules() if name]
    weighted = _weighted(largest)
    for choice in choices:
        stage = choice.removesuffix(".precision")
        if not any(covers(prefix, layer) for prefix in family.layers(stage) for layer in weighted):
            near = difflib.get_close_matches(stage, [*{n.split(".")[0] for n in layers}, *layers], n=1)
            hint = f"did you mean {near[0]}.precision?" if near else f"its layers begin with {layers[0]}"
            raise SpaceError(
                f"{choice} is the precision of no layer of the largest network that has weights; {hint}"
            )


def _weighted(network: nn.Module) -> list[str]:
    """The names of the layers that have a matrix or a kernel of their own."""
    return [
        name
        for name, module in network.named_modules()
        if name and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ]


def _remedy(space: SearchSpace, choice: Choice, arch: Arch, decided: Callable[[Arch], frozenset[str]]) -> str:
    """What to do about a choice that decides nothing in `arch`: the end of a sentence."""
    for other in space.open_choices:
        now = arch[other.name]
        for value in other.values:
            grown = isinstance(value, int) and isinstance(now, int) and value > now
            if grown and choice.name in decided(space.canonical({**arch, other.name: value})):
                return f'give the choice needs = [{{ choice = "{other.name}", at_least = {value} }}]'
    return "give the choice `needs`, or make it constant"


def _check_siblings(
    space: SearchSpace, choices: Mapping[str, Choice], prefixes: Mapping[str, str], largest: nn.Module
) -> None:
    """Refuses linear layers that read one tensor, such as queries, keys and values, in several precisions.

    A runtime may compute them as one, and quantizes what they read once.
    """

    def told(layer: str) -> str | tuple[Value, ...]:
        prefix = most_exact(prefixes, layer)
        choice = None if prefix is None else choices[prefixes[prefix]]
        values = ("fp32",) if choice is None else choice.values
        return values if choice is None or len(values) == 1 else choice.name

    resolution = space.largest.integer("resolution") if "resolution" in space.by_name else RESOLUTION
    for group in linear_siblings(largest, resolution):
        other = next((layer for layer in group if told(layer) != told(group[0])), None)
        if other is not None:
            parents, names = zip(*(layer.rpartition(".")[::2] for layer in group), strict=True)
            both = f"{parents[0]}.{'|'.join(names)}" if len(set(parents)) == 1 else None
            hint = f"their choice may be named {both + '.precision'!r}" if both else "name what holds both"
            raise SpaceError(
                f"{', '.join(group)} read the same numbers, so one choice decides about all of them, but "
                f"{group[0]} is {_said(told(group[0]))} and {other} is {_said(told(other))}; {hint}"
            )


def _said(decided: str | tuple[Value, ...]) -> str:
    return f"decided by {decided}" if isinstance(decided, str) else f"always {decided[0]}"
