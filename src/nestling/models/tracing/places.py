"""Which axis of a tensor counts images, followed from operator to operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nestling.models.operators import Attribute


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor counts images: `axis` of `rank` axes; it may count windows of images, too."""

    axis: int
    rank: int


IMAGES = Place(0, 4)


def place_after(
    kind: str, attributes: Mapping[str, Attribute], places: Sequence[Place], weight: Tensor | None
) -> Place:
    """Where the result of an operator counts images, whose inputs count them at `places`."""
    place = max(places, key=lambda place: place.rank)
    axes = attributes.get("axes")
    given = axes if isinstance(axes, tuple) else ()
    match kind:
        case "Transpose":
            perm = attributes["perm"]
            assert isinstance(perm, tuple)
            return Place(perm.index(place.axis), place.rank)
        case "Reshape":
            shape = attributes["shape"]
            assert isinstance(shape, tuple)
            return Place(shape.index(-1), len(shape))
        case "Flatten":
            return Place(0, 2)
        case "Unsqueeze":
            axis = place.axis
            for new in given:
                axis += new <= axis
            return Place(axis, place.rank + len(given))
        case "Gather" if isinstance(attributes["indices"], int):
            given = (int(str(attributes["axis"])),)
        case "Squeeze" | "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceL2":
            given = () if attributes.get("keepdims") else given
        case _:
            # Operands of fewer axes are lined up on the right.
            more = 0 if weight is None or kind not in _BROADCASTING else max(weight.ndim - place.rank, 0)
            return Place(place.axis + more, place.rank + more)
    return Place(place.axis - sum(gone < place.axis for gone in given), place.rank - len(given))


_BROADCASTING = {"Add", "Sub", "Mul", "Div", "Pow", "MatMul"}
