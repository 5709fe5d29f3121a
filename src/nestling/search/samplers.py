"""Optuna's samplers by class name, and Optuna kept quiet."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nestling.search.objectives import Problem

LARGEST_GRID = 100_000
"""Points of a grid that a sampler may list in memory."""
PLANNED = ("GridSampler",)
"""Samplers whose seed fixes one plan for the whole study, of which every trial takes the next point."""
UNFIT = {"CmaEsSampler": "it would draw all choices at random; take NSGAIISampler or TPESampler"}
"""Samplers that would run here, but not do what they are for, and why."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna's log and its warnings, such as those of experimental samplers, from the user."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def make_sampler(name: str, problem: Problem, *, seed: int, population: int) -> BaseSampler:
    """The Optuna sampler called `name`, with whichever of seed, population and search space it takes.

    Raises:
        ValueError: no such sampler (near ones are named), or one that cannot search `problem`'s space.
    """
    classes = {
        key: value
        for key, value in vars(optuna.samplers).items()
        if inspect.isclass(value) and issubclass(value, BaseSampler) and not inspect.isabstract(value)
    }
    classes["GridSampler"] = _OpenGrid
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3) or sorted(classes)
        raise ValueError(f"no sampler {name!r} in Optuna; there is {', '.join(near)}")
    if name in UNFIT:
        raise ValueError(f"the sampler {name} cannot be used here: {UNFIT[name]}")
    choices = problem.space.open_choices
    taken = inspect.signature(classes[name].__init__).parameters
    offered: dict[str, Any] = {
        "seed": seed,
        "population_size": population,
        "search_space": {choice.name: list(choice.values) for choice in choices},
    }
    if "search_space" in taken:
        points = math.prod(len(choice.values) for choice in choices)
        if points > LARGEST_GRID:
            raise ValueError(
                f"the sampler {name} lists every point: {points:,} here, and it can at most {LARGEST_GRID:,}"
            )
    try:
        with quiet():
            made: BaseSampler = classes[name](
                **{key: value for key, value in offered.items() if key in taken}
            )
    except (TypeError, ImportError, ValueError) as error:
        raise ValueError(f"the sampler {name} cannot be used here: {error}") from error
    return made


def check_sampler(name: str, problem: Problem, *, population: int) -> None:
    """Refuses a sampler that cannot search `problem`, before anything is spent on it.

    Raises:
        ValueError: no such sampler, or one that cannot search this space or this number of objectives.
    """
    sampler = make_sampler(name, problem, seed=0, population=population)
    with quiet():
        study = optuna.create_study(directions=directions(problem), sampler=sampler)
        try:
            study.ask(distributions(problem))
        except (ValueError, ImportError) as error:
            raise ValueError(f"the sampler {name} cannot be used here: {error}") from error


def directions(problem: Problem) -> list[StudyDirection]:
    """The directions of `problem`'s objectives as Optuna knows them."""
    known = {"maximise": StudyDirection.MAXIMIZE, "minimise": StudyDirection.MINIMIZE}
    return [known[objective.direction] for objective in problem.objectives]


def distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """The open choices of `problem`'s space as Optuna knows them."""
    return {choice.name: CategoricalDistribution(choice.values) for choice in problem.space.open_choices}


class _OpenGrid(optuna.samplers.GridSampler):
    """Optuna's grid, in a study where some trials are forced.

    Optuna's own looks after each trial whether it was the grid's last, and breaks off where that one was
    forced and so is no point of the grid. The end of a search is for the search to see.
    """

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Does nothing."""
