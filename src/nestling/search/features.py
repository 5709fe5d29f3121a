"""What models see of archs: the values of choices, and what a metric may rise or fall with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Codes, Encoding, Rows
from nestling.search.losses import Exact

REFERENCE_ROWS = 512
REFERENCE_COSTS = 48
LEAST_COST = 1e-12


@dataclass(frozen=True, slots=True)
class Features:
    """Archs as models see them.

    Attributes:
        trend: what a metric may rise or fall with, of about mean 0 and variance 1 over a space (N, trends).
        values: one-hot values, centred and scaled so that a row has about length 1 (N, values).
        stages: where the columns of each stage's choices are in `values`.
        choices: where those of each choice are.
    """

    trend: Rows
    values: Rows
    stages: tuple[slice, ...]
    choices: tuple[slice, ...]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, places: NDArray[np.int64] | slice) -> Features:
        """Some of the rows."""
        return replace(self, trend=self.trend[places], values=self.values[places])

    def with_trends(self, columns: tuple[int, ...]) -> Features:
        """The same with some of the trends."""
        return replace(self, trend=self.trend[:, list(columns)])

    def scaled(self, factors: Rows) -> Features:
        """The same with each column of the values times a factor (values,)."""
        return replace(self, values=self.values * factors)

    @property
    def rows(self) -> Rows:
        """Everything in one matrix (N, trends + values)."""
        return np.concatenate([self.trend, self.values], axis=1)


class Frozen:
    """Features as a key, equal where all numbers are."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._key = (features.trend.tobytes(), features.values.tobytes(), str(features.stages))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self._key == other._key


@dataclass(frozen=True)
class FeatureMap:
    """Makes features of codes.

    What is centred and scaled is so by random codes of every size, the same each time: features of an arch do
    not change with the trials.

    Attributes:
        encoding: of the codes.
        exact: costs that are computed; their logarithms are trends.
        priors: other numbers that are trends.
    """

    encoding: Encoding
    exact: Mapping[str, Exact] = field(default_factory=dict)
    priors: Mapping[str, Exact] = field(default_factory=dict)

    def __call__(self, codes: Codes) -> Features:
        """The features of codes."""
        centre, width = self._trend_scale
        of_values, length = self._values_scale
        values = ((self.encoding.one_hot(codes) - of_values) / length)[:, self._order]
        return Features((self._trend(codes) - centre) / width, values, self._stages, self._choices)

    @property
    def certain(self) -> int:
        """How many trends are no priors; they come first."""
        return 1 + len(self.exact)

    def _trend(self, codes: Codes) -> Rows:
        columns = [self.encoding.size(codes)]
        columns += [np.log(np.maximum(exact(codes), LEAST_COST)) for exact in self.exact.values()]
        columns += [prior(codes) for prior in self.priors.values()]
        return np.stack(columns, axis=1)

    @cached_property
    def _sample(self) -> Codes:
        return self.encoding.sample(REFERENCE_ROWS, np.random.default_rng(0), tilted=True)

    @cached_property
    def _trend_scale(self) -> tuple[Rows, Rows]:
        trend = self._trend(self._sample[:REFERENCE_COSTS])
        spread = trend.std(axis=0)
        return trend.mean(axis=0), np.where(spread > LEAST_COST, spread, 1.0)

    @cached_property
    def _values_scale(self) -> tuple[Rows, float]:
        rows = self.encoding.one_hot(self._sample)
        centre = rows.mean(axis=0)
        return centre, float(np.sqrt(((rows - centre) ** 2).sum(axis=1).mean())) or 1.0

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.concatenate([self.encoding.feature_columns(group) for group in self.encoding.groups])

    @cached_property
    def _stages(self) -> tuple[slice, ...]:
        return _slices([int(self.encoding.levels[group].sum()) for group in self.encoding.groups])

    @cached_property
    def _choices(self) -> tuple[slice, ...]:
        return _slices([int(self.encoding.levels[c]) for group in self.encoding.groups for c in group])


def _slices(widths: Sequence[int]) -> tuple[slice, ...]:
    """Slices of some widths, one after the other."""
    ends = np.cumsum(widths).tolist()
    return tuple(slice(end - width, end) for end, width in zip(ends, widths, strict=True))
