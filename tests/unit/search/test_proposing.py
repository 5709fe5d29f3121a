"""Every proposer: archs that are unknown, the same for the same trials, to the end of a space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from nestling.search import Metrics, Problem, batch_size, nondominated
from nestling.search.baselines import Linas
from nestling.search.guided import Guided
from nestling.search.proposing import Proposer, make_proposer
from nestling.search.result import SearchResult, Trial
from nestling.space import Arch, Choice, SearchSpace, Value

OWN = ("predictor", "random", "evolution", "ofa_evolution", "linas")
ALL = (*OWN, "NSGAIISampler", "NSGAIIISampler", "TPESampler", "RandomSampler")

Evaluate = Callable[[Arch], Metrics]


def small(name: str, problem: Problem) -> Proposer:
    """The proposer called `name`, with populations and generations that suit a test."""
    if name == "predictor":
        return Guided(population=12, generations=3)
    if name == "linas":
        return Linas(population=6, generations=3)
    return make_proposer(name, problem, population=6)


def searched(
    proposer: Proposer, problem: Problem, evaluate: Evaluate, *, budget: int, batch: int = 5, seed: int = 0
) -> tuple[Trial, ...]:
    """What `proposer` tries; every seventh arch fails."""
    trials: list[Trial] = []
    while len(trials) < budget:
        archs = proposer.propose(
            problem, trials, pending=[], count=min(batch, budget - len(trials)), seed=seed
        )
        if not archs:
            break
        for arch in archs:
            failed = len(trials) % 7 == 6
            metrics = {} if failed else evaluate(arch)
            trials.append(Trial(len(trials), arch, metrics, "failed" if failed else "complete"))
    return tuple(trials)


@pytest.mark.parametrize("name", ALL)
def test_what_is_proposed_is_unknown_and_of_the_space(name: str, problem: Problem, toy: Evaluate) -> None:
    proposer = small(name, problem)
    trials = searched(proposer, problem, toy, budget=20)
    pending = [arch for arch in problem.space.walk() if arch not in {t.arch for t in trials}][:30]
    archs = proposer.propose(problem, trials, pending=pending, count=6, seed=1)
    assert len(archs) == 6
    everything = [*[trial.arch for trial in trials], *pending, *archs]
    assert len(set(everything)) == len(everything)
    assert all(problem.space.canonical(arch) == arch for arch in archs)


@pytest.mark.parametrize("name", ALL)
def test_the_same_trials_and_seed_give_the_same_archs(name: str, problem: Problem, toy: Evaluate) -> None:
    trials = searched(make_proposer("random", problem), problem, toy, budget=25)

    def proposed(seed: int) -> list[Arch]:
        made = small(name, problem)
        return made.propose(problem, trials, pending=[problem.space.smallest], count=4, seed=seed)

    assert proposed(3) == proposed(3)
    assert any(proposed(3) != proposed(seed) for seed in range(4, 8))


@pytest.mark.parametrize("name", OWN)
def test_a_small_space_is_searched_to_its_end(name: str, problem: Problem, toy: Evaluate) -> None:
    few_archs = problem.space.only({"resolution": [16], "width": [1, 2], "precision": ["fp32"]})
    few = Problem(few_archs, problem.objectives)
    trials = searched(small(name, few), few, toy, budget=99, batch=3)
    assert {trial.arch for trial in trials} == set(few_archs.walk())
    assert len(trials) == few_archs.size


@pytest.mark.parametrize("name", OWN)
def test_one_open_choice_is_enough(name: str, toy: Evaluate) -> None:
    fixed: dict[str, Value] = {"width": 2, "b2.kernel": 3, "precision": "fp32", "resolution": 16}
    space = SearchSpace("toy", (Choice("depth", tuple(range(1, 10))),)).with_constants(fixed)
    problem = Problem.parse(space, objectives=["top1"], limits={})
    assert len(searched(small(name, problem), problem, toy, budget=20, batch=2)) == 9


@pytest.mark.parametrize("objectives", [["top1"], ["top1", "latency_ms", "size_mb"]])
@pytest.mark.parametrize("name", OWN)
def test_any_number_of_objectives_can_be_searched(
    name: str, objectives: Sequence[str], problem: Problem, toy: Evaluate
) -> None:
    asked = Problem.parse(problem.space, objectives=objectives, limits={})
    assert len(searched(small(name, asked), asked, toy, budget=20)) == 20


@pytest.mark.parametrize("name", OWN)
def test_metrics_that_never_change_are_no_obstacle(name: str, problem: Problem) -> None:
    def flat(arch: Arch) -> Metrics:
        del arch
        return {"top1": 0.5, "latency_ms": 2.0}

    assert len(searched(small(name, problem), problem, flat, budget=20)) == 20


@pytest.mark.parametrize("name", OWN)
def test_nothing_but_failures_is_no_obstacle(name: str, problem: Problem) -> None:
    trials = [Trial(n, arch, {}, "failed") for n, arch in enumerate(list(problem.space.walk())[:30])]
    made = small(name, problem)
    archs = made.propose(problem, trials, pending=[], count=5, seed=0)
    assert len(set(archs) - {trial.arch for trial in trials}) == 5


def test_the_chain_of_nested_networks_ends(problem: Problem) -> None:
    made = make_proposer("sorted_net", problem)
    chain = made.propose(problem, [], pending=[], count=99, seed=0)
    assert chain[:2] == [problem.space.smallest, problem.space.largest]
    by_size = sorted(chain, key=lambda arch: (arch["width"], arch["resolution"], arch["depth"]))
    for less, more in pairwise(by_size):
        for choice in problem.space.choices:
            assert choice.values.index(less[choice.name]) <= choice.values.index(more[choice.name])
    done = [Trial(n, arch, {}, "failed") for n, arch in enumerate(chain)]
    assert made.propose(problem, done, pending=[], count=3, seed=0) == []


def test_an_evolution_under_a_limit_finds_what_is_best_within_it(problem: Problem, toy: Evaluate) -> None:
    asked = Problem.parse(problem.space, objectives=["top1"], limits={"latency_ms": 6.0})
    truth = max(
        (toy(arch) for arch in problem.space.walk() if toy(arch)["latency_ms"] <= 6.0),
        key=lambda metrics: metrics["top1"],
    )
    for name, tolerance in (("predictor", 0.001), ("ofa_evolution", 0.03)):
        trials = searched(small(name, asked), asked, toy, budget=50)
        assert SearchResult(asked, trials).front[0].metrics["top1"] >= truth["top1"] - tolerance, name


def test_models_find_the_few_networks_that_keep_narrow_limits(problem: Problem, toy: Evaluate) -> None:
    archs = sorted(problem.space.walk(), key=lambda arch: toy(arch)["latency_ms"])
    wanted = toy(archs[70])
    limits = {"latency_ms": wanted["latency_ms"] * 1.02, "top1": wanted["top1"] - 0.002}
    asked = Problem.parse(problem.space, objectives=["top1", "latency_ms"], limits=limits)
    kept = [arch for arch in archs if asked.feasible(toy(arch))]
    assert len(kept) < 0.2 * len(archs)
    points = np.array([asked.losses(toy(arch)) for arch in kept])
    front = {arch for arch, best in zip(kept, nondominated(points), strict=True) if best}
    trials = searched(small("predictor", asked), asked, toy, budget=40)
    assert front <= {trial.arch for trial in trials}


def test_batches_grow_with_the_trials() -> None:
    sizes = [batch_size(tried) for tried in range(0, 1001, 10)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (5, 20)


def test_an_unknown_strategy_gets_the_nearest_name(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"no search strategy 'evolutoin'; did you mean 'evolution'\?"):
        make_proposer("evolutoin", problem)
    with pytest.raises(ValueError, match=r"no search strategy 'NSGA2Sampler'; .*NSGAIISampler"):
        make_proposer("NSGA2Sampler", problem)
    with pytest.raises(ValueError, match="CmaEsSampler cannot be used here"):
        make_proposer("CmaEsSampler", problem)


def test_a_hub_sampler_without_the_hub_says_what_is_missing(problem: Problem) -> None:
    with pytest.raises(ValueError, match="install the package optunahub"):
        make_proposer("moocma", problem).propose(problem, [], pending=[], count=1, seed=0)
