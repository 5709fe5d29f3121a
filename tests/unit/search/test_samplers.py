"""Samplers by name: found, refused early, and quiet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from nestling.search import Metrics, Problem, check_sampler, make_sampler, search
from nestling.space import Arch, Choice, SearchSpace


@pytest.mark.parametrize("name", ["RandomSampler", "BruteForceSampler", "GridSampler"])
def test_a_sampler_that_lists_every_point_can_come_to_its_end(
    space: SearchSpace, toy: Callable[[Arch], Metrics], file: Path, name: str
) -> None:
    small = space.only({"resolution": [16], "width": [1, 2], "depth": [1], "b2.kernel": [3]})
    problem = Problem.parse(small, objectives=["top1", "latency_ms"], limits={})
    result = search(problem, toy, storage=file, name="toy", trials=99, strategy=name)
    assert {trial.arch for trial in result.complete} == set(small.walk())


def test_an_unknown_sampler_gets_the_nearest_names(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"no sampler 'NSGA2Sampler' in Optuna; there is NSGAIISampler"):
        make_sampler("NSGA2Sampler", problem, seed=0, population=4)
    with pytest.raises(ValueError, match="no sampler 'BaseSampler'"):
        make_sampler("BaseSampler", problem, seed=0, population=4)


def test_a_sampler_that_cannot_search_the_problem_is_refused_before_anything_is_evaluated(
    problem: Problem, tmp_path: Path
) -> None:
    file = tmp_path / "study.db"

    def never(arch: Arch) -> Metrics:
        raise AssertionError(arch.key)

    for name, reason in [("PartialFixedSampler", "missing"), ("CmaEsSampler", "at random; take NSGAII")]:
        with pytest.raises(ValueError, match=f"the sampler {name} cannot be used here: .*{reason}"):
            search(problem, never, storage=file, name="toy", trials=2, strategy=name)
    assert not file.exists()
    check_sampler("NSGAIISampler", problem, population=4)


def test_a_grid_that_does_not_fit_in_memory_is_refused() -> None:
    choices = tuple(Choice(f"c{i}", (1, 2, 3, 4)) for i in range(10))
    problem = Problem.parse(SearchSpace("toy", choices), objectives=["top1"], limits={})
    with pytest.raises(ValueError, match="GridSampler lists every point: 1,048,576 here"):
        make_sampler("GridSampler", problem, seed=0, population=4)


def test_optuna_says_nothing_and_its_verbosity_is_left_alone(
    problem: Problem,
    toy: Callable[[Arch], Metrics],
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optuna.logging.set_verbosity(logging.INFO)
    logging.getLogger("optuna").addHandler(caplog.handler)
    try:
        search(problem, toy, storage=file, name="toy", trials=4, warm_start=0, strategy="QMCSampler")
        assert optuna.logging.get_verbosity() == logging.INFO
        assert caplog.records == []
        optuna.create_study()
        assert len(caplog.records) == 1
    finally:
        logging.getLogger("optuna").removeHandler(caplog.handler)
        optuna.logging.set_verbosity(logging.WARNING)
