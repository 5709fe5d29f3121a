"""Families by name: what a space file's `family` may say."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from nestling.models import mobilenet
from nestling.models.building import Build
from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Family:
    """How networks of one kind are built, which of their layers a stage is, and how they are made without us.

    Attributes:
        build: the plain network of an arch.
        layers: for a stage (`stem`, `s1`, `head`), the prefixes of its layers' names in that network.
        rebuild: Python source that defines `network`, the arch's network, with timm and torch alone.
    """

    build: Build
    layers: Callable[[str], tuple[str, ...]]
    rebuild: Callable[[Arch], str]


FAMILIES = {"mobilenet": Family(mobilenet.build, mobilenet.layers, mobilenet.rebuild)}


def family(name: str) -> Family:
    """The family called `name`.

    Raises:
        ValueError: no such family; the nearest one is named.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FAMILIES)}"
        raise ValueError(f"no family {name!r}; {hint}")
    return FAMILIES[name]
