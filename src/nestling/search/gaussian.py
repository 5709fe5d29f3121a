"""A Gaussian process over archs: what a metric is likely to be, how sure that is, and jointly for many.

What is known beforehand about networks is put into the kernel, a sum of parts whose weights the trials
decide: a trend along the size (and along costs that are known exactly, and priors) of a network, straight and
bent; an effect of each value of each choice; pairs of values, above all of one stage; and anything smooth.
Weights and noise are those of the greatest posterior density (Rasmussen & Williams 2006, chapter 5), so few
trials give a plain model, and many a rich one. Choices that have larger effects get more weight in all parts
(automatic relevance determination, MacKay 1994; Tipping 2001): what matters alone is likelier to matter in
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from nestling.search.encoding import Rows
from nestling.search.features import Features, Frozen

Vector = NDArray[np.float64]

PARTS = ("trend", "bend", "effects", "stage pairs", "pairs", "smooth")
TYPICAL = (1.0, 0.5, 0.3, 0.05, 0.02, 0.1)
"""Variance that each part is expected to explain, of a metric of variance 1."""
TYPICAL_NOISE = 1e-3
SPREAD, NOISE_SPREAD = 1.5, 2.5
"""Standard deviations of the logarithms of what is expected."""
LEAST_NOISE = 1e-6
WEIGHED = 200
"""Trials that weights are fitted on at most: the fit takes their number cubed."""
STEPS = 30
ROUNDS = 2
"""Times that relevances are found anew from the effects."""
LEAST_RELEVANCE = 0.1
SMOOTHNESS = 1.0


def parts(left: Features, right: Features) -> list[Rows]:
    """The kernel's parts between rows of `left` (N) and `right` (M), (N, M) each, in the order of `PARTS`."""
    straight = left.trend @ right.trend.T
    effects = left.values @ right.values.T
    stage_pairs = np.zeros_like(effects)
    for columns in left.stages:
        of_stage = left.values[:, columns] @ right.values[:, columns].T
        of_stage *= of_stage
        stage_pairs += of_stage
    stage_pairs *= len(left.stages)
    return [
        1.0 + straight / left.trend.shape[1],
        _bend(left, right, straight),
        effects,
        stage_pairs,
        effects * effects,
        _smooth(left, right, effects),
    ]


def _bend(left: Features, right: Features, straight: Rows) -> Rows:
    return _radial(left.trend, right.trend, straight, scale=float(left.trend.shape[1]))


def _smooth(left: Features, right: Features, effects: Rows) -> Rows:
    return _radial(left.values, right.values, effects, scale=SMOOTHNESS**2)


def _radial(left: Rows, right: Rows, products: Rows, *, scale: float) -> Rows:
    """exp(-squared distance / 2 scale), from the `products` of all rows."""
    kernel = products - 0.5 * np.einsum("ij,ij->i", left, left)[:, None]
    kernel -= 0.5 * np.einsum("ij,ij->i", right, right)[None, :]
    kernel /= scale
    np.minimum(kernel, 0.0, out=kernel)
    radial: Rows = np.exp(kernel, out=kernel)
    return radial


@dataclass(frozen=True, slots=True)
class Weights:
    """Variances of the kernel's parts and of the noise, and the logarithm of the evidence for them."""

    parts: tuple[float, ...]
    noise: float
    evidence: float

    def sum(self, parts_: Sequence[Rows]) -> Rows:
        """The kernel."""
        total: Rows = np.zeros_like(parts_[0])
        for weight, part in zip(self.parts, parts_, strict=True):
            total += weight * part
        return total


BLOCK = 64
"""Rows of a kernel that are made at once: what is between stays in a processor's cache."""


def kernel(weights: Weights, left: Features, right: Features) -> Rows:
    """The weighted sum of the kernel's parts between rows of `left` (N) and `right` (M), (N, M)."""
    whole: Rows = np.empty((len(left), len(right)))
    for start in range(0, len(left), BLOCK):
        rows = slice(start, start + BLOCK)
        whole[rows] = weights.sum(parts(left.take(rows), right))
    return whole


def fit_weights(parts_: Sequence[Rows], values: Vector, *, start: Weights | None = None) -> Weights:
    """The weights of greatest posterior density for `values` (N,), of about mean 0 and variance 1.

    `parts_` are the kernel's parts between all rows; `start` is where to begin, if not at what is expected.
    """
    stack = np.stack(parts_)
    expected = np.log([*TYPICAL, TYPICAL_NOISE])
    spread = np.array([SPREAD] * len(TYPICAL) + [NOISE_SPREAD])
    eye = np.eye(len(values))

    def loss(logs: Vector) -> tuple[float, Vector]:
        weights = np.exp(logs)
        kernel = np.tensordot(weights[:-1], stack, axes=1) + (weights[-1] + LEAST_NOISE) * eye
        try:
            factor = cholesky(kernel, lower=True, check_finite=False)
        except LinAlgError:
            return 1e10, np.zeros_like(logs)
        inverse = cho_solve((factor, True), eye, check_finite=False)
        solved = inverse @ values
        away = (logs - expected) / spread
        value = 0.5 * values @ solved + np.log(np.diag(factor)).sum() + 0.5 * away @ away
        outer = np.outer(solved, solved) - inverse
        slopes = np.append(np.tensordot(stack, outer, axes=([1, 2], [0, 1])), np.trace(outer))
        return float(value), -0.5 * weights * slopes + away / spread

    bounds = [(e - 4 * s, e + 4 * s) for e, s in zip(expected, spread, strict=True)]
    began = expected if start is None else np.log([*start.parts, max(start.noise - LEAST_NOISE, 1e-9)])
    began = np.clip(began, expected - 4 * spread, expected + 4 * spread)
    found = minimize(loss, began, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS})
    weights = np.exp(found.x)
    return Weights(tuple(weights[:-1].tolist()), float(weights[-1]) + LEAST_NOISE, -float(found.fun))


@dataclass(frozen=True, slots=True)
class Posterior:
    """A metric, given trials.

    Attributes:
        seen: of the trials.
        weights: of the kernel.
        factor: the lower Cholesky factor of the kernel of the trials, noise included.
        solved: its inverse times the scaled values.
        centre: of the values.
        scale: of the values.
        logarithmic: whether the model is of the metric's logarithm.
        relevances: factors of the features' values; `seen` has them already.
        slopes: what the trends and the values add to the scaled mean, each for 1 of it.
        products: what pairs of values add (values, values).
    """

    seen: Features
    weights: Weights
    factor: Rows
    solved: Vector
    centre: float
    scale: float
    logarithmic: bool
    relevances: Vector
    slopes: tuple[Vector, Vector]
    products: Rows

    def mean(self, rows: Features) -> Vector:
        """The metric expected of each row (N,)."""
        own = rows.scaled(self.relevances)
        trend, bend, *_, smooth = self.weights.parts
        straight = own.trend @ self.seen.trend.T
        effects = own.values @ self.seen.values.T
        mean = trend * self.solved.sum() + own.trend @ self.slopes[0] + own.values @ self.slopes[1]
        mean += np.einsum("ij,ij->i", own.values @ self.products, own.values)
        mean += bend * (_bend(own, self.seen, straight) @ self.solved)
        mean += smooth * (_smooth(own, self.seen, effects) @ self.solved)
        return self.told(mean)

    def joint(self, rows: Features) -> tuple[Vector, Rows]:
        """Mean (N,) and covariance (N, N) of the scaled metric without its noise; `told` turns it back."""
        own = rows.scaled(self.relevances)
        across = kernel(self.weights, own, self.seen)
        explained = solve_triangular(self.factor, across.T, lower=True, check_finite=False)
        return across @ self.solved, kernel(self.weights, own, own) - explained.T @ explained

    def draw(self, rows: Features, count: int, rng: np.random.Generator) -> Rows:
        """`count` draws of the metric of all rows together, without its noise (count, N)."""
        mean, covariance = self.joint(rows)
        jitter = 1e-9
        while True:
            try:
                factor = cholesky(covariance + jitter * np.eye(len(mean)), lower=True, check_finite=False)
                break
            except LinAlgError:
                jitter *= 100
        return self.told(mean + rng.standard_normal((count, len(mean))) @ factor.T)

    def told(self, scaled: Rows) -> Rows:
        """The metric in its own unit."""
        values: Rows = self.centre + self.scale * scaled
        return np.exp(values) if self.logarithmic else values

    def held_out(self, folds: int) -> Vector:
        """What the model says of each trial when its fold is left out, weights kept (N,), scaled.

        Exactly, from the inverse of the kernel (Rasmussen & Williams 2006, 5.4.2, for blocks).
        """
        inverse = cho_solve((self.factor, True), np.eye(len(self.solved)), check_finite=False)
        values = self.factor @ (self.factor.T @ self.solved)
        left: Vector = np.empty(len(values))
        for fold in range(folds):
            out = np.arange(fold, len(values), folds)
            if len(out):
                left[out] = values[out] - np.linalg.solve(inverse[np.ix_(out, out)], self.solved[out])
        return left


def fit(seen: Features, values: Vector, *, weighed: int) -> Posterior:
    """The metric given `values` (N,) of the trials that were `seen`.

    Weights, and whether the logarithm is modelled, are decided on the first `weighed` trials, evenly spaced
    ones where they are many; the same trials are not weighed twice.
    """
    some = np.unique(np.linspace(0, weighed - 1, min(weighed, WEIGHED)).round().astype(np.int64))
    weights, relevances, logarithmic = _weighed(Frozen(seen.take(some)), values[some].tobytes())
    logarithmic = logarithmic and bool((values > 0).all())
    wanted = np.log(values) if logarithmic else values
    centre, scale = float(wanted[some].mean()), _scale(wanted[some])
    own = seen.scaled(relevances)
    factor = _factor(weights, kernel(weights, own, own))
    solved = cho_solve((factor, True), (wanted - centre) / scale, check_finite=False)
    trend, _, effects, stage_pairs, pairs, _ = weights.parts
    slopes = (trend * own.trend.T @ solved / own.trend.shape[1], effects * own.values.T @ solved)
    moments = own.values.T @ (solved[:, None] * own.values)
    products = pairs * moments
    for columns in own.stages:
        products[columns, columns] += stage_pairs * len(own.stages) * moments[columns, columns]
    return Posterior(own, weights, factor, solved, centre, scale, logarithmic, relevances, slopes, products)


def _factor(weights: Weights, between: Rows) -> Rows:
    """The lower Cholesky factor of the kernel `between` trials, with its noise."""
    noisy = between + weights.noise * np.eye(len(between))
    factor: Rows = cholesky(noisy, lower=True, overwrite_a=True, check_finite=False)
    return factor


def _scale(values: Vector) -> float:
    spread = float(values.std())
    return spread if spread > 1e-12 * max(1.0, float(np.abs(values).max())) else 1.0


@lru_cache(maxsize=32)
def _weighed(seen: Frozen, content: bytes) -> tuple[Weights, Vector, bool]:
    """Weights and relevances for values of trials, and whether they are of the values' logarithm."""
    values = np.frombuffer(content)
    plain = _relevant(seen.features, (values - values.mean()) / _scale(values))
    if (values > 0).all() and values.max() > 1.5 * values.min():
        logs = np.log(values)
        other = _relevant(seen.features, (logs - logs.mean()) / _scale(logs))
        # densities of the values themselves: a change of variables
        of_logs = other[0].evidence - len(values) * np.log(_scale(logs)) - logs.sum()
        if of_logs > plain[0].evidence - len(values) * np.log(_scale(values)):
            return (*other, True)
    return (*plain, False)


def _relevant(seen: Features, values: Vector) -> tuple[Weights, Vector]:
    """The weights for scaled values, and the relevances, that have most evidence of some rounds."""
    factors = np.ones(seen.values.shape[1])
    between = parts(seen, seen)
    weights = fit_weights(between, values)
    best = (weights, factors)
    for _ in range(ROUNDS if len(seen.choices) > 1 else 0):
        factors = factors * _relevances(seen.scaled(factors), values, weights, between)
        strengths = np.array([np.square(factors[columns]).mean() for columns in seen.choices])
        strengths = np.maximum(strengths / strengths.mean(), LEAST_RELEVANCE)
        for columns, strength in zip(seen.choices, strengths / strengths.mean(), strict=True):
            factors[columns] = np.sqrt(strength)
        own = seen.scaled(factors)
        between = parts(own, own)
        weights = fit_weights(between, values, start=weights)
        if weights.evidence > best[0].evidence:
            best = (weights, factors.copy())
    return best


def _relevances(seen: Features, values: Vector, weights: Weights, between: Sequence[Rows]) -> Vector:
    """How large the effects of each choice's values are expected to be: one step of the EM algorithm."""
    factor = _factor(weights, weights.sum(between))
    variance = weights.parts[PARTS.index("effects")]
    effects = variance * seen.values.T @ cho_solve((factor, True), values, check_finite=False)
    known = solve_triangular(factor, seen.values, lower=True, check_finite=False)
    squares = effects**2 + variance - variance**2 * (known**2).sum(axis=0)
    sizes = np.empty(len(squares))
    for columns in seen.choices:
        sizes[columns] = np.sqrt(max(float(squares[columns].mean()), 0.0))
    return sizes
