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
from nestling.search.gaussian import Features, Posterior, fit
from nestling.search.losses import Exact, losses_of, violations_of
from nestling.search.objectives import Problem
from nestling.search.result import Trial
from nestling.space import Arch

FEWEST = 6
"""Complete trials that models are fitted on at least."""
REFERENCE_ROWS = 512
FRONT = 64
POOL = 256
DRAWS, DIRECTIONS = 48, 48


@dataclass(frozen=True, slots=True)
class Guided:
    """Proposes what models of all metrics expect to add the most hypervolume.

    Attributes:
        exact: metrics that are computed, not predicted.
        priors: numbers that may tell of a metric before anything is validated, such as zero-cost scores.
        starts: archs that are validated before models are asked: the ends, some between, and what tells most.
        population: of the evolution on the models.
        generations: of it.
    """

    exact: Mapping[str, Exact] = field(default_factory=dict)
    priors: Mapping[str, Exact] = field(default_factory=dict)
    starts: int = 12
    population: int = 96
    generations: int = 40

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` archs to validate next; fewer where the space has no more that are unknown."""
        encoding = Encoding(problem.space)
        rng = np.random.default_rng([seed, len(trials)])
        tried = encoding.codes([trial.arch for trial in trials] + list(pending))
        complete = [trial for trial in trials if trial.state == "complete"]
        chosen = _starts(encoding, tried, min(count, self.starts - len(tried)))
        if len(chosen) < count and len(complete) >= FEWEST:
            view = _View.of(self, problem, encoding, complete)
            chosen = np.concatenate([chosen, view.promising(tried, chosen, pending, count, rng)])
        known = np.concatenate([tried, chosen])
        chosen = np.concatenate([chosen, anything(encoding, known, count - len(chosen), rng)])
        return encoding.archs(chosen)


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
        if farthest.max() < 0.5:
            break
        found = np.concatenate([found, candidates[[int(farthest.argmax())]]])
    return found


@dataclass(frozen=True)
class _View:
    """Models of a problem's metrics, fitted on the complete trials."""

    plan: Guided
    problem: Problem
    encoding: Encoding
    known: Codes
    metrics: Mapping[str, NDArray[np.float64]]
    models: Mapping[str, Posterior]
    trend: tuple[NDArray[np.float64], NDArray[np.float64]]
    values: tuple[NDArray[np.float64], float]

    @classmethod
    def of(cls, plan: Guided, problem: Problem, encoding: Encoding, complete: Sequence[Trial]) -> _View:
        known = encoding.codes([trial.arch for trial in complete])
        metrics = {m: np.array([trial.metrics[m] for trial in complete]) for m in problem.needed()}
        sample = encoding.one_hot(encoding.sample(REFERENCE_ROWS, np.random.default_rng(0), tilted=True))
        centre = sample.mean(axis=0)
        length = float(np.sqrt(((sample - centre) ** 2).sum(axis=1).mean())) or 1.0
        trend = _trend(plan, encoding, known)
        spread = trend.std(axis=0)
        of_trend = (trend.mean(axis=0), np.where(spread > 1e-12, spread, 1.0))
        view = cls(plan, problem, encoding, known, metrics, {}, of_trend, (centre, length))
        seen = view.features(known)
        weighed = settled(len(known))
        models = {m: fit(seen, v, weighed=weighed) for m, v in metrics.items() if m not in plan.exact}
        return cls(plan, problem, encoding, known, metrics, models, of_trend, (centre, length))

    def features(self, codes: Codes) -> Features:
        """What the models see of codes."""
        trend = (_trend(self.plan, self.encoding, codes) - self.trend[0]) / self.trend[1]
        widths = [int(self.encoding.levels[g].sum()) for g in self.encoding.groups]
        ends = np.cumsum(widths)
        order = np.concatenate([self.encoding.feature_columns(g) for g in self.encoding.groups])
        values = ((self.encoding.one_hot(codes) - self.values[0]) / self.values[1])[:, order]
        stages = tuple(slice(int(end - width), int(end)) for end, width in zip(ends, widths, strict=True))
        return Features(trend, values, stages)

    def score(self, codes: Codes) -> tuple[Rows, NDArray[np.float64]]:
        """The losses and violations that the models expect."""
        seen = self.features(codes) if self.models else None
        told: dict[str, NDArray[np.float64]] = {}
        for metric in self.problem.needed():
            exact = self.plan.exact.get(metric)
            told[metric] = exact(codes) if exact is not None else self.models[metric].mean(seen)
        return losses_of(self.problem, told), violations_of(self.problem, told)

    def promising(
        self, tried: Codes, chosen: Codes, pending: Sequence[Arch], count: int, rng: np.random.Generator
    ) -> Codes:
        """The codes that are expected to add most to the front, none of them `tried` or `chosen`."""
        observed, broken = losses_of(self.problem, self.metrics), violations_of(self.problem, self.metrics)
        order = best(observed, broken, FRONT)
        front = self.known[order]
        codes = self._pool(np.concatenate([tried, chosen]), front, rng)
        waiting = np.concatenate([self.encoding.codes(pending), chosen])
        drawn = self._draw(np.concatenate([front, waiting, codes]), rng)
        losses, violations = losses_of(self.problem, drawn), violations_of(self.problem, drawn)
        settled_ = len(front) + len(waiting)
        want = count - len(chosen)
        if not (broken <= 0).any() and not (violations <= 0).any():
            return codes[violations[:, settled_:].mean(axis=0).argsort(kind="stable")[:want]]
        ranked = ranks(observed, broken)
        least, width, reference = scaling(observed[ranked == 0])
        losses = (losses - least) / width
        directions = draw_directions(DRAWS, DIRECTIONS, losses.shape[2], rng)
        pushed = reach(losses[:, :settled_], reference, directions) * (violations <= 0)[:, :settled_, None]
        places = choose(
            losses[:, settled_:],
            (violations <= 0)[:, settled_:],
            pushed.max(axis=1),
            reference=reference,
            directions=directions,
            count=want,
        )
        return codes[places]

    def _pool(self, tried: Codes, front: Codes, rng: np.random.Generator) -> Codes:
        """Unknown codes that the models like, and some beside them."""
        plan = self.plan
        evolved = evolve(
            self.encoding,
            self.score,
            front,
            population=plan.population,
            generations=plan.generations,
            rng=rng,
        )
        beside = [
            mutate(self.encoding, np.repeat(evolved, 2, axis=0), rng, probability=p / evolved.shape[1])
            for p in (1.5, 4.0)
        ]
        codes = np.concatenate([evolved, *beside])
        return codes[unlike(codes, tried)][:POOL]

    def _draw(self, codes: Codes, rng: np.random.Generator) -> dict[str, Draws]:
        """Every metric of `codes`, drawn together (draws, N)."""
        seen = self.features(codes) if self.models else None
        drawn = {}
        for metric in self.problem.needed():
            exact = self.plan.exact.get(metric)
            if exact is not None:
                drawn[metric] = np.broadcast_to(exact(codes), (DRAWS, len(codes)))
            else:
                drawn[metric] = self.models[metric].draw(seen, DRAWS, rng)
        return drawn


def settled(count: int) -> int:
    """`count`, rounded down so that it changes every tenth trial or so where they are many."""
    rounded = FEWEST
    while (larger := max(rounded + 1, int(rounded * 1.15))) <= count:
        rounded = larger
    return min(rounded, count)


def _trend(plan: Guided, encoding: Encoding, codes: Codes) -> Rows:
    """The size of networks, the logarithms of their exact costs, and priors (N, trends)."""
    columns = [encoding.size(codes)]
    for exact in plan.exact.values():
        values = exact(codes)
        columns.append(np.log(np.maximum(values, 1e-12)))
    columns += [prior(codes) for prior in plan.priors.values()]
    return np.stack(columns, axis=1)
