"""Every sampler that Optuna has can be used, or is refused with a reason; none lets a warning through."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from nestling.search import Metrics, Problem, check_sampler, search
from nestling.space import Arch, Choice, SearchSpace

REFUSED = {"CmaEsSampler", "PartialFixedSampler", "BaseSampler", "BaseGASampler"}
USABLE = sorted(name for name in optuna.samplers.__all__ if name.endswith("Sampler") and name not in REFUSED)


def test_there_is_a_choice_of_samplers() -> None:
    assert {"NSGAIISampler", "NSGAIIISampler", "TPESampler", "GPSampler", "QMCSampler"} <= set(USABLE)


@pytest.mark.parametrize("name", USABLE)
def test_a_sampler_of_optuna_can_be_used(problem: Problem, name: str) -> None:
    check_sampler(name, problem, population=4)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_sampler_that_cannot_be_used_is_refused_by_name(problem: Problem, name: str) -> None:
    one_objective = Problem.parse(problem.space, objectives=["top1"], limits={})
    with pytest.raises(ValueError, match=f"sampler .?{name}"):
        check_sampler(name, one_objective, population=4)


def test_a_grid_of_one_point_that_is_forced_is_no_error(
    problem: Problem, toy: Callable[[Arch], Metrics], file: Path
) -> None:
    constants = SearchSpace("toy", tuple(Choice(c.name, c.values[:1]) for c in problem.space.choices))
    grid = Problem.parse(constants, objectives=["top1"], limits={})
    result = search(grid, toy, storage=file, name="toy", trials=9, strategy="GridSampler")
    assert [trial.arch for trial in result.complete] == [constants.smallest]


def test_a_grid_takes_each_point_that_was_not_forced_once(
    problem: Problem, toy: Callable[[Arch], Metrics], file: Path
) -> None:
    small = problem.space.only({"resolution": [16], "depth": [2]})
    grid = Problem.parse(small, objectives=["top1", "latency_ms"], limits={})
    result = search(
        grid, toy, storage=file, name="toy", trials=99, warm_start=0, strategy="GridSampler", seed=3
    )
    assert {trial.arch for trial in result.complete} == set(small.walk())
    # the two ends are forced, and the grid, which is not told of them, takes them too
    assert len(result.trials) <= small.size + 2


@pytest.mark.parametrize("name", ["RandomSampler", "NSGAIIISampler"])
def test_a_search_in_two_parts_tries_what_one_in_one_part_does(
    problem: Problem, toy: Callable[[Arch], Metrics], empty_study_file: Path, tmp_path: Path, name: str
) -> None:
    found = []
    for parts in ([8], [3, 8]):
        file = Path(shutil.copy(empty_study_file, tmp_path / f"{len(parts)}.db"))
        for trials in parts:
            result = search(
                problem, toy, storage=file, name="toy", trials=trials, strategy=name, population=3
            )
        found.append([trial.arch for trial in result.trials])
    assert found[0] == found[1]
