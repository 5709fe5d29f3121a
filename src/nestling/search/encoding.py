"""Encoding: archs as rows of whole numbers, and as features in which an idle choice is silent.

A *code* is a row with one whole number for each open choice of a space: which of its values it has, 0 where
it is idle. Codes are what the evolution works on, thousands at a time; archs are made of the few that are
asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nestling.space import Arch, SearchSpace

Codes = NDArray[np.int64]
"""Archs as rows (N, open choices)."""
Rows = NDArray[np.float64]
"""Features of archs (N, features)."""


@dataclass(frozen=True)
class Encoding:
    """How archs of `space` are written as codes and as features."""

    space: SearchSpace

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The open choices, one for each column of a code."""
        return tuple(choice.name for choice in self.space.open_choices)

    @cached_property
    def levels(self) -> Codes:
        """How many values each column has."""
        return np.array([len(choice.values) for choice in self.space.open_choices], dtype=np.int64)

    @cached_property
    def groups(self) -> tuple[NDArray[np.int64], ...]:
        """The columns of each stage: those whose names share what stands before the first dot."""
        of: dict[str, list[int]] = {}
        for column, name in enumerate(self.names):
            of.setdefault(name.partition(".")[0], []).append(column)
        return tuple(np.array(columns) for columns in of.values())

    def codes(self, archs: Iterable[Arch]) -> Codes:
        """The archs as codes.

        Raises:
            KeyError: a value is not among its choice's, or a choice is not decided.
        """
        places = self._places
        rows = [[place[arch[name]] for name, place in places] for arch in archs]
        return np.array(rows, dtype=np.int64).reshape(-1, len(places))

    def archs(self, codes: Codes) -> list[Arch]:
        """The archs that codes, canonical ones, stand for."""
        fixed = [(c.name, c.values[0]) for c in self.space.choices]
        at = {choice.name: place for place, choice in enumerate(self.space.choices)}
        slots = [(at[choice.name], choice) for choice in self.space.open_choices]
        archs = []
        for row in codes.tolist():
            decisions = list(fixed)
            for (slot, choice), value in zip(slots, row, strict=True):
                decisions[slot] = (choice.name, choice.values[value])
            archs.append(Arch(tuple(decisions)))
        return archs

    def active(self, codes: Codes) -> NDArray[np.bool_]:
        """For each code and column, whether the choice changes anything (it is not idle)."""
        active = np.ones(codes.shape, dtype=bool)
        for column, (always, needs) in enumerate(self._needs):
            if not always:
                active[:, column] = False
            for other, enough in needs:
                active[:, column] &= enough[codes[:, other]] & active[:, other]
        return active

    def canonical(self, codes: Codes) -> Codes:
        """The codes with idle choices pinned to 0, so that one network has one row."""
        canonical: Codes = np.where(self.active(codes), codes, 0)
        return canonical

    def sample(self, count: int, rng: np.random.Generator, *, tilted: bool = False) -> Codes:
        """`count` random codes; where `tilted`, they run from nearly smallest to nearly largest.

        Untilted, every choice is uniform over its values, and costs crowd in the middle. Tilted, a code's
        values lie around a place along their ranges that is drawn for the code.
        """
        width = len(self.levels)
        if not tilted:
            return self.canonical(rng.integers(0, self.levels, size=(count, width)))
        along = rng.random((count, 1))
        spread = rng.beta(1 + 3 * along, 1 + 3 * (1 - along), size=(count, width))
        return self.canonical(np.minimum((spread * self.levels).astype(np.int64), self.levels - 1))

    def ordinal(self, codes: Codes) -> Rows:
        """How far along its values each choice is, from above 0 to 1; 0 where it is idle (N, columns)."""
        along: Rows = np.where(self.active(codes), (codes + 1) / self.levels, 0.0)
        return along

    def one_hot(self, codes: Codes) -> Rows:
        """A 1 for the value of each choice that is not idle (N, all values of all choices)."""
        features = np.zeros((len(codes), int(self.levels.sum())))
        starts = np.concatenate([[0], np.cumsum(self.levels)[:-1]]).astype(np.int64)
        rows, columns = np.nonzero(self.active(codes))
        features[rows, starts[columns] + codes[rows, columns]] = 1.0
        return features

    def size(self, codes: Codes) -> NDArray[np.float64]:
        """The mean of `ordinal`: how large a network is, whatever its choices cost (N,)."""
        mean: NDArray[np.float64] = self.ordinal(codes).mean(axis=1)
        return mean

    def feature_columns(self, columns: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The columns of `one_hot` that belong to some columns of a code."""
        starts = np.concatenate([[0], np.cumsum(self.levels)])
        return np.concatenate([np.arange(starts[c], starts[c + 1]) for c in columns])

    @cached_property
    def _places(self) -> list[tuple[str, dict[object, int]]]:
        return [(c.name, {v: place for place, v in enumerate(c.values)}) for c in self.space.open_choices]

    @cached_property
    def _needs(self) -> list[tuple[bool, list[tuple[int, NDArray[np.bool_]]]]]:
        """For each column, whether constants let it count, and which values of which columns do."""
        column_of = {name: column for column, name in enumerate(self.names)}
        constants = {c.name: c.values[0] for c in self.space.choices}
        found = []
        for choice in self.space.open_choices:
            always, needs = True, []
            left = list(choice.needs)
            while left:
                need = left.pop()
                other = self.space.by_name[need.choice]
                enough = np.array([isinstance(v, int | float) and v >= need.at_least for v in other.values])
                if need.choice in column_of:
                    needs.append((column_of[need.choice], enough))
                else:
                    always &= bool(enough[other.values.index(constants[need.choice])])
                    left += other.needs
            found.append((always, needs))
        return found


def unlike(codes: Codes, known: Codes) -> NDArray[np.int64]:
    """The places of the rows of `codes` that are not in `known`, each row once, in order."""
    seen = {row.tobytes() for row in np.ascontiguousarray(known)}
    places = []
    for place, row in enumerate(np.ascontiguousarray(codes)):
        key = row.tobytes()
        if key not in seen:
            seen.add(key)
            places.append(place)
    return np.array(places, dtype=np.int64)


def anything(encoding: Encoding, known: Codes, count: int, rng: np.random.Generator) -> Codes:
    """`count` random codes that are not `known`; all that are left where the space has no more."""
    found = known[:0]
    if count <= 0:
        return found
    for _ in range(20):
        more = encoding.sample(4 * count, rng, tilted=True)
        found = np.concatenate([found, more[unlike(more, np.concatenate([known, found]))]])
        if len(found) >= count:
            return found[:count]
    seen = {row.tobytes() for row in np.concatenate([known, found])}
    for arch in encoding.space.walk():
        row = encoding.codes([arch])
        if row[0].tobytes() not in seen:
            found = np.concatenate([found, row])
        if len(found) >= count:
            break
    return found[:count]
