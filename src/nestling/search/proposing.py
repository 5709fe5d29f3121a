"""Proposer: what names the archs to validate next; all of them by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nestling.search.asking import MO_CMA, Asking
from nestling.search.baselines import Evolution, Linas, OfaEvolution, Scattered, SortedNet
from nestling.search.guided import Guided, batch_size
from nestling.search.losses import Exact
from nestling.search.objectives import Metrics, Problem
from nestling.search.result import Trial
from nestling.search.samplers import check_sampler
from nestling.space import Arch

DEFAULT = "predictor"
PLANNED = ("sorted_net",)
"""Those that name what they have in mind and no more, and so end a search before it has all its trials."""


class Proposer(Protocol):
    """Names the archs to validate next. It keeps nothing between calls: all is read from the trials."""

    def propose(
        self, problem: Problem, trials: Sequence[Trial], *, pending: Sequence[Arch], count: int, seed: int
    ) -> list[Arch]:
        """`count` archs, different from each other, from those tried and from those pending.

        Fewer where the space has no more that are unknown, or none where a proposer of `PLANNED` is done;
        the same for the same trials, pending archs and seed.
        """
        ...


def make_proposer(
    name: str,
    problem: Problem,
    *,
    population: int = 50,
    exact: Mapping[str, Exact] | None = None,
    priors: Mapping[str, Exact] | None = None,
    elsewhere: Mapping[Arch, Metrics] | None = None,
) -> Proposer:
    """The proposer called `name`.

    Args:
        name: `predictor`, `random`, `evolution`, `ofa_evolution`, `linas`, `sorted_net`, `moocma`, or the
            class name of one of Optuna's samplers.
        problem: what it is to search.
        population: for those that have one.
        exact: metrics that are computed for any arch, not predicted (`predictor`, `linas`).
        priors: numbers that may tell of a metric beforehand, such as zero-cost scores (`predictor`).
        elsewhere: metrics of archs that another search has found, such as their accuracy (`predictor`).

    Raises:
        ValueError: no such proposer, or a sampler that cannot search this problem.
    """
    computed, told = dict(exact or {}), dict(priors or {})
    makers: dict[str, Callable[[], Proposer]] = {
        DEFAULT: lambda: Guided(exact=computed, priors=told, elsewhere=dict(elsewhere or {})),
        "random": Scattered,
        "evolution": lambda: Evolution(population=population),
        "ofa_evolution": lambda: OfaEvolution(population=population),
        "linas": lambda: Linas(population=population, exact=computed),
        "sorted_net": SortedNet,
        MO_CMA: lambda: Asking(MO_CMA, population=population),
    }
    if name in makers:
        return makers[name]()
    try:
        check_sampler(name, problem, population=population)
    except ValueError as error:
        if not str(error).startswith("no sampler"):
            raise
        near = difflib.get_close_matches(name, makers, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(makers)}; {error}"
        raise ValueError(f"no search strategy {name!r}; {hint}") from error
    return Asking(name, population=population)


def usual_batch(name: str, *, tried: int, population: int) -> int:
    """How many archs the proposer called `name` is asked for at once, after `tried` trials."""
    return {DEFAULT: batch_size(tried), "linas": population}.get(name, 1)
