"""The search that models guide: fit every metric, evolve on the models, validate what promises most.

Costs that can be computed for any arch are computed; all else is predicted from the trials. Nothing is kept
between calls: what is proposed follows from the trials, from what is being evaluated, and from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nestling.search.acquisition import Draws, choose, draw_directions, reach, scaling
from nestling.search.encoding import Codes, Encoding, Rows, anything, unlike
from nestling.search.evolution import best, evolve, mutate, ranks
from nestling.search.features import REFERENCE_ROWS, FeatureMap
from nestling.search.fitting import FEWEST, Model, fit_model
from nestling.search.losses import Exact, losses_of, violations_of
from nestling.search.objectives import Metrics, Problem
from nestling.search.result import Trial
from nestling.space import Arch

FRONT = 64
"""Trials nearest to the front whose metrics are drawn as well."""
POOL = 192
"""Candidates that are compared."""
DRAWS, DIRECTIONS = 48, 48
SMALLEST_BATCH, LARGEST_BATCH = 5, 20
MOST = 1500
"""Trials that models are fitted on at most, the best: fitting takes their number cubed."""


@dataclass(frozen=True, slots=True)
class Guided:
    """Proposes what models of all metrics expect to add the most hypervolume.

    Attributes:
        exact: metrics that are computed, not predicted.
        priors: numbers that may tell of a metric before anything is validated, such as zero-cost scores.
        elsewhere: metrics of archs that need not be validated again, all or some of those that are needed.
        starts: archs that are validated before models are asked: the ends, some between, and what tells most.
        population: of the evolution on the models.
        generations: of it.
    """

    exact: Mapping[str, Exact] = field(default_factory=dict)
    priors: Mapping[str, Exact] = field(default_factory=dict)
    elsewhere: Mapping[Arch, Metrics] = field(default_factory=dict)
    starts: int = 12
    population: int = 80
    generations: int = 32

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` archs to validate next; fewer where the space has no more that are unknown."""
        encoding = Encoding(problem.space)
        rng = np.random.default_rng([seed, len(trials), len(pending)])
        tried = encoding.codes([trial.arch for trial in trials] + list(pending))
        complete = [trial for trial in trials if trial.state == "complete"]
        chosen = _starts(encoding, tried, min(count, self.starts - len(tried)))
        if len(chosen) < count and len(complete) >= FEWEST:
            view = View.of(problem, FeatureMap(encoding, self.exact, self.priors), complete, self.elsewhere)
            waiting = np.concatenate([encoding.codes(pending), chosen])
            known = np.concatenate([tried, chosen])
            pool = self._pool(view, known, rng)
            chosen = np.concatenate([chosen, view.promising(pool, waiting, count - len(chosen), rng)])
        known = np.concatenate([tried, chosen])
        return encoding.archs(np.concatenate([chosen, anything(encoding, known, count - len(chosen), rng)]))

    def _pool(self, view: View, known: Codes, rng: np.random.Generator) -> Codes:
        """Unknown codes that the models like, near ones beside them, and far ones as far as there is room."""
        encoding = view.features.encoding
        evolved = evolve(
            encoding,
            view.score,
            view.front,
            population=self.population,
            generations=self.generations,
            rng=rng,
        )
        width = max(1, evolved.shape[1])
        twice = np.repeat(evolved, 2, axis=0)
        beside = [mutate(encoding, twice, rng, probability=changed / width) for changed in (1.5, 4.0)]
        # near mutants come first, of which many are known or alike: the pool has about 70 evolved codes, 70
        # to 90 near ones and 30 to 55 far ones. As many far as near ones found less, see docs/decisions.md
        codes = np.concatenate([evolved, *beside])
        return codes[unlike(codes, known)][:POOL]


@dataclass(frozen=True)
class View:
    """What the complete trials say of a problem.

    Attributes:
        problem: what is searched.
        features: what models see.
        front: the codes of the trials nearest to the front.
        losses: of all complete trials, as measured.
        violations: of them.
        models: of each metric that is not computed.
    """

    problem: Problem
    features: FeatureMap
    front: Codes
    losses: Rows
    violations: NDArray[np.float64]
    models: Mapping[str, Model]

    @classmethod
    def of(
        cls,
        problem: Problem,
        features: FeatureMap,
        complete: Sequence[Trial],
        elsewhere: Mapping[Arch, Metrics],
    ) -> View:
        """The view of complete trials, FEWEST or more; models also know what was found `elsewhere`."""
        codes = features.encoding.codes([trial.arch for trial in complete])
        metrics = {m: np.array([trial.metrics[m] for trial in complete]) for m in problem.needed()}
        losses, violations = losses_of(problem, metrics), violations_of(problem, metrics)
        if len(codes) > MOST:
            kept = np.sort(best(losses, violations, MOST))
            codes, losses, violations = codes[kept], losses[kept], violations[kept]
            metrics = {metric: values[kept] for metric, values in metrics.items()}
        seen = features(codes)
        models = {}
        for metric, values in metrics.items():
            if metric in features.exact:
                continue
            more = [arch for arch, found in elsewhere.items() if metric in found][:MOST]
            if not more:
                models[metric] = fit_model(features, seen, values)
                continue
            # first, where they stay; a trial that was taken over from there is not counted twice
            there = features.encoding.codes(more)
            new = unlike(np.concatenate([there, codes]), there[:0])[len(there) :] - len(there)
            known = np.array([elsewhere[arch][metric] for arch in more])
            both = features(np.concatenate([there, codes[new]]))
            models[metric] = fit_model(features, both, np.concatenate([known, values[new]]))
        front = codes[best(losses, violations, FRONT)]
        return cls(problem, features, front, losses, violations, models)

    def score(self, codes: Codes) -> tuple[Rows, NDArray[np.float64]]:
        """The losses and violations that are expected of codes."""
        seen = self.features(codes)
        told = {
            metric: self.models[metric].mean(seen)
            if metric in self.models
            else self.features.exact[metric](codes)
            for metric in self.problem.needed()
        }
        return losses_of(self.problem, told), violations_of(self.problem, told)

    def promising(self, pool: Codes, waiting: Codes, count: int, rng: np.random.Generator) -> Codes:
        """At most `count` codes of `pool` that are expected to add most beyond the trials and `waiting`."""
        drawn = self._draw(np.concatenate([self.front, waiting, pool]), rng)
        losses, violations = losses_of(self.problem, drawn), violations_of(self.problem, drawn)
        there = len(self.front) + len(waiting)
        if not (self.violations <= 0).any() and not (violations <= 0).any():
            # nothing is likely to keep the limits: come nearer to them
            nearest: Codes = pool[violations[:, there:].mean(axis=0).argsort(kind="stable")[:count]]
            return nearest
        first = ranks(self.losses, self.violations) == 0
        if not (self.violations <= 0).any():
            first[:] = True  # there is no front yet: anything that keeps the limits is one
        least, width, reference = scaling(self.losses[first], self.losses)
        losses = (losses - least) / width
        directions = draw_directions(DRAWS, DIRECTIONS, losses.shape[2], rng)
        kept = violations <= 0
        reached = reach(losses[:, :there], reference, directions) * kept[:, :there, None]
        places = choose(
            losses[:, there:],
            kept[:, there:],
            reached.max(axis=1),
            reference=reference,
            directions=directions,
            count=count,
        )
        return pool[places]

    def _draw(self, codes: Codes, rng: np.random.Generator) -> dict[str, Draws]:
        """Every metric of `codes`, of all together (draws, N)."""
        seen = self.features(codes)
        return {
            metric: self.models[metric].draw(seen, DRAWS, rng)
            if metric in self.models
            else np.broadcast_to(self.features.exact[metric](codes), (DRAWS, len(codes)))
            for metric in self.problem.needed()
        }


def batch_size(tried: int) -> int:
    """How many candidates to propose at once after `tried` trials, by one worker.

    Few at first, when each teaches much and models are fitted fast; more later. A search begun anew from the
    same trials comes to the same batches.
    """
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, tried // LARGEST_BATCH))


def _starts(encoding: Encoding, tried: Codes, count: int) -> Codes:
    """The ends of the space and two archs between them, then archs unlike all before, of every size."""
    found = tried[:0]
    if count <= 0:
        return found
    first = encoding.codes([encoding.space.largest, encoding.space.smallest, *encoding.space.spread(4)])
    found = first[unlike(first, tried)][:count]
    candidates = encoding.sample(REFERENCE_ROWS, np.random.default_rng(0), tilted=True)
    rows = encoding.one_hot(candidates)
    while len(found) < count:
        near = encoding.one_hot(np.concatenate([tried, found]))
        distances = (rows**2).sum(axis=1)[:, None] + (near**2).sum(axis=1)[None] - 2 * rows @ near.T
        farthest = distances.min(axis=1)
        if farthest.max() < 0.5:  # every candidate is known
            break
        found = np.concatenate([found, candidates[[int(farthest.argmax())]]])
    return found
