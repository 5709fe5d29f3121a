"""Families by name: what a space file's `family` may say."""

from __future__ import annotations

import copy
import difflib
import pkgutil
import pprint
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nestling.models import convert, convnext, mobilenet, resnet, timm_family, vit
from nestling.models.building import Build
from nestling.models.layouts import FindLayout, find_layout
from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Family:
    """How networks of one kind are built, which of their layers a stage is, and how they are made without us.

    Attributes:
        build: the plain network of an arch.
        layers: for what stands before `.precision` in a choice's name (a stage such as `stem`, `s1`, `head`,
            a block, a layer), the prefixes of its layers' names in that network; `nestling.quant.covers`
            tells what a prefix may be.
        rebuild: Python source that defines `network`, the arch's network, without Nestling.
        layout: how the axes of its networks' tensors are made of parts.
        pretrained: the largest network with the weights that the arch's `pretrained` names; None where the
            family knows no pretrained weights.
    """

    build: Build
    layers: Callable[[str], tuple[str, ...]]
    rebuild: Callable[[Arch], str]
    layout: FindLayout = find_layout
    pretrained: Callable[[Arch], nn.Module] | None = None


FAMILIES = {
    "mobilenet": Family(mobilenet.build, mobilenet.layers, mobilenet.rebuild),
    "resnet": Family(resnet.build, resnet.layers, resnet.rebuild),
    "convnext": Family(convnext.build, convnext.layers, convnext.rebuild),
    "vit": Family(vit.build, vit.layers, vit.rebuild),
    "timm": Family(
        timm_family.build, timm_family.layers, timm_family.rebuild, pretrained=timm_family.pretrained
    ),
    "convert": Family(
        convert.build,
        convert.layers,
        convert.rebuild,
        layout=convert.layout,
        pretrained=convert.pretrained,
    ),
}


def family(name: str) -> Family:
    """The family called `name`, or the one of the function that `name` says as `package.module:function`.

    Raises:
        ValueError: no such family, the nearest one is named; or no such module or function.
    """
    if ":" in name:
        return _family_of(name)
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FAMILIES)}"
        raise ValueError(
            f"no family {name!r}; {hint}; a function of your own is named as package.module:function"
        )
    return FAMILIES[name]


def _family_of(name: str) -> Family:
    """The family of a user's function from arch to network, or of a network that the user converted."""
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, and an installed command does not
        sys.path.insert(0, here)
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"family {name!r} cannot be imported: {type(error).__name__}: {error}; it is "
            f"package.module:function, found from {here} or among the installed packages"
        ) from error
    module, _, function = name.partition(":")
    if isinstance(found, convert.Conversion):
        return _family_of_conversion(found, module, function)
    build = found
    if not callable(build):
        raise ValueError(
            f"family {name!r} is {build!r}; it must be a function from an arch to a network, or a Conversion"
        )

    def rebuild(arch: Arch) -> str:
        return (
            f"from {module} import {function}\n\n"
            f"arch = {pprint.pformat(dict(arch), width=100, sort_dicts=False)}\n"
            f"network = {function}(arch)\n"
        )

    return Family(build, lambda stage: (stage,), rebuild)


def _family_of_conversion(conversion: convert.Conversion, module: str, name: str) -> Family:
    """The family of a network that a module of the user's converted."""

    def rebuild(arch: Arch) -> str:
        source = f"import copy\n\nfrom {module} import {name}\n\nnetwork = copy.deepcopy({name}.network)"
        return conversion.rebuild(arch, source)

    return Family(
        conversion.build,
        lambda stage: (stage,),
        rebuild,
        layout=conversion.layout,
        pretrained=lambda _: copy.deepcopy(conversion.network),
    )
