from __future__ import annotations

from typing import Any, get_args

import pytest

from nestling.config import READ_BY, ConfigError, RunConfig, TrainConfig, override_config, parse_config
from nestling.space import Arch, Choice, SearchSpace, SpaceError
from nestling.train.strategies import (
    PUBLISHED,
    Alone,
    Attentive,
    DelayedShrinking,
    FixedList,
    ProgressiveShrinking,
    Sandwich,
    Shifting,
    SinglePath,
    SortedNet,
    Strategy,
    make_strategy,
    phases_of,
)


def cost(arch: Arch) -> float:
    return float(arch.integer("hidden") * arch.integer("depth"))


def made(space: SearchSpace, **keys: Any) -> Strategy:
    return make_strategy(TrainConfig(**keys), space=space, cost=cost)


def test_strategies_have_the_hyper_parameters_of_the_configuration(space: SearchSpace) -> None:
    small, large = space.smallest.to_json(), space.largest.to_json()
    cases: list[tuple[dict[str, Any], Strategy]] = [
        ({"strategy": "sandwich", "random_subnets": 1}, Sandwich(1)),
        ({"strategy": "sandwich", "divergence": "alpha"}, Sandwich(divergence="alpha")),
        ({"strategy": "sandwich", "constant_tail": False}, Sandwich(constant_tail=False)),
        (
            {"switch": 0.3, "ramp_epochs": 2.0, "random_subnets": 4, "sort_channels": False},
            DelayedShrinking(0.3, 2.0, 4, sort_channels=False),
        ),
        ({"divergence": "alpha"}, DelayedShrinking(divergence="alpha")),
        ({"strategy": "single-path"}, SinglePath()),
        ({"strategy": "sorted-net", "random_subnets": 3}, SortedNet(3)),
        ({"strategy": "sorted-net", "spread": 3}, SortedNet(2, tuple(space.spread(3)))),
        ({"strategy": "fixed-list", "subnets": (small, large, small)},
         FixedList((space.smallest, space.largest))),
        ({"strategy": "fixed-list", "spread": 2}, FixedList((space.smallest, space.largest))),
        ({"strategy": "alone"}, Alone()),
        ({"strategy": "alone", "subnets": (small,)}, Alone(space.smallest)),
        (
            {"strategy": "alone", "teachers": ("resnet18",), "teacher_weight": 2.0, "teacher_labels": 0.5},
            Alone(teacher=2.0, labels=0.5),
        ),
        ({"strategy": "alone", "teachers": ("resnet18",)}, Alone(teacher=1.0, labels=0.0)),
        (
            {"strategy": "progressive-shrinking", "teacher_weight": 0.5, "sort_channels": False},
            ProgressiveShrinking(phases_of(space), "frozen", 0.5, sort_channels=False),
        ),
        (
            {"strategy": "progressive-shrinking", "teachers": ("resnet18",)},
            ProgressiveShrinking(phases_of(space), "outside"),
        ),
    ]  # fmt: skip
    for keys, expected in cases:
        assert made(space, **keys) == expected
    assert make_strategy(TrainConfig(strategy="progressive-shrinking")) == ProgressiveShrinking(PUBLISHED)


def test_strategies_by_cost_have_the_hyper_parameters_of_the_configuration(space: SearchSpace) -> None:
    found = made(
        space,
        strategy="attentive",
        cost_bins=4,
        candidates=5,
        keeps="worst",
        random_subnets=1,
        divergence="alpha",
    )
    assert isinstance(found, Attentive)
    assert (found.candidates, found.keeps, found.random_subnets, found.divergence) == (5, "worst", 1, "alpha")
    assert len(found.likelihoods) == len(found.sampler.tilts) == 4
    assert found.sampler.edges == (3.0, 6.25, 9.5, 12.75, 16.0)
    shifting = made(space, strategy="shifting", cost_bins=3, floor=0.5, random_subnets=1)
    assert isinstance(shifting, Shifting)
    assert (len(shifting.sampler.tilts), shifting.floor, shifting.random_subnets) == (3, 0.5, 1)


def test_every_strategy_can_be_named_and_made(space: SearchSpace) -> None:
    names = get_args(TrainConfig.model_fields["strategy"].annotation)
    assert set(names) == set(READ_BY)
    kinds = {type(made(space, strategy=n, **({"spread": 2} if n == "fixed-list" else {}))) for n in names}
    assert len(kinds) == len(names)


def test_the_archs_that_are_drawn_depend_on_the_seed_alone(space: SearchSpace) -> None:
    config = TrainConfig(strategy="attentive", cost_bins=4)
    twice = [make_strategy(config, space=space, cost=cost, seed=1) for _ in range(2)]
    assert all(isinstance(found, Attentive) for found in twice)
    first, second = (found for found in twice if isinstance(found, Attentive))
    assert first.likelihoods == second.likelihoods
    assert first.sampler.model == second.sampler.model


@pytest.mark.parametrize("name", ["attentive", "shifting"])
def test_a_strategy_by_cost_needs_a_space_and_a_cost(space: SearchSpace, name: Any) -> None:
    config = TrainConfig(strategy=name)
    with pytest.raises(ValueError, match=f"{name!r} needs the search space"):
        make_strategy(config, cost=cost)
    with pytest.raises(ValueError, match=f"{name!r} needs the cost of an arch"):
        make_strategy(config, space=space)


def test_a_subnet_that_is_none_of_the_space_is_refused() -> None:
    space = SearchSpace("mobilenet", (Choice("hidden", (3, 5)),))
    config = TrainConfig(strategy="alone", subnets=('{"hidden":4}',))
    with pytest.raises(SpaceError, match=r"hidden is 4; its values are \[3, 5\]"):
        make_strategy(config, space=space)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy": "sandwich", "spread": 3},
         "train: Value error, spread is 3, but the strategy 'sandwich' does not read it; "
         "it is a key of sorted-net and fixed-list"),
        ({"strategy": "single-path", "divergence": "alpha"}, "it is a key of delayed-shrinking and sandwich"),
        ({"strategy": "sandwich", "teachers": ["x"]}, "it is a key of progressive-shrinking and alone"),
        ({"strategy": "fixed-list"}, "a fixed list names its subnets"),
        ({"strategy": "fixed-list", "spread": 3, "subnets": ["{}"]}, "1 subnets are named and 3 are spread"),
        ({"strategy": "alone", "subnets": ["{}", "{}"]}, "2 subnets are named, but one alone is trained"),
        ({"strategy": "single-path", "random_subnets": 4},
         "it is a key of delayed-shrinking and sandwich and sorted-net and attentive and shifting"),
        ({"strategy": "sandwich", "keeps": "worst"}, "it is a key of attentive"),
        ({"strategy": "attentive", "floor": 0.5}, "it is a key of shifting"),
        ({"coarse": 0.5}, "it is a key of single-path"),
        ({"strategy": "alone", "teacher_labels": 0.5}, "it is read only with teachers"),
        ({"strategy": "alone", "teacher_weight": 0.5}, "it is read only with teachers"),
        ({"curriculum_multiple": 4}, "it is read only with a curriculum"),
        ({"optimizer": "adamw", "momentum": 0.8}, "it is read only with the optimizer sgd or rmsprop"),
        ({"strategy": "sorted-net", "random_subnets": 0}, "give at least 1"),
        ({"strategy": "attentive", "random_subnets": 0}, "give at least 1"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs is 5, of 5 epochs in all"),
        ({"strategy": "sandwhich"}, "train.strategy: Input should be 'delayed-shrinking', 'sandwich'"),
    ],
)  # fmt: skip
def test_keys_that_a_strategy_does_not_read_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "space": "x.toml", "train": keys}, origin="x.toml")
    assert message in str(caught.value)
    assert "given: {" not in str(caught.value)


def test_another_strategys_numbers_may_stand_beside_its_own(space: SearchSpace) -> None:
    assert made(space, strategy="sandwich", switch=0.3, ramp_epochs=3.0, sort_channels=False) == Sandwich()
    assert made(space, strategy="single-path", random_subnets=2) == SinglePath()  # the default says nothing


def test_a_configuration_with_subnets_is_kept_by_an_override() -> None:
    train = TrainConfig(strategy="alone", subnets=('{"hidden":3}',))
    config = RunConfig(name="x", space="x.toml", train=train)
    assert override_config(config, ["search.trials=7"]).train == train
