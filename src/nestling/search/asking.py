"""Optuna's samplers as proposers: a study in memory is made of the trials, and asked.

A study that is made anew knows what was tried, not what a sampler noted besides. Generations of genetic
samplers are counted off the trials; a sampler that walks through a plan of its own starts it again and is
asked until it comes to something unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from nestling.search.encoding import Codes, Encoding, anything, unlike
from nestling.search.objectives import Problem
from nestling.search.result import Trial
from nestling.search.samplers import directions, distributions, make_sampler, quiet
from nestling.search.tables import violations
from nestling.space import Arch

REPEATED = 20
"""Known archs that a sampler may propose for each that is wanted, before random ones take their place."""
MO_CMA = "moocma"
"""Multi-objective CMA-ES, which OptunaHub has."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Proposes what a sampler of Optuna does.

    Attributes:
        sampler: its class name, or `moocma`, which needs the package optunahub and the network.
        population: for samplers that have one.
    """

    sampler: str
    population: int = 50

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` archs that are unknown; fewer where the space has no more."""
        encoding = Encoding(problem.space)
        known = encoding.codes([trial.arch for trial in trials] + list(pending))
        rng = np.random.default_rng([seed, len(trials), len(pending)])
        drawn = int(rng.integers(2**31))
        with quiet():
            study = self._study(problem, trials, encoding, seed=drawn)
            asked: dict[str, BaseDistribution] = self._distributions(problem)
            for arch in pending:  # a sampler that minds what is being evaluated sees it
                study.enqueue_trial(self._params(encoding, arch))
                study.ask(asked)
            found = known[:0]
            for _ in range(REPEATED * count):
                if len(found) >= count:
                    break
                row = self._codes(encoding, study.ask(asked).params)
                if len(unlike(row, np.concatenate([known, found]))):
                    found = np.concatenate([found, row])
        known = np.concatenate([known, found])
        return encoding.archs(np.concatenate([found, anything(encoding, known, count - len(found), rng)]))

    def _study(
        self, problem: Problem, trials: Sequence[Trial], encoding: Encoding, *, seed: int
    ) -> optuna.Study:
        sampler = self._made(problem, seed=seed)
        study = optuna.create_study(directions=directions(problem), sampler=sampler)
        generation = f"{type(sampler).__name__}:generation"
        asked = self._distributions(problem)
        finished = 0
        for trial in trials:
            complete = trial.state == "complete"
            if trial.state == "duplicate":
                continue
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if complete else TrialState.FAIL,
                    params=self._params(encoding, trial.arch),
                    distributions=asked,
                    values=[trial.metrics[o.name] for o in problem.objectives] if complete else None,
                    system_attrs={generation: finished // self.population},
                    constraints=violations(problem, trial),
                )
            )
            finished += complete
        return study

    def _made(self, problem: Problem, *, seed: int) -> BaseSampler:
        if self.sampler != MO_CMA:
            return make_sampler(self.sampler, problem, seed=seed, population=self.population)
        try:
            import optunahub
        except ImportError as error:
            raise ValueError(
                f"the sampler {MO_CMA} is OptunaHub's; install the package optunahub, or take NSGAIISampler"
            ) from error
        made: BaseSampler = optunahub.load_module("samplers/mocma").MoCmaSampler(
            popsize=self.population, seed=seed
        )
        return made

    def _distributions(self, problem: Problem) -> dict[str, BaseDistribution]:
        if self.sampler != MO_CMA:
            return distributions(problem)
        # it knows numbers alone: places among the values
        return {c.name: IntDistribution(0, len(c.values) - 1) for c in problem.space.open_choices}

    def _params(self, encoding: Encoding, arch: Arch) -> dict[str, Any]:
        if self.sampler != MO_CMA:
            return {name: arch[name] for name in encoding.names}
        return dict(zip(encoding.names, encoding.codes([arch])[0].tolist(), strict=True))

    def _codes(self, encoding: Encoding, params: dict[str, Any]) -> Codes:
        if self.sampler == MO_CMA:
            return encoding.canonical(np.array([[params[name] for name in encoding.names]], dtype=np.int64))
        return encoding.codes([encoding.space.canonical({**encoding.space.smallest, **params})])
