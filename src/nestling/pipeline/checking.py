"""Refusing a space that a run could not use, before anything trains."""

from __future__ import annotations

import difflib
import warnings

from nestling.models.building import build_shapes
from nestling.models.families import Family
from nestling.models.meaning import complaints
from nestling.models.soundness import check
from nestling.space import SearchSpace, SpaceError

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
    """Refuses a precision of layers that there are not: it would give one network two names."""
    layers = [name for name, _ in build_shapes(family.build, space.largest).named_modules() if name]
    for choice in space.choices:
        stage, _, kind = choice.name.rpartition(".")
        if kind == "precision" and not any(
            f"{layer}.".startswith(f"{prefix}.") for prefix in family.layers(stage) for layer in layers
        ):
            near = difflib.get_close_matches(stage, [*{n.split(".")[0] for n in layers}, *layers], n=1)
            hint = f"did you mean {near[0]}.precision?" if near else f"its layers begin with {layers[0]}"
            raise SpaceError(f"{choice.name} is the precision of no layer of the largest network; {hint}")
