"""A model for each metric: the predictor that held-out trials speak for, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Rows
from nestling.search.features import FeatureMap, Features, Frozen
from nestling.search.gaussian import Posterior, fit
from nestling.search.predictors import (
    FAMILIES,
    FOLDS,
    GAUSSIAN,
    Judgement,
    Predict,
    agreement,
    judge,
    out_of_fold,
)

Vector = NDArray[np.float64]

FEWEST = 6
"""Trials that a model is fitted on at least."""
JUDGED = 32
"""Trials from which on families are judged, again each time that their number has doubled."""
JUDGED_ROWS = 256
"""Trials that they are judged on at most."""
GOOD = 0.1
"""Held-out error, as a part of the standard deviation, below which no other family is asked."""
HELPS, HELPS_AT_ALL = 0.02, 0.01
"""Parts of the held-out error, and of the standard deviation, that a prior must save, or it is left out."""


@dataclass(frozen=True, slots=True)
class Model:
    """A metric of archs, given trials.

    Attributes:
        posterior: of the metric, or of what the base predictor leaves.
        trends: the columns of the features' trends that it uses.
        base: predicts the metric; None where the Gaussian process does.
        judgement: how families did on held-out trials; None where they were not asked.
        values: the metric of the trials.
        based: what the base predictor says of them, held out; 0 without one.
    """

    posterior: Posterior
    trends: tuple[int, ...]
    base: Predict | None
    judgement: Judgement | None
    values: Vector
    based: Vector

    def mean(self, seen: Features) -> Vector:
        """The metric expected of each row (N,)."""
        own = seen.with_trends(self.trends)
        expected = self.posterior.mean(own)
        return expected if self.base is None else expected + self.base(own.rows)

    def held_out(self) -> tuple[float, float]:
        """Root mean squared error, in the metric's unit, and rank correlation on held-out trials."""
        told = self.posterior.told(self.posterior.held_out(FOLDS)) + self.based
        return float(np.sqrt(np.mean((told - self.values) ** 2))), agreement(told, self.values)

    def draw(self, seen: Features, count: int, rng: np.random.Generator) -> Rows:
        """`count` draws of the metric of all rows together, without its noise (count, N)."""
        own = seen.with_trends(self.trends)
        drawn = self.posterior.draw(own, count, rng)
        return drawn if self.base is None else drawn + self.base(own.rows)


def fit_model(features: FeatureMap, seen: Features, values: Vector) -> Model:
    """The model of `values` (N,) of trials, FEWEST or more, that were `seen`.

    What takes long is decided on the first trials, a number that grows in steps, and not twice for the same.
    """
    weighed = settled(len(values))
    trends = _helpful(Frozen(seen.take(slice(weighed))), values[:weighed].tobytes(), features.certain)
    own = seen.with_trends(trends)
    judged = JUDGED
    while 2 * judged <= len(values):
        judged *= 2
    judgement, base, based = None, None, np.zeros(len(values))
    if len(values) >= judged:
        judgement, base, held_out = _judged(Frozen(own.take(slice(judged))), values[:judged].tobytes())
        if base is not None:
            # the base has not seen later trials: what it says of them is as honest
            based = np.concatenate([held_out, base(own.take(slice(judged, None)).rows)])
    posterior = fit(own, values - based, weighed=weighed)
    return Model(posterior, trends, base, judgement, values, based)


def settled(count: int) -> int:
    """`count`, rounded down to numbers that grow by about a fifth."""
    rounded = min(FEWEST, count)
    while (larger := max(rounded + 1, int(rounded * 1.2))) <= count:
        rounded = larger
    return rounded


@lru_cache(maxsize=32)
def _helpful(seen: Frozen, content: bytes, certain: int) -> tuple[int, ...]:
    """The trends to use: those that are no priors, then priors as long as one more saves held-out error."""
    values = np.frombuffer(content)
    kept = tuple(range(certain))
    if seen.features.trend.shape[1] == certain or len(values) < 2 * FOLDS:
        return kept

    def error(columns: tuple[int, ...]) -> float:
        posterior = fit(seen.features.with_trends(columns), values, weighed=len(values))
        return float(np.sqrt(np.mean((posterior.told(posterior.held_out(FOLDS)) - values) ** 2)))

    least = error(kept)
    left = set(range(certain, seen.features.trend.shape[1]))
    while left:
        errors = {prior: error((*kept, prior)) for prior in sorted(left)}
        best = min(errors, key=lambda prior: errors[prior])
        if least - errors[best] <= max(HELPS * least, HELPS_AT_ALL * float(values.std())):
            break
        kept, least = (*kept, best), errors[best]
        left.remove(best)
    return kept


@lru_cache(maxsize=32)
def _judged(seen: Frozen, content: bytes) -> tuple[Judgement | None, Predict | None, Vector]:
    """The judgement on trials, the base predictor it chose, and what that says of each, held out."""
    values = np.frombuffer(content)
    nothing: tuple[None, None, Vector] = (None, None, np.zeros(len(values)))
    spread, centre = float(values.std()), float(values.mean())
    if spread <= 1e-9 * max(1.0, abs(centre)):
        return nothing
    posterior = fit(seen.features, values, weighed=len(values))
    gaussian = posterior.told(posterior.held_out(FOLDS))
    if float(np.sqrt(np.mean((gaussian - values) ** 2))) < GOOD * spread:
        return nothing
    # the latest trials are those near the front; folds stay whole
    some = np.arange(max(0, len(values) - JUDGED_ROWS) // FOLDS * FOLDS, len(values))
    rows, scaled = seen.features.rows, (values - centre) / spread
    judgement = judge(rows[some], scaled[some], gaussian=((gaussian - centre) / spread)[some])
    if judgement.chosen == GAUSSIAN:
        return judgement, None, nothing[2]
    fitted = FAMILIES[judgement.chosen](rows, scaled, FOLDS)
    held_out = centre + spread * out_of_fold(judgement.chosen, rows, scaled)
    return judgement, _rescaled(fitted, centre=centre, spread=spread), held_out


def _rescaled(predict: Predict, *, centre: float, spread: float) -> Callable[[Rows], Vector]:
    return lambda rows: centre + spread * predict(rows) if len(rows) else np.empty(0)
