"""The searches of `search_efficiency.py`, and the hypervolume of what each has validated."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from search_oracles import Oracle

from nestling.search import Trial, batch_size, hypervolume, nondominated
from nestling.search.encoding import Encoding
from nestling.search.evolution import evolve
from nestling.search.proposing import make_proposer
from nestling.search.samplers import directions, distributions, make_sampler, quiet

MARKS = (50, 100, 250, 500, 1000)


@dataclass(frozen=True, slots=True)
class Method:
    """A search.

    Attributes:
        strategy: its name, or that of a sampler of Optuna.
        batch: how many are proposed at once; None for as many as suit the number of trials.
        computes: whether metrics that can be computed are.
        most: the largest number of evaluations that it is given.
        asked: whether Optuna's own study asks, trial by trial.
    """

    strategy: str
    batch: int | None = 50
    computes: bool = True
    most: float = math.inf
    asked: bool = False


METHODS = {
    "random": Method("random"),
    "Optuna NSGA-II": Method("NSGAIISampler", asked=True),
    # the next two fit models anew for each trial: TPE takes 15 s for 300 and minutes for 1,000 trials, the
    # Gaussian process, whose models take the cube of the trials, over a minute for 50 and hours for 1,000
    "Optuna TPE": Method("TPESampler", asked=True, most=500),
    "Optuna GP": Method("GPSampler", asked=True, most=50),
    "LINAS": Method("linas", computes=False),
    "LINAS, costs computed": Method("linas"),
    "ours, costs predicted": Method("predictor", batch=None, computes=False),
    "ours": Method("predictor", batch=None),
}


def volume(oracle: Oracle, encoding: Encoding, trials: Sequence[Trial]) -> float:
    """The true hypervolume of the archs on the measured front."""
    problem = oracle.problem
    measured = np.array([problem.losses(trial.metrics) for trial in trials])
    front = [trial.arch for trial, keep in zip(trials, nondominated(measured), strict=True) if keep]
    return hypervolume(oracle.losses(encoding.codes(front)), oracle.reference)


def run(method: Method, oracle: Oracle, *, seed: int, budget: int) -> dict[str, Any]:
    """The hypervolumes at the marks up to `budget`, and the seconds that proposing took."""
    encoding = Encoding(oracle.problem.space)
    noise = np.random.default_rng([seed, 77])
    trials: list[Trial] = []
    volumes: dict[str, float] = {}
    seconds = 0.0
    until = int(min(budget, method.most))
    asking = _Asking(method, oracle, seed) if method.asked else None
    proposer = (
        None
        if asking
        else make_proposer(method.strategy, oracle.problem, exact=oracle.exact if method.computes else {})
    )
    while len(trials) < until:
        began = time.perf_counter()
        if proposer is None:
            assert asking is not None
            archs = [asking.ask()]
        else:
            count = min(method.batch or batch_size(len(trials)), until - len(trials))
            archs = proposer.propose(oracle.problem, trials, pending=[], count=count, seed=seed)
        seconds += time.perf_counter() - began
        for arch, metrics in zip(archs, oracle.measured(encoding.codes(archs), noise), strict=True):
            trials.append(Trial(len(trials), arch, metrics, "complete"))
            if asking is not None:
                asking.tell(trials[-1])
            if len(trials) in MARKS:
                volumes[str(len(trials))] = volume(oracle, encoding, trials)
    return {"volumes": volumes, "proposing_ms": 1000 * seconds / len(trials)}


class _Asking:
    """Optuna's sampler with a study of its own, as its users would run it."""

    def __init__(self, method: Method, oracle: Oracle, seed: int) -> None:
        self._problem = oracle.problem
        with quiet():
            sampler = make_sampler(method.strategy, oracle.problem, seed=seed, population=50)
            self._study = optuna.create_study(directions=directions(oracle.problem), sampler=sampler)
        self._distributions = distributions(oracle.problem)

    def ask(self) -> Any:
        with quiet():
            self._trial = self._study.ask(self._distributions)
        space = self._problem.space
        return space.canonical({**space.smallest, **self._trial.params})

    def tell(self, trial: Trial) -> None:
        with quiet():
            self._study.tell(self._trial, [trial.metrics[o.name] for o in self._problem.objectives])


def best_known(
    oracle: Oracle, *, seed: int = 0, population: int = 200, generations: int = 1000
) -> dict[str, Any]:
    """The front that NSGA-II finds on the truth itself, and its hypervolume."""
    encoding = Encoding(oracle.problem.space)

    def score(codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return oracle.losses(codes), np.zeros(len(codes))

    found = evolve(
        encoding,
        score,
        encoding.codes([oracle.problem.space.smallest, oracle.problem.space.largest]),
        population=population,
        generations=generations,
        rng=np.random.default_rng(seed),
    )
    losses = oracle.losses(found)
    front = losses[nondominated(losses)]
    return {
        "seed": seed,
        "evaluations": population * (generations + 1),
        "volume": hypervolume(front, oracle.reference),
        "front": sorted(front.tolist(), key=lambda point: point[-1]),
    }
