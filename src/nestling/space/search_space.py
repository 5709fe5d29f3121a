"""SearchSpace: every network that can be built, each under one name."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nestling.space.arch import Arch, Choice, Value, is_idle


class SpaceError(ValueError):
    """A space or an arch that cannot be used; the message names the choice, its value and what would do."""


@dataclass(frozen=True)
class SearchSpace:
    """The archs that `choices` span, for networks of one `family`.

    A choice may need another one that stands before it; where the need is not met the choice is idle and
    pinned to its first value, so that one network has one name.

    Raises:
        SpaceError: two choices with one name, or a need of a choice that does not stand before.
    """

    family: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        seen: dict[str, Choice] = {}
        for choice in self.choices:
            if choice.name in seen:
                raise SpaceError(f"the space has two choices named {choice.name!r}")
            for need in choice.needs:
                if need.choice not in seen:
                    raise SpaceError(
                        f"choice {choice.name!r} needs {need.choice!r}, which must stand before it"
                    )
                if not all(isinstance(value, int | float) for value in seen[need.choice].values):
                    raise SpaceError(
                        f"choice {choice.name!r} needs {need.choice!r}, whose values are not numbers"
                    )
            seen[choice.name] = choice

    @cached_property
    def by_name(self) -> dict[str, Choice]:
        """The choices by name, in order."""
        return {choice.name: choice for choice in self.choices}

    @cached_property
    def open_choices(self) -> tuple[Choice, ...]:
        """The choices with more than one value."""
        return tuple(choice for choice in self.choices if len(choice.values) > 1)

    @cached_property
    def smallest(self) -> Arch:
        """The first, cheapest value everywhere."""
        return self.canonical({choice.name: choice.values[0] for choice in self.choices})

    @cached_property
    def largest(self) -> Arch:
        """The last, dearest value everywhere."""
        return self.canonical({choice.name: choice.values[-1] for choice in self.choices})

    @cached_property
    def size(self) -> int:
        """How many different archs there are.

        Choices that others need are counted value by value; all others only multiply.
        """
        total = 1
        for group in self._linked():
            names = {need.choice for choice in group for need in choice.needs}
            governing = SearchSpace(self.family, tuple(choice for choice in group if choice.name in names))
            free = [choice for choice in group if choice.name not in names]
            total *= sum(
                math.prod(len(choice.values) for choice in free if not self.is_idle(choice, decided))
                for decided in governing.walk()
            )
        return total

    def is_idle(self, choice: Choice, decisions: Mapping[str, Value]) -> bool:
        """Whether `choice` changes nothing under `decisions`, which decide what it needs."""
        return is_idle(choice, decisions, choices=self.by_name)

    def canonical(self, decisions: Mapping[str, Value]) -> Arch:
        """The arch of `decisions`, idle choices pinned to their first value.

        Raises:
            SpaceError: a choice is missing or unknown, or a value is not among its choice's.
        """
        for name in decisions:
            self._require(name)
        decided: dict[str, Value] = {}
        for choice in self.choices:
            if choice.name not in decisions:
                raise SpaceError(f"{choice.name} is not decided; its values are {list(choice.values)}")
            value = decisions[choice.name]
            if value not in choice.values:
                raise SpaceError(f"{choice.name} is {value!r}; its values are {list(choice.values)}")
            # the choice's own value: 1, 1.0 and True are equal, and would give one network three names
            own = choice.values[choice.values.index(value)]
            decided[choice.name] = choice.values[0] if self.is_idle(choice, decided) else own
        return Arch(tuple(decided.items()))

    def sample(self, rng: random.Random) -> Arch:
        """A random arch: every choice uniform over its values."""
        return self.canonical({choice.name: rng.choice(choice.values) for choice in self.choices})

    def mutate(self, arch: Arch, rng: random.Random, *, probability: float) -> Arch:
        """`arch` with each choice drawn anew with `probability`."""
        return self.canonical(
            {
                c.name: rng.choice(c.values) if rng.random() < probability else arch[c.name]
                for c in self.choices
            }
        )

    def cross(self, first: Arch, second: Arch, *, rng: random.Random) -> Arch:
        """An arch that takes each decision from one of two parents."""
        return self.canonical({c.name: rng.choice((first, second))[c.name] for c in self.choices})

    def spread(self, count: int) -> list[Arch]:
        """At most `count` different archs from smallest to largest, every choice moved along alike."""
        if count < 2:
            return [self.smallest][:count]
        archs = []
        for step in range(count):
            along = step / (count - 1)
            archs.append(
                self.canonical({c.name: c.values[round(along * (len(c.values) - 1))] for c in self.choices})
            )
        return list(dict.fromkeys(archs))

    def walk(self) -> Iterator[Arch]:
        """Every arch, each once."""

        def extend(index: int, decided: dict[str, Value]) -> Iterator[Arch]:
            if index == len(self.choices):
                yield Arch(tuple(decided.items()))
                return
            choice = self.choices[index]
            values = choice.values[:1] if self.is_idle(choice, decided) else choice.values
            for value in values:
                yield from extend(index + 1, {**decided, choice.name: value})

        yield from extend(0, {})

    def only(self, values: Mapping[str, Sequence[Value]]) -> SearchSpace:
        """The smaller space in which the named choices keep only the given values.

        Raises:
            SpaceError: no such choice, or no such value.
        """
        for name, kept in values.items():
            self._require(name)
            strange = [value for value in kept if value not in self.by_name[name].values]
            if strange or not kept:
                raise SpaceError(
                    f"{name} cannot be cut to {list(kept)}; its values are {list(self.by_name[name].values)}"
                )
        cut = {
            name: tuple(v for v in self.by_name[name].values if v in kept) for name, kept in values.items()
        }
        return SearchSpace(
            self.family, tuple(Choice(c.name, cut.get(c.name, c.values), c.needs) for c in self.choices)
        )

    def with_constants(self, values: Mapping[str, Value]) -> SearchSpace:
        """The space in which the named choices, added where they are not there, have one value."""
        kept = tuple(
            Choice(c.name, (values[c.name],), c.needs) if c.name in values else c for c in self.choices
        )
        added = tuple(Choice(name, (value,)) for name, value in values.items() if name not in self.by_name)
        return SearchSpace(self.family, added + kept)

    def _require(self, name: str) -> None:
        if name not in self.by_name:
            near = difflib.get_close_matches(name, self.by_name, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its choices are {', '.join(self.by_name)}"
            raise SpaceError(f"the space has no choice {name!r}; {hint}")

    def _linked(self) -> Iterable[list[Choice]]:
        """The choices in groups that no need links to one another, each group in order."""
        group_of: dict[str, dict[str, Choice]] = {}
        for choice in self.choices:
            merged: dict[str, Choice] = {}
            for need in choice.needs:
                merged |= group_of[need.choice]
            merged[choice.name] = choice
            group_of |= dict.fromkeys(merged, merged)
        groups = {id(group): group for group in group_of.values()}.values()
        return [[choice for name, choice in self.by_name.items() if name in group] for group in groups]
