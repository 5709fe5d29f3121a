"""Families of predictors, and the judgement which of them says best what it was not shown.

All are judged on the same folds, by their error and by the order that they put networks in. A family beside
the Gaussian process is taken where it is clearly better, and the process then models what it leaves: so
every prediction has an uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Rows

Vector = NDArray[np.float64]
Predict = Callable[[Rows], Vector]
"""What is predicted for rows of features (N, features): scaled values (N,)."""

GAUSSIAN = "gaussian"
FOLDS = 5
CLEARLY = 0.95
"""Part of the Gaussian process's error that another family must stay below to be taken."""
ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MEMBERS, HIDDEN, EPOCHS, RATE = 4, 24, 150, 0.02


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well families predict what they were not shown.

    Attributes:
        errors: root mean squared error of each family, as a part of the values' standard deviation.
        orders: of each family, how the order of its predictions agrees with the true one, from -1 to 1
            (Spearman's rank correlation).
        chosen: the family that is taken.
    """

    errors: Mapping[str, float]
    orders: Mapping[str, float]
    chosen: str


def ridge(rows: Rows, values: Vector, seed: int) -> Predict:
    """Ridge regression on the features, its penalty chosen by leaving out rows; `seed` changes nothing."""
    del seed
    return _dual(rows, values, lambda left, right: 1.0 + left @ right.T)


def pairs(rows: Rows, values: Vector, seed: int) -> Predict:
    """Ridge regression on the features and all products of two; `seed` changes nothing."""
    del seed
    return _dual(rows, values, lambda left, right: (1.0 + left @ right.T) ** 2)


def _dual(rows: Rows, values: Vector, kernel: Callable[[Rows, Rows], Rows]) -> Predict:
    """Ridge regression with a kernel: exact, whatever number of features the kernel stands for."""
    roots, vectors = np.linalg.eigh(kernel(rows, rows))
    turned = vectors.T @ values
    best, solved = np.inf, np.zeros(len(values))
    for alpha in ALPHAS:
        inverse = 1.0 / (np.maximum(roots, 0.0) + alpha)
        weights = vectors @ (inverse * turned)
        left_out = weights / ((vectors**2) @ inverse)
        error = float(np.mean(left_out**2))
        if error < best:
            best, solved = error, weights
    return lambda asked: kernel(asked, rows) @ solved


def machine(rows: Rows, values: Vector, seed: int) -> Predict:
    """A support vector machine with a radial kernel; `seed` changes nothing."""
    del seed
    return support(rows, values, epsilon=0.02)


def support(rows: Rows, values: Vector, *, epsilon: float) -> Predict:
    """A support vector machine with a radial kernel, to which errors up to `epsilon` are none.

    It is asked thousands of times in a round, where scikit-learn's checks take longer than the answer.
    """
    # takes a second to import, which only those who fit it should wait for
    from sklearn.svm import SVR

    gamma = 1.0 / (rows.shape[1] * (float(rows.var()) or 1.0))
    fitted = SVR(C=10.0, gamma=gamma, epsilon=epsilon).fit(rows, values)
    vectors, weights = fitted.support_vectors_, fitted.dual_coef_[0]
    squares, rest = np.square(vectors).sum(axis=1), float(fitted.intercept_[0])

    def predict(asked: Rows) -> Vector:
        distances = np.square(asked).sum(axis=1)[:, None] + squares[None] - 2.0 * asked @ vectors.T
        told: Vector = np.exp(-gamma * np.maximum(distances, 0.0)) @ weights + rest
        return told

    return predict


def boosting(rows: Rows, values: Vector, seed: int) -> Predict:
    """Gradient boosted trees, which see steps and conditions."""
    from sklearn.ensemble import GradientBoostingRegressor

    fitted = GradientBoostingRegressor(
        n_estimators=120, max_depth=3, learning_rate=0.1, subsample=0.8, max_features=0.3, random_state=seed
    ).fit(rows, values)
    return lambda asked: np.asarray(fitted.predict(asked), dtype=np.float64)


def networks(rows: Rows, values: Vector, seed: int) -> Predict:
    """The mean of some networks of one hidden layer, trained together by Adam on all rows."""
    rng = np.random.default_rng(seed)
    inputs = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    shape = (MEMBERS, inputs.shape[1], HIDDEN)
    parameters = [
        rng.standard_normal(shape) / np.sqrt(inputs.shape[1]),
        rng.standard_normal((MEMBERS, HIDDEN + 1, 1)) / np.sqrt(HIDDEN),
    ]
    first, second = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]

    def forward(asked: Rows) -> tuple[Rows, Rows]:
        hidden = np.maximum(asked[None] @ parameters[0], 0.0)
        hidden = np.concatenate([hidden, np.ones((MEMBERS, len(asked), 1))], axis=2)
        return hidden, (hidden @ parameters[1])[..., 0]

    for epoch in range(1, EPOCHS + 1):
        hidden, told = forward(inputs)
        wrong = (told - values)[..., None] / len(values)
        back = (wrong @ parameters[1].swapaxes(1, 2))[..., :-1] * (hidden[..., :-1] > 0)
        gradients = [inputs.T[None] @ back, hidden.swapaxes(1, 2) @ wrong]
        rate = RATE * (1 - epoch / (EPOCHS + 1))
        for place, gradient in enumerate(gradients):
            slope = gradient + 1e-3 * parameters[place]
            first[place] += 0.1 * (slope - first[place])
            second[place] += 0.001 * (slope**2 - second[place])
            step = (first[place] / (1 - 0.9**epoch)) / (np.sqrt(second[place] / (1 - 0.999**epoch)) + 1e-8)
            parameters[place] = parameters[place] - rate * step

    def predict(asked: Rows) -> Vector:
        padded = np.concatenate([asked, np.ones((len(asked), 1))], axis=1)
        mean: Vector = forward(padded)[1].mean(axis=0)
        return mean

    return predict


FAMILIES: Mapping[str, Callable[[Rows, Vector, int], Predict]] = {
    "ridge": ridge,
    "pairs": pairs,
    "svr": machine,
    "boosting": boosting,
    "networks": networks,
}
"""Name -> what fits a predictor to features, scaled values and a seed."""


def out_of_fold(name: str, rows: Rows, values: Vector, *, folds: int = FOLDS) -> Vector:
    """What the family says of each row when its fold is left out (N,); every `folds`-th row is of a fold."""
    told = np.empty(len(values))
    for fold in range(folds):
        out = np.arange(len(values)) % folds == fold
        told[out] = FAMILIES[name](rows[~out], values[~out], fold)(rows[out])
    return told


def judge(rows: Rows, values: Vector, *, gaussian: Vector) -> Judgement:
    """Which family says best what it was not shown.

    Args:
        rows: features (N, features).
        values: scaled ones (N,).
        gaussian: what the Gaussian process says of each row when its fold is left out (N,).
    """
    told = {GAUSSIAN: gaussian} | {name: out_of_fold(name, rows, values) for name in FAMILIES}
    spread = float(values.std()) or 1.0
    errors = {name: float(np.sqrt(np.mean((said - values) ** 2))) / spread for name, said in told.items()}
    orders = {name: agreement(said, values) for name, said in told.items()}
    best = min(FAMILIES, key=lambda name: errors[name])
    better = errors[best] < CLEARLY * errors[GAUSSIAN] and orders[best] >= orders[GAUSSIAN]
    return Judgement(errors, orders, best if better else GAUSSIAN)


def agreement(left: Vector, right: Vector) -> float:
    """Spearman's rank correlation; 0 where one of them never changes."""
    ranks = [_ranks(values) for values in (left, right)]
    widths = [float(ranked.std()) for ranked in ranks]
    if min(widths) == 0:
        return 0.0
    centred = [ranked - ranked.mean() for ranked in ranks]
    return float((centred[0] * centred[1]).mean() / (widths[0] * widths[1]))


def _ranks(values: Vector) -> Vector:
    """The place of each value in ascending order; equal values share their mean place."""
    unique, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    del unique
    ends = np.cumsum(counts)
    shared: Vector = (ends - (counts - 1) / 2.0)[places]
    return shared
