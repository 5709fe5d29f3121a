"""Searches that models do not guide, and LINAS: what others do, behind the same interface.

Each is a pure function of the trials, of what is being evaluated, and of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nestling.search.encoding import Codes, Encoding, anything, unlike
from nestling.search.evolution import best, evolve, mutate
from nestling.search.losses import Exact, losses_of, violations_of
from nestling.search.objectives import Problem
from nestling.search.predictors import support
from nestling.search.result import Trial
from nestling.space import Arch

ATTEMPTS = 200
"""Children made for each that is wanted, where most are known already."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """Proposes random archs of every size; with each choice uniform, costs would crowd in the middle."""

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` random archs that are unknown; fewer where the space has no more."""
        encoding, known, rng = _begin(problem, trials, pending, seed)
        return encoding.archs(anything(encoding, known, count, rng))


@dataclass(frozen=True, slots=True)
class Evolution:
    """Regularised evolution: the best of some of the latest mutates (Real et al. 2019, arXiv 1802.01548).

    With several objectives the best is that of the first front with the most room around it.

    Attributes:
        population: how many of the latest trials may be parents.
        tournament: part of them from which the best is taken.
    """

    population: int = 50
    tournament: float = 0.25

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` unknown archs, each a mutated winner; random ones until the population is full."""
        encoding, known, rng = _begin(problem, trials, pending, seed)
        latest = [trial for trial in trials if trial.state == "complete"][-self.population :]
        missing = max(0, self.population - len(trials) - len(pending))
        found = anything(encoding, known, min(count, missing), rng)
        if latest:
            codes = encoding.codes([trial.arch for trial in latest])
            order = _order(problem, latest)
            places = np.argsort(order)  # of each trial, how many are better
            size = max(1, round(self.tournament * len(latest)))
            width = max(1, codes.shape[1])

            def bear(wanted: int) -> Codes:
                entered = rng.random((wanted, len(latest))).argpartition(size - 1, axis=1)[:, :size]
                winners = order[places[entered].min(axis=1)]
                return mutate(encoding, codes[winners], rng, probability=1.0 / width)

            found = _fill(known, found, count, bear)
        known = np.concatenate([known, found])
        return encoding.archs(np.concatenate([found, anything(encoding, known, count - len(found), rng)]))


@dataclass(frozen=True, slots=True)
class OfaEvolution:
    """Once-for-all's evolution of the first objective under the limits (Cai et al. 2020, arXiv 1908.09791).

    Other objectives are not looked at: give a limit on each cost, or the largest network wins.

    Attributes:
        population: how many archs a generation has.
        parents: part of it that is kept.
        mutated: probability that a choice mutates.
    """

    population: int = 100
    parents: float = 0.25
    mutated: float = 0.1

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` unknown archs: half mutated, half crossed; random ones until the population is full."""
        encoding, known, rng = _begin(problem, trials, pending, seed)
        complete = [trial for trial in trials if trial.state == "complete"]
        missing = max(0, self.population - len(trials) - len(pending))
        found = anything(encoding, known, min(count, missing), rng)
        if complete:
            only = Problem(problem.space, problem.objectives[:1], problem.limits)
            kept = _order(only, complete)[: max(2, round(self.parents * self.population))]
            codes = encoding.codes([complete[place].arch for place in kept])

            def bear(wanted: int) -> Codes:
                pairs = rng.integers(0, len(codes), size=(2, wanted))
                crossed = np.where(
                    rng.random((wanted, codes.shape[1])) < 0.5, codes[pairs[0]], codes[pairs[1]]
                )
                anew = rng.random((wanted, codes.shape[1])) < self.mutated
                drawn = rng.integers(0, encoding.levels, size=crossed.shape)
                mutants = np.where(anew, drawn, codes[pairs[0]])
                half = rng.random((wanted, 1)) < 0.5
                return encoding.canonical(np.where(half, mutants, crossed))

            found = _fill(known, found, count, bear)
        known = np.concatenate([known, found])
        return encoding.archs(np.concatenate([found, anything(encoding, known, count - len(found), rng)]))


@dataclass(frozen=True, slots=True)
class Linas:
    """LINAS: validates what NSGA-II finds on predictors, again and again (arXiv 2202.12954).

    Begins with a random population. Predictors are ridge regression on one-hot values and a support vector
    machine on what it leaves, fitted on all trials.

    Attributes:
        population: how many archs are validated in a round, and how many NSGA-II keeps.
        generations: of NSGA-II in a round; 400 of 50 are the published 20,000 predicted evaluations.
        exact: metrics that are computed, not predicted.
    """

    population: int = 50
    generations: int = 400
    exact: Mapping[str, Exact] = field(default_factory=dict)

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """The `count` best unknown archs of the population that NSGA-II comes to, random ones at first."""
        encoding, known, rng = _begin(problem, trials, pending, seed)
        complete = [trial for trial in trials if trial.state == "complete"]
        missing = max(0, self.population - len(trials) - len(pending))
        found = anything(encoding, known, min(count, missing), rng)
        if len(found) < count and len(complete) > 1:
            codes = encoding.codes([trial.arch for trial in complete])
            seen = encoding.one_hot(codes)
            models = {
                metric: stacked(seen, np.array([trial.metrics[metric] for trial in complete]))
                for metric in problem.needed()
                if metric not in self.exact
            }

            def score(asked: Codes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
                rows = encoding.one_hot(asked)
                told = {m: models[m](rows) if m in models else self.exact[m](asked) for m in problem.needed()}
                return losses_of(problem, told), violations_of(problem, told)

            evolved = evolve(
                encoding,
                score,
                known[:0],
                population=self.population,
                generations=self.generations,
                rng=rng,
            )
            new = evolved[unlike(evolved, np.concatenate([known, found]))]
            found = np.concatenate([found, new[: count - len(found)]])
        known = np.concatenate([known, found])
        return encoding.archs(np.concatenate([found, anything(encoding, known, count - len(found), rng)]))


def stacked(
    rows: NDArray[np.float64], values: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """What predicts `values` (N,) from `rows` (N, features): ridge, and an RBF-SVR on what it leaves."""
    # takes a second to import, which only those who fit it should wait for
    from sklearn.linear_model import Ridge

    centre, scale = float(values.mean()), float(values.std()) or 1.0
    scaled = (values - centre) / scale
    ridge = Ridge(alpha=1.0).fit(rows, scaled)
    slopes, rest = ridge.coef_, float(ridge.intercept_)
    machine = support(rows, scaled - ridge.predict(rows), epsilon=0.01)

    def predict(asked: NDArray[np.float64]) -> NDArray[np.float64]:
        told: NDArray[np.float64] = centre + scale * (asked @ slopes + rest + machine(asked))
        return told

    return predict


@dataclass(frozen=True, slots=True)
class SortedNet:
    """No search: the chain of nested networks, each a part of the next (SortedNet, arXiv 2309.00255)."""

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """The next archs of the chain, its ends first, then ever finer; none when it is done.

        `seed` changes nothing.
        """
        del seed
        known = {trial.arch for trial in trials} | set(pending)
        finest = 2 * sum(len(choice.values) for choice in problem.space.open_choices)
        found: dict[Arch, None] = {}
        links = 2
        while len(found) < count and links < 2 * finest + 2:
            found |= dict.fromkeys(arch for arch in problem.space.spread(links) if arch not in known)
            links = 2 * links - 1
        return list(found)[:count]


def _begin(
    problem: Problem, trials: Sequence[Trial], pending: Sequence[Arch], seed: int
) -> tuple[Encoding, Codes, np.random.Generator]:
    encoding = Encoding(problem.space)
    known = encoding.codes([trial.arch for trial in trials] + list(pending))
    return encoding, known, np.random.default_rng([seed, len(trials), len(pending)])


def _order(problem: Problem, complete: Sequence[Trial]) -> NDArray[np.int64]:
    """The places of trials from best to worst."""
    told = {m: np.array([trial.metrics[m] for trial in complete]) for m in problem.needed()}
    return best(losses_of(problem, told), violations_of(problem, told), len(complete))


def _fill(known: Codes, found: Codes, count: int, bear: Callable[[int], Codes]) -> Codes:
    """`found` and what `bear` makes that is unknown, up to `count`; fewer where it makes hardly any."""
    for _ in range(ATTEMPTS):
        if len(found) >= count:
            break
        made = bear(count)
        found = np.concatenate([found, made[unlike(made, np.concatenate([known, found]))]])
    return found[:count]
