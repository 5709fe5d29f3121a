"""Families of predictors, the judgement between them, and models of metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from nestling.search import fitting
from nestling.search.encoding import Codes, Encoding
from nestling.search.features import FeatureMap
from nestling.search.fitting import fit_model, settled
from nestling.search.predictors import FAMILIES, agreement, judge, out_of_fold, support
from nestling.space import Choice, SearchSpace

Values = NDArray[np.float64]


@pytest.fixture
def features() -> FeatureMap:
    return FeatureMap(
        Encoding(SearchSpace("toy", tuple(Choice(f"s{i % 2}.c{i}", (1, 2, 3)) for i in range(8))))
    )


def effects(codes: Codes) -> Values:
    told: Values = codes @ np.array([5.0, -3.0, 2.0, 1.0, 4.0, 0.0, 1.0, 2.0])
    return told


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_effects(features: FeatureMap, name: str) -> None:
    codes = features.encoding.sample(90, np.random.default_rng(0))
    values = effects(codes)
    scaled = (values - values.mean()) / values.std()
    rows = features(codes).rows
    predict = FAMILIES[name](rows[:70], scaled[:70], 0)
    error = np.sqrt(np.mean((predict(rows[70:]) - scaled[70:]) ** 2))
    assert error < 0.55, error
    again = FAMILIES[name](rows[:70], scaled[:70], 0)
    assert (again(rows[70:]) == predict(rows[70:])).all()


def test_ridge_is_the_closed_form(features: FeatureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.search.predictors.ALPHAS", (0.5,))
    codes = features.encoding.sample(40, np.random.default_rng(0))
    rows, values = features(codes).rows, effects(codes)
    padded = np.concatenate([np.ones((40, 1)), rows], axis=1)
    weights = np.linalg.solve(padded.T @ padded + 0.5 * np.eye(padded.shape[1]), padded.T @ values)
    assert FAMILIES["ridge"](rows, values, 0)(rows) == pytest.approx(padded @ weights, abs=1e-6)


def test_what_is_said_of_a_fold_does_not_depend_on_its_values(features: FeatureMap) -> None:
    codes = features.encoding.sample(30, np.random.default_rng(0))
    rows, values = features(codes).rows, effects(codes)
    fold = np.arange(30) % 5 == 3
    changed = np.where(fold, 99.0, values)
    told, retold = (out_of_fold("pairs", rows, v) for v in (values, changed))
    assert (told[fold] == retold[fold]).all()
    assert (told[~fold] != retold[~fold]).any()


def few_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the families that take long to fit."""
    few = {name: FAMILIES[name] for name in ("ridge", "pairs", "svr")}
    monkeypatch.setattr("nestling.search.predictors.FAMILIES", few)


def test_a_family_is_taken_only_where_it_is_clearly_better(
    features: FeatureMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_families(monkeypatch)
    codes = features.encoding.sample(60, np.random.default_rng(0))
    values = effects(codes)
    scaled = (values - values.mean()) / values.std()
    rows = features(codes).rows
    assert judge(rows, scaled, gaussian=scaled).chosen == "gaussian"
    poor = judge(rows, scaled, gaussian=np.random.default_rng(0).standard_normal(60))
    assert poor.chosen == min(poor.errors, key=lambda name: poor.errors[name])
    assert poor.orders[poor.chosen] > 0.9


def test_agreement_is_spearmans_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 6, 40).astype(np.float64), rng.integers(0, 6, 40).astype(np.float64)
    assert agreement(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert agreement(left, np.ones(40)) == 0.0


def test_the_numbers_of_trials_at_which_models_change_grow_in_steps() -> None:
    numbers = [settled(count) for count in range(1, 300)]
    assert all(0 < number <= count for count, number in enumerate(numbers, 1))
    assert numbers == sorted(numbers)
    assert len(set(numbers)) < 40


def test_a_prior_is_kept_only_where_it_helps(features: FeatureMap) -> None:
    codes = features.encoding.sample(40, np.random.default_rng(0))
    truth = np.random.default_rng(1).standard_normal(3**8)
    places = 3 ** np.arange(8)

    def knows(asked: Codes) -> Values:
        told: Values = truth[asked @ places]
        return told

    def says_nothing(asked: Codes) -> Values:
        told: Values = truth[::-1][asked @ places]
        return told

    both = replace(features, priors={"nothing": says_nothing, "all": knows})
    model = fit_model(both, both(codes), knows(codes))
    assert model.trends == (0, 2)
    assert model.held_out()[0] < 0.2


def test_another_family_as_base_keeps_mean_and_draws_together(
    features: FeatureMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_families(monkeypatch)
    monkeypatch.setattr(fitting, "GOOD", 0.0)
    codes = features.encoding.sample(50, np.random.default_rng(3))
    values = np.where((codes[:, 0] == 1) ^ (codes[:, 1] == 2), 5.0, 1.0) + 0.01 * effects(codes)

    def easy(rows: Values, scaled: Values, *, gaussian: Values) -> object:
        return replace(judge(rows, scaled, gaussian=gaussian), chosen="pairs")

    monkeypatch.setattr(fitting, "judge", easy)
    fitting._judged.cache_clear()
    model = fit_model(features, features(codes), values)
    fitting._judged.cache_clear()
    assert model.base is not None
    asked = features(features.encoding.sample(20, np.random.default_rng(4)))
    draws = model.draw(asked, 300, np.random.default_rng(0))
    assert np.abs(draws.mean(axis=0) - model.mean(asked)).max() < 0.5 * values.std()
    error, order = model.held_out()
    assert error < values.std()
    assert order > 0.2


def test_a_support_vector_machine_says_what_scikit_learn_s_says() -> None:
    from sklearn.svm import SVR

    rng = np.random.default_rng(0)
    rows, asked = rng.standard_normal((40, 7)), rng.standard_normal((30, 7))
    values = np.sin(rows[:, 0]) + rows[:, 1] * rows[:, 2]
    wanted = SVR(C=10.0, gamma="scale", epsilon=0.05).fit(rows, values).predict(asked)
    assert support(rows, values, epsilon=0.05)(asked) == pytest.approx(wanted, rel=1e-9)
