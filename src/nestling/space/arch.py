"""A choice is one ordered decision; an arch is one point: a value for every choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Need:
    """A choice counts only where another choice, `choice`, has a value of at least `at_least`.

    The kernel of a stage's third block needs the stage's depth to be at least 3.
    """

    choice: str
    at_least: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One ordered decision: `values` run from cheapest to dearest; a constant is a choice with one value.

    A choice whose `needs` are not all met is *idle*: it changes nothing about the network.

    Raises:
        ValueError: no value, a value twice (1, 1.0 and true are one value), or one that is not a number.
    """

    name: str
    values: tuple[Value, ...]
    needs: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"choice {self.name!r} has no value; give it at least one")
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"choice {self.name!r} lists a value twice: {list(self.values)}")
        if any(value != value for value in self.values):
            raise ValueError(f"choice {self.name!r} has a value that is not a number: {list(self.values)}")


def is_idle(choice: Choice, decisions: Mapping[str, Value], *, choices: Mapping[str, Choice]) -> bool:
    """Whether `choice` changes nothing under `decisions`, which decide what it needs.

    What an idle choice is pinned to meets no need: a choice that needs an idle one is idle too. `choices`
    tells by name what the needed ones need; one that is not among them needs nothing.
    """
    for need in choice.needs:
        value = decisions[need.choice]
        if not isinstance(value, int | float) or value < need.at_least:
            return True
        needed = choices.get(need.choice)
        if needed is not None and is_idle(needed, decisions, choices=choices):
            return True
    return False


@dataclass(frozen=True)
class Arch(Mapping[str, Value]):
    """One point of a search space: a hashable mapping from choice name to value.

    Two archs are equal when they hold the same decisions in the same order, 1, 1.0 and true being three:
    when they have the same `key`. Archs that come from a `SearchSpace` are canonical (idle choices pinned),
    so that one network has one `key`.
    """

    decisions: tuple[tuple[str, Value], ...]

    def __getitem__(self, name: str) -> Value:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(f"{name} (this arch decides {', '.join(self._values)})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self.decisions)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __hash__(self) -> int:
        return hash(self.decisions)

    def __eq__(self, other: object) -> bool:
        # Python holds 1, 1.0 and True to be equal, but the keys made of them differ
        return (
            isinstance(other, Arch)
            and self.decisions == other.decisions
            and all(type(a) is type(b) for a, b in zip(self.values(), other.values(), strict=True))
        )

    @cached_property
    def _values(self) -> dict[str, Value]:
        return dict(self.decisions)

    @cached_property
    def key(self) -> str:
        """Twelve hexadecimal digits that name this arch: the same on every machine and in every process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def integer(self, name: str) -> int:
        """The value of `name`, which must be a whole number.

        Raises:
            KeyError: no such choice.
            TypeError: the value is not a whole number.
        """
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        return value

    def to_json(self) -> str:
        """The decisions as one JSON object, in order."""
        return json.dumps(dict(self.decisions), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """The arch that `to_json` wrote.

        Raises:
            ValueError: `text` is not a JSON object of numbers, words and truth values.
        """
        loaded = json.loads(text)
        if not isinstance(loaded, dict) or not all(isinstance(v, int | float | str) for v in loaded.values()):
            raise ValueError(f"an arch is a JSON object of plain values, not {text[:80]!r}")
        return cls(tuple(loaded.items()))
