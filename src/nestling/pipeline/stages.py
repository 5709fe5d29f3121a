"""The stages of a run: train, search, export, report. Each continues where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestling.config import ConfigError, RunConfig, TrainConfig, override_config
from nestling.data.curriculum import CURRICULA
from nestling.models.building import build_shapes
from nestling.models.channels import Unsortable, channel_groups
from nestling.models.cost import cost
from nestling.models.initialization import zero_last_norms
from nestling.models.supernet import Supernet, capped
from nestling.pipeline.listening import Listener
from nestling.pipeline.members import export_members, member_folders, write_member
from nestling.pipeline.offering import offer_precisions
from nestling.pipeline.policies import chosen_policy
from nestling.pipeline.reusing import but_for_precisions
from nestling.pipeline.searching import search_supernet
from nestling.pipeline.settling import SETTLED, check_asked, settle
from nestling.pipeline.studies import problem, searched, weights
from nestling.pipeline.summary import data_facts, report_content
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.report import ReportFiles, write_report
from nestling.run import OF_A_MACHINE, Run, RunError, differences
from nestling.search import check_limits, spread_along_front
from nestling.space import Arch, SearchSpace, load_space, save_space
from nestling.train.distributed import ALONE, Ranks

OWN_PARTS = {"profile", "search", "export"}
"""Parts of a configuration that a supernet does not depend on."""


def prepare(config: RunConfig, folder: Path, *, listener: Listener, ranks: Ranks = ALONE) -> Workbench:
    """The workbench of the run in `folder`, made from `config` or, if it is there already, continued.

    Everything that can be refused is refused here, before hours are spent: data, space, device, objectives.
    Of several ranks the first does it; the others, which see the same folder, then open the run.

    Raises:
        RunError: the folder holds a run with another configuration.
        ConfigError, DataError, DeviceError, ValueError: something in the configuration cannot be used.
        RanksError: on ranks other than the first, if that one raises.
    """
    made: list[Workbench] = []

    def make() -> None:
        made.append(_prepare(config, folder, listener=listener, ranks=ranks))

    ranks.from_first(make)
    return made[0] if made else Workbench(Run.open(folder), ranks=ranks)


def _prepare(
    config: RunConfig,
    folder: Path,
    *,
    listener: Listener,
    ranks: Ranks = ALONE,
    like: Workbench | None = None,
) -> Workbench:
    """As `prepare` on the first rank; with the space and the images of the run `like`, where one is given."""
    given = None if like is None else _given_space(like)
    run = Run(folder)
    continued, begun = run.config_file.exists(), run.has_begun
    if begun:
        run.check_changes(config)
        bench = Workbench(run, ranks=ranks, config=config)
    else:
        bench = Workbench(Run.create(folder, config), ranks=ranks)
    try:
        if not begun:
            _lay_space(bench, given=given, like=like)
        if continued:
            listener.note(f"continuing the run in {folder}")
        listener.stage("prepare")
        _check_usable(bench, given=given, listener=listener)
        if begun and run.changes(config) & SETTLED:
            settle(bench, note=listener.note)
        elif begun:
            run.keep(config)
        run.write_json("data.json", data_facts(bench))
        listener.note(f"device: {bench.device.fingerprint}")
    except BaseException:
        bench.close()  # the device that precisions were tried on
        raise
    return bench


def _lay_space(bench: Workbench, *, given: SearchSpace | None, like: Workbench | None) -> None:
    """Gives a run that is not begun the space that is asked for: its file's, or that of the run `like`."""
    run, file = bench.run, Path(bench.config.space)
    kept = run.given_space_file
    if like is None and kept.exists() and file.exists() and load_space(file) != load_space(kept):
        run.forget_derived()  # nothing is trained yet: the space that was mended is the run's
    if like is not None and given is not None and not run.space_file.exists():
        save_space(given, kept)
        # its images are those of the other run, as they were split then
        run.write_json("data.json", like.run.read_json("data.json"))


def _check_usable(bench: Workbench, *, given: SearchSpace | None, listener: Listener) -> None:
    """Refuses what cannot be used, the space `given` among it, or its file's where none is.

    Raises:
        ConfigError: it says what; other errors than those of bad values pass.
    """
    file = Path(bench.config.space)
    try:
        offer_precisions(bench, listener=listener)
        if given is None and file.exists():
            given = load_space(file)
        if given is not None and bench.fitted(given) != bench.space:
            raise ConfigError(f"{file} was changed since {bench.run.folder} began; begin a new run")
        _refuse_early(bench)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(error.args[0] if isinstance(error, KeyError) else error)) from error


def _given_space(bench: Workbench) -> SearchSpace:
    """The space that the run was given, before its data and device had their say.

    Raises:
        RunError: the run is of before copies were kept, and the file is gone or was changed since.
    """
    folder, file, kept = bench.run.folder, Path(bench.config.space), bench.run.given_space_file
    if kept.exists():
        return load_space(kept)
    if not file.exists():
        raise RunError(
            f"{folder} keeps no copy of its space as it was given, and {file} is gone; bring it back"
        )
    given, fitted = load_space(file), load_space(bench.run.space_file)
    added = {name: fitted.largest[name] for name in ("classes", "resolution")}
    if "resolution" in given.by_name:
        del added["resolution"]
    if but_for_precisions(given.with_constants(added)) != but_for_precisions(fitted):
        raise RunError(f"{file} was changed since {folder} began, which keeps no copy of it; bring it back")
    return given


def _refuse_early(bench: Workbench) -> None:
    """Tries, before hours are spent, what would otherwise fail after training.

    Raises:
        ValueError, KeyError, TypeError: an objective, limit, sampler, space, family or precision that is
            unknown or cannot be used; a limit on multiply-accumulates that no network keeps.
    """
    config, space = bench.config, bench.space
    check_asked(bench)
    supernet = bench.new_supernet()
    _refuse_unsortable(supernet, config.train)
    if config.train.zero_last_norms and space.largest.get("pretrained", False):
        raise ConfigError(
            f"train.zero_last_norms is true, but the space begins with pretrained weights (pretrained is "
            f"{space.largest['pretrained']!r}), of which it would overwrite some; set it to false"
        )
    if config.train.zero_last_norms and not zero_last_norms(supernet.largest):
        raise ConfigError(
            "train.zero_last_norms is true, but no residual branch of the largest network ends with a batch "
            "normalization; set it to false"
        )
    _ = bench.strategy, bench.teachers  # subnets that are not of the space, teachers that cannot be had
    _refuse_small_images(bench)
    for arch in (space.smallest, space.largest):
        chosen_policy(bench.family, arch)
    smallest = cost(build_shapes(bench.family.build, space.smallest), bench.resolution(space.smallest))
    check_limits(problem(bench), smallest={"mmacs": smallest.macs / 1e6})


def _refuse_unsortable(supernet: Supernet, config: TrainConfig) -> None:
    """Refuses a network whose channels are to be sorted and cannot be.

    Raises:
        ConfigError: the network's data flow cannot be followed.
    """
    if config.strategy not in ("delayed-shrinking", "progressive-shrinking") or not config.sort_channels:
        return
    try:
        channel_groups(supernet.largest)
    except Unsortable as error:
        raise ConfigError(f"{error}; set train.sort_channels to false") from error


def _refuse_small_images(bench: Workbench) -> None:
    """Refuses a curriculum whose images the largest network cannot read.

    Raises:
        ConfigError: the network has no such resolution.
    """
    config, largest = bench.config.train, bench.space.largest
    if config.curriculum == "none":
        return
    curriculum = replace(CURRICULA[config.curriculum], multiple=config.curriculum_multiple)
    for period in curriculum.periods:
        side = curriculum.side(period, full=bench.data.size)
        try:
            build_shapes(bench.family.build, capped(largest, side))
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                f"train.curriculum begins with images of {side} px, which the largest network cannot read: "
                f"{error}; set train.curriculum_multiple to what its sides must be multiples of"
            ) from error


def open_run(folder: Path, *, overrides: Sequence[str] = (), ranks: Ranks = ALONE) -> Workbench:
    """The workbench of the run that `folder` holds, with `overrides` such as `search.trials=200`.

    The run holds them only once a search has begun with them. Several ranks open it without overrides.

    Raises:
        RunError: there is none, it is not trained, or an override would change what was measured.
        ConfigError: an override that cannot be used.
    """
    run = Run.open(folder)
    if ranks.world > 1:
        return Workbench(run, ranks=ranks)
    config = override_config(run.config(), overrides)
    run.check_changes(config)
    bench = Workbench(run, config=config)
    if run.changes(config):
        bench.check_trained()
        check_asked(bench)
    return bench


def begin_from(folder: Path, *, other: Path, overrides: Sequence[str], listener: Listener) -> Workbench:
    """The workbench of a new run in `folder`, for another device, with the supernet of the run `other`.

    Its configuration is that of `other` with `overrides`, which change no more than the device, the search
    and the export, and where images lie and networks train. What was begun and not finished is continued.

    Raises:
        RunError: `other` is not trained, an override changes what its weights depend on, or `folder` holds
            another run; the images are others, or the space of a run of before is not to be had any more.
        Exception: as `prepare`.
    """
    source = Workbench(Run.open(other))
    source.check_trained()
    config = override_config(source.config, [f"name={json.dumps(folder.name)}", *overrides])
    changed = differences(source.config.model_dump(), config.model_dump())
    free = OF_A_MACHINE | {"name"}
    fixed = sorted(name for name in changed - free if name.split(".")[0] not in OWN_PARTS)
    if fixed:
        raise RunError(
            f"a run with the supernet of {other} cannot have another {', '.join(fixed)}; train one of its own"
        )
    bench = _prepare(config, folder, listener=listener, like=source)
    try:
        copied = folder / "training.copied"
        if not bench.checkpoints.exists():
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(source.checkpoints, copied)
            copied.rename(bench.checkpoints)
        if weights(bench) != weights(source):
            raise RunError(f"{folder} has a supernet of its own; begin in another folder")
        bench.run.write_json("training.json", source.run.read_json("training.json"))
    except BaseException:
        bench.close()
        raise
    return bench


def export_front(bench: Workbench, *, listener: Listener) -> list[dict[str, Any]]:
    """The members of the front, handed over in the run's `exports` folder; their figures, read off the files.

    The test split is read here, and nowhere else.

    Raises:
        RunError: nothing was searched, or no candidate keeps the limits.
    """
    listener.stage("export")
    result = searched(bench)
    if not result.trials:
        raise RunError(f"{bench.run.folder} was not searched yet; `nestling search` does that")
    done = bench.run.read_json("members.json")
    chosen = [trial.arch.key for trial in spread_along_front(result, bench.config.export.members)]
    there = {folder.name for folder in member_folders(bench.run.exports)}
    if (
        done is not None
        and [member["arch_key"] for member in done] == chosen
        and {member["name"] for member in done} == there
    ):
        listener.note("the front is exported already")
        return list(done)
    with bench.timed("export"):
        return export_members(bench, result, on_member=listener.exported)


def export_arch(bench: Workbench, arch: Arch, *, listener: Listener) -> dict[str, Any]:
    """One network of the space, handed over as members of the front are; its figures.

    Raises:
        EvaluationFailed: its file does not compute what PyTorch computes.
    """
    listener.stage("export")
    found = (trial.metrics for trial in searched(bench).complete if trial.arch == arch)
    return write_member(bench, arch, name=arch.key, searched=next(found, {}))


def export_best(bench: Workbench, *, listener: Listener) -> dict[str, Any]:
    """The best network that keeps the run's limits, handed over; its figures.

    Of the candidates that were tried it is the best in the first objective.

    Raises:
        RunError: no candidate keeps the limits.
    """
    result = searched(bench)
    if result.best is None:
        told = "; ".join(result.unmet) or "each limit is kept by some network, all together by none"
        raise RunError(
            f"no candidate of {bench.run.folder} keeps the limits: {told}; loosen them, or search more with "
            f"--set search.trials={2 * bench.config.search.trials}"
        )
    return export_arch(bench, result.best.arch, listener=listener)


def make_report(bench: Workbench, *, listener: Listener) -> ReportFiles:
    """The run's report, from what the run has so far."""
    listener.stage("report")
    result = searched(bench)
    return write_report(report_content(bench, result if result.trials else None), bench.run.folder)


def run_all(
    config: RunConfig, folder: Path, *, listener: Listener
) -> tuple[list[dict[str, Any]], ReportFiles]:
    """Every stage, one after the other: the exported members' figures, and the report's files.

    Raises:
        Exception: see the stages.
    """
    bench = prepare(config, folder, listener=listener)
    try:
        train_supernet(bench, listener=listener)
        search_supernet(bench, listener=listener)
        members = export_front(bench, listener=listener)
        return members, make_report(bench, listener=listener)
    finally:
        bench.close()
