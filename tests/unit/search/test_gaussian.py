"""The Gaussian process: held-out predictions, draws and uncertainty against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nestling.search.encoding import Encoding
from nestling.search.features import FeatureMap, Features
from nestling.search.gaussian import PARTS, fit, fit_weights, parts
from nestling.space import Choice, SearchSpace

Values = NDArray[np.float64]


@pytest.fixture
def features() -> FeatureMap:
    return FeatureMap(
        Encoding(SearchSpace("toy", tuple(Choice(f"s{i % 3}.c{i}", (1, 2, 3)) for i in range(9))))
    )


def drawn(features: FeatureMap, count: int, seed: int) -> tuple[Features, Values]:
    """Archs, and a sum of effects and a product of two choices of a stage."""
    codes = features.encoding.sample(count, np.random.default_rng(seed), tilted=True)
    values = codes @ np.arange(1.0, 10.0) + 6.0 * codes[:, 0] * codes[:, 3] + 50.0
    return features(codes), values


def test_every_part_is_a_kernel(features: FeatureMap) -> None:
    seen, _ = drawn(features, 25, 0)
    found = parts(seen, seen)
    assert len(found) == len(PARTS)
    for part in found:
        assert np.allclose(part, part.T)
        assert np.linalg.eigvalsh(part).min() > -1e-9


def test_noise_is_told_from_effects(features: FeatureMap) -> None:
    seen, values = drawn(features, 120, 0)
    scaled = (values - values.mean()) / values.std()
    noise = np.sqrt(0.2) * np.random.default_rng(0).standard_normal(120)
    assert fit_weights(parts(seen, seen), scaled).noise < 1e-3
    assert 0.1 < fit_weights(parts(seen, seen), scaled + noise).noise < 0.4


def test_unknown_archs_are_predicted_within_the_uncertainty(features: FeatureMap) -> None:
    seen, values = drawn(features, 60, 0)
    asked, truth = drawn(features, 40, 1)
    posterior = fit(seen, values, weighed=60)
    assert np.corrcoef(posterior.mean(asked), truth)[0, 1] > 0.99
    draws = posterior.draw(asked, 200, np.random.default_rng(0))
    assert np.allclose(draws.mean(axis=0), posterior.mean(asked), atol=5 * draws.std(axis=0).max() / 14)
    inside = np.abs(truth - draws.mean(axis=0)) < 3 * draws.std(axis=0) + 0.01 * values.std()
    assert inside.mean() > 0.9


def test_the_mean_is_the_kernel_times_what_was_solved(features: FeatureMap) -> None:
    seen, values = drawn(features, 30, 0)
    asked, _ = drawn(features, 20, 1)
    posterior = fit(seen, values, weighed=30)
    mean, covariance = posterior.joint(asked)
    assert posterior.mean(asked) == pytest.approx(posterior.told(mean))
    assert np.linalg.eigvalsh(covariance).min() > -1e-9


def test_held_out_predictions_are_those_of_a_model_without_the_fold(features: FeatureMap) -> None:
    seen, values = drawn(features, 30, 0)
    posterior = fit(seen, values, weighed=30)
    told = posterior.held_out(5)
    own = posterior.seen
    kernel = posterior.weights.sum(parts(own, own)) + posterior.weights.noise * np.eye(30)
    wanted = np.log(values) if posterior.logarithmic else values
    scaled = (wanted - posterior.centre) / posterior.scale
    out = np.arange(30) % 5 == 2
    expected = kernel[np.ix_(out, ~out)] @ np.linalg.solve(kernel[np.ix_(~out, ~out)], scaled[~out])
    assert told[out] == pytest.approx(expected, abs=1e-6)


def test_a_metric_that_multiplies_is_modelled_by_its_logarithm(features: FeatureMap) -> None:
    codes = features.encoding.sample(60, np.random.default_rng(0), tilted=True)
    values = np.exp(codes @ np.linspace(0.1, 0.6, 9))
    assert fit(features(codes), values, weighed=60).logarithmic
    assert not fit(features(codes), -values, weighed=60).logarithmic


def test_choices_that_matter_are_more_relevant(features: FeatureMap) -> None:
    codes = features.encoding.sample(80, np.random.default_rng(0))
    values = 5.0 * codes[:, 4] + 0.2 * codes[:, 1]
    posterior = fit(features(codes), values, weighed=80)
    order = np.concatenate(features.encoding.groups).tolist()
    of_choice = {
        order[place]: posterior.relevances[columns].mean()
        for place, columns in enumerate(features(codes).choices)
    }
    assert max(of_choice, key=lambda choice: of_choice[choice]) == 4
    assert of_choice[4] > 2 * of_choice[0]


def test_values_that_never_change_are_predicted(features: FeatureMap) -> None:
    seen, _ = drawn(features, 10, 0)
    posterior = fit(seen, np.full(10, 0.7), weighed=10)
    assert posterior.mean(seen) == pytest.approx(np.full(10, 0.7))
