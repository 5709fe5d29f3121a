"""Reading an arch whose choices are a table: `s2.width` of a stage, `s2.b1.kernel` of one block of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the choices that a family knows.

    Attributes:
        family: its name.
        stage: the columns of a stage.
        block: those of them that a block may decide alone.
        network: the choices of the whole network.
    """

    family: str
    stage: tuple[str, ...]
    block: tuple[str, ...]
    network: tuple[str, ...]

    def check(self, arch: Arch) -> None:
        """Refuses a choice that the family would not read.

        Raises:
            ValueError: the choice is named, and those that there are.
        """
        for name in arch:
            place, _, column = name.rpartition(".")
            rest = name.split(".")[1:]
            if column == "precision" and place:
                # what follows the stage or block are its layers' own names: whether it has them is not known
                known = (
                    column in self.stage
                    if is_stage(name)
                    else f"{place.split('.')[0]}.{column}" in self.network
                )
            elif not is_stage(name):
                known = name in self.network
            elif len(rest) == 2:
                known = rest[0][:1] == "b" and rest[0][1:].isdigit() and rest[1] in self.block
            else:
                known = len(rest) == 1 and rest[0] in self.stage
            if not known:
                raise ValueError(
                    f"the {self.family} family has no choice {name!r}; a stage has {', '.join(self.stage)} "
                    f"(a block {', '.join(self.block)}), the network {', '.join(self.network)}"
                )


def is_stage(name: str) -> bool:
    """Whether the choice `name` is a stage's or a block's."""
    head = name.split(".")[0]
    return head[:1] == "s" and head[1:].isdigit()


def layer_prefixes(
    place: str,
    *,
    ends: Mapping[str, tuple[str, ...]],
    blocks: Callable[[int], str],
    beside: str | None = None,
) -> tuple[str, ...]:
    """The prefixes of the names of the layers at `place`, what stands before `.precision` in a choice's name.

    A place is an end of the network (`stem`, `head`), a stage (`s2`) or a block (`s2.b1`), or layers of it,
    by their names within a block or end: `s2.conv_dw` are those of all blocks of the stage, `s2.b1.conv_dw`
    that of one, `head.classifier` one of the head. A prefix that no layer has does no harm.

    Args:
        place: as above.
        ends: for each end, the prefixes of its layers.
        blocks: stage number, from 1 -> the name of the module whose children are its blocks.
        beside: the name of what stands beside that module, before the first block, and goes with it.

    Raises:
        ValueError: no such place.
    """
    stage, *path = place.split(".")
    if stage in ends:
        if not path:
            return ends[stage]
        within = ".".join(path)
        alone = (within,) if path[0] in ends[stage] else ()
        return (*alone, *(f"{prefix}.{within}" for prefix in ends[stage]))
    if not is_stage(place):
        raise ValueError(
            f"{place!r} is no place of a network; those are {', '.join(ends)}, s1, s1.b1 and so on"
        )
    inner = blocks(int(stage[1:]))
    before = None if beside is None else f"{inner.rpartition('.')[0]}.{beside}"
    if path and path[0][:1] == "b" and path[0][1:].isdigit():
        number = int(path.pop(0)[1:])
        own = ".".join([inner, str(number - 1), *path])
        return (own, before) if before and number == 1 and not path else (own,)
    if not path:
        return (inner, before) if before else (inner,)
    everywhere = ".".join([inner, "*", *path])
    return (".".join([before, *path[1:]]),) if before and path[0] == beside else (everywhere,)


def stages_of(arch: Arch) -> Sequence[str]:
    """The stages that `arch` decides on, in order: `s1`, `s2` and so on."""
    return [f"s{number}" for number in sorted({int(n.split(".")[0][1:]) for n in arch if is_stage(n)})]


def decider(arch: Arch, stage: str, *, block: int, column: str) -> str:
    """The name of the choice that decides `column` of a block: its own, or else its stage's."""
    own = f"{stage}.b{block}.{column}"
    return own if own in arch else f"{stage}.{column}"


def depth_of(arch: Arch, stage: str) -> int:
    """The number of blocks of `stage`, 1 where the arch does not tell.

    Raises:
        ValueError: it has none.
    """
    depth = arch.integer(f"{stage}.depth") if f"{stage}.depth" in arch else 1
    if depth < 1:
        raise ValueError(f"{stage}.depth is {depth}; a stage has at least one block")
    return depth


def width_of(arch: Arch, name: str) -> int:
    """The width that the choice `name` says.

    Raises:
        KeyError: no such choice.
        ValueError: it is not a positive multiple of 8.
    """
    return checked_width(arch.integer(name), name=name)


def checked_width(width: int, *, name: str) -> int:
    """`width`, a multiple of 8: runtimes compute in such steps.

    Raises:
        ValueError: it is not one, or not positive; `name` is named.
    """
    if width < 8 or width % 8:
        raise ValueError(f"{name} is {width}; a width is a positive multiple of 8")
    return width
