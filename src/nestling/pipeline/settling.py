"""What a search is asked for is looked at before it is kept: what is refused leaves the run as it was."""

from __future__ import annotations

from collections.abc import Callable

from nestling.config import ConfigError
from nestling.pipeline.reusing import check_reused
from nestling.pipeline.studies import about, problem, study_place
from nestling.pipeline.workbench import Workbench
from nestling.search import change_limits, check_limits, make_proposer

SETTLED = {"search.limits", "search.study", "search.warm_from"}
"""What of a configuration must agree with a study, or with another run."""


def check_asked(bench: Workbench) -> None:
    """Refuses a search that could not begin, whatever its study holds.

    Raises:
        ConfigError: an objective, limit, strategy or place of the study that is unknown or cannot be used.
    """
    config = bench.config.search
    asked = problem(bench)
    study_place(bench)
    try:
        make_proposer(config.strategy, asked, population=config.population)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def settle(bench: Workbench, *, note: Callable[[str], None]) -> None:
    """Makes what the bench is asked for what its run holds: limits are laid over the study, all is written.

    Args:
        bench: of a run whose training has begun.
        note: told how many candidates are judged anew.

    Raises:
        ConfigError: see `check_asked`.
        InfeasibleLimit: no network of the space can keep a limit.
        RunError: of the run `search.warm_from` nothing can be taken over.
        StudyMismatch: the study is of another problem, of other images or of another supernet.
        StudyUnavailable: the study's database cannot be reached.
    """
    config, changed = bench.config, bench.run.changes(bench.config)
    check_asked(bench)
    asked, place = problem(bench), study_place(bench)
    check_limits(asked, smallest={"mmacs": bench.macs(bench.space.smallest) / 1e6})
    if "search.warm_from" in changed and bench.run.read_json("training.json") is not None:
        check_reused(bench)
    # a study is begun once its supernet is trained: to a run that has none yet, each is another's
    whose = {"weights": "", **about(bench)}
    judged = change_limits(asked, storage=place.storage, name=place.name, about=whose)
    bench.run.keep(config)
    if judged:
        note(f"{judged} candidates of before are judged by the limits that are given now")
    if judged >= config.search.trials:
        note(
            f"all {judged} candidates were evaluated under other limits; "
            f"`--set search.trials={2 * judged}` looks for more under these"
        )
