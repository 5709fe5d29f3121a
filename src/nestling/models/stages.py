"""Reading an arch whose choices are a table: `s2.width` of a stage, `s2.b1.kernel` of one block of it."""

from __future__ import annotations

from collections.abc import Sequence
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
            rest = name.split(".")[1:]
            if not is_stage(name):
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
