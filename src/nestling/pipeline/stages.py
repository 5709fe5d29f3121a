"""The stages of a run: train, search, export, report. Each continues where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nestling.config import ConfigError, RunConfig, TrainConfig, override_config
from nestling.models.building import build_shapes
from nestling.models.channels import Unsortable, channel_groups
from nestling.models.cost import cost
from nestling.models.supernet import Supernet
from nestling.pipeline.candidate import (
    candidate_metrics,
    latency_metrics,
    measure,
    quant_policy,
    score,
    write_candidate,
)
from nestling.pipeline.forecast import Forecast, forecast
from nestling.pipeline.members import export_members, write_member
from nestling.pipeline.summary import data_facts, report_content
from nestling.pipeline.workbench import Workbench, even_batch
from nestling.profile import Measurement
from nestling.report import ReportFiles, write_report
from nestling.run import Run, RunError
from nestling.search import (
    Problem,
    SearchResult,
    Trial,
    check_limits,
    check_sampler,
    load_result,
    search,
    spread_along_front,
)
from nestling.space import Arch, load_space
from nestling.train.loop import TrainingRecord, train
from nestling.train.strategies import Progress, make_strategy

STUDY = "nestling"


class Listener(Protocol):
    """Hears what a run does; a progress display, or nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should read."""
        ...

    def forecast(self, forecast: Forecast) -> None:
        """What training will cost."""
        ...

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        """A training step is done."""
        ...

    def trial(self, trial: Trial, result: SearchResult, wanted: int) -> None:
        """A candidate was evaluated."""
        ...

    def exported(self, name: str, number: int, total: int) -> None:
        """A network was handed over."""
        ...


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str) -> None:
        """Hears nothing."""

    def note(self, text: str) -> None:
        """Hears nothing."""

    def forecast(self, forecast: Forecast) -> None:
        """Hears nothing."""

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        """Hears nothing."""

    def trial(self, trial: Trial, result: SearchResult, wanted: int) -> None:
        """Hears nothing."""

    def exported(self, name: str, number: int, total: int) -> None:
        """Hears nothing."""


def prepare(config: RunConfig, folder: Path, *, listener: Listener) -> Workbench:
    """The workbench of the run in `folder`, made from `config` or, if it is there already, continued.

    Everything that can be refused is refused here, before hours are spent: data, space, device, objectives.

    Raises:
        RunError: the folder holds a run with another configuration.
        ConfigError, DataError, DeviceError, ValueError: something in the configuration cannot be used.
    """
    continued = (folder / "config.json").exists()
    bench = Workbench(Run.create(folder, config))
    if continued:
        listener.note(f"continuing the run in {folder}")
    listener.stage("prepare")
    try:
        _refuse_early(bench)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(error.args[0] if isinstance(error, KeyError) else error)) from error
    bench.run.write_json("data.json", data_facts(bench))
    listener.note(f"device: {bench.device.fingerprint}")
    return bench


def _refuse_early(bench: Workbench) -> None:
    """Tries, before hours are spent, what would otherwise fail after training.

    Raises:
        ValueError, KeyError, TypeError: an objective, limit, sampler, space, family or precision that is
            unknown or cannot be used; a limit on multiply-accumulates that no network keeps.
    """
    config, space = bench.config, bench.space
    given = load_space(Path(config.space)) if Path(config.space).exists() else space
    if bench.fitted(given) != space:
        raise ConfigError(f"{config.space} was changed since {bench.run.folder} began; begin a new run")
    found = problem(bench)
    check_sampler(config.search.sampler, found, population=config.search.population)
    _refuse_unsortable(bench.new_supernet(), config.train)
    for arch in (space.smallest, space.largest):
        quant_policy(bench, arch)
    smallest = cost(build_shapes(bench.family.build, space.smallest), bench.resolution(space.smallest))
    check_limits(found, smallest={"mmacs": smallest.macs / 1e6})


def _refuse_unsortable(supernet: Supernet, config: TrainConfig) -> None:
    """Refuses a network whose channels are to be sorted and cannot be.

    Raises:
        ConfigError: the network's data flow cannot be followed.
    """
    if config.strategy != "delayed-shrinking" or not config.sort_channels:
        return
    try:
        channel_groups(supernet.largest)
    except Unsortable as error:
        raise ConfigError(f"{error}; set train.sort_channels to false") from error


def open_run(folder: Path, *, overrides: Sequence[str] = ()) -> Workbench:
    """The workbench of the run that `folder` holds, with `overrides` such as `search.trials=200`.

    Raises:
        RunError: there is none, or an override would change what was measured.
        ConfigError: an override that cannot be used.
    """
    run = Run.open(folder)
    return Workbench(Run.create(folder, override_config(run.config(), overrides)))


def problem(bench: Workbench) -> Problem:
    """What the run's search is after.

    Raises:
        ValueError: an unknown objective or limit.
    """
    config = bench.config.search
    return Problem.parse(bench.space, objectives=config.objectives, limits=config.limits)


def train_supernet(bench: Workbench, *, listener: Listener) -> None:
    """Trains the run's supernet to the end, from the newest checkpoint on.

    Raises:
        TrainingStopped: the loss runs away or is not a number.
    """
    if bench.run.read_json("training.json") is not None:
        listener.note("training is finished already")
        return
    listener.stage("train")
    config, data = bench.config, bench.data
    supernet = bench.new_supernet()
    strategy = make_strategy(config.train)
    expected = forecast(bench, supernet, strategy)
    listener.forecast(expected)
    scored = data.search.take(min(len(data.search), 512))
    size = even_batch(len(scored), at_most=max(64, config.data.batch_size))

    def estimate(arch: Arch) -> float:
        """Top-1 of `arch` on some search images, normalized by each batch's own statistics."""
        supernet.eval()
        correct = total = 0
        with torch.no_grad():
            for batch in scored.at(data.size, batch_size=size, device=bench.torch_device):
                correct += int((supernet(batch.images, arch).argmax(dim=1) == batch.labels).sum())
                total += len(batch.labels)
        return correct / total

    with _timed(bench, "train"):
        train(
            supernet,
            data.train,
            strategy=strategy,
            config=config.train,
            batch_size=config.data.batch_size,
            augment=config.data.augment,
            seed=config.seed,
            folder=bench.checkpoints,
            device=bench.torch_device,
            estimate=estimate,
            on_record=listener.training,
        )
    bench.run.write_json("training.json", {"finished": True, "forecast": expected.to_dict()})


def search_supernet(bench: Workbench, *, listener: Listener) -> SearchResult:
    """The result of the run's search, continued where it was stopped.

    Each candidate is written to a file; accuracy (on the search split) and latency are those of the file.

    Raises:
        RunError: training is not finished.
        InfeasibleLimit: no network of the space can keep a limit.
    """
    listener.stage("search")
    config = bench.config.search
    wanted = problem(bench).needed()

    def evaluate(arch: Arch) -> Mapping[str, float]:
        path = bench.candidate_path(arch)
        candidate = write_candidate(bench, arch, path)
        accuracy = score(bench.device, path, bench.data.search, resolution=candidate.resolution)
        metrics = candidate_metrics(candidate, accuracy)
        if "latency_ms" in wanted:
            measurement = measure(bench.device, path)
            metrics |= latency_metrics(measurement, reference_ms=_reference_ms(bench, measurement))
        return metrics

    def on_trial(trial: Trial, result: SearchResult) -> None:
        listener.trial(trial, result, config.trials)

    with _timed(bench, "search"):
        result = search(
            problem(bench),
            evaluate,
            storage=bench.run.study_file,
            name=STUDY,
            trials=config.trials,
            sampler=config.sampler,
            population=config.population,
            seed=bench.config.seed,
            warm_start=config.warm_start,
            on_trial=on_trial,
        )
    for told in result.unmet:
        listener.note(told)
    front = {trial.arch.key for trial in result.front}
    for file in list((bench.run.folder / "candidates").glob("*.onnx")):
        if file.stem not in front:
            file.unlink()
    return result


def export_front(bench: Workbench, *, listener: Listener) -> list[dict[str, Any]]:
    """The members of the front, handed over in the run's `exports` folder; their figures, read off the files.

    The test split is read here, and nowhere else.

    Raises:
        RunError: nothing was searched, or no candidate keeps the limits.
    """
    listener.stage("export")
    result = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
    if not result.trials:
        raise RunError(f"{bench.run.folder} was not searched yet; `nestling search` does that")
    done = bench.run.read_json("members.json")
    chosen = [trial.arch.key for trial in spread_along_front(result, bench.config.export.members)]
    there = {folder.name for folder in bench.run.exports.glob("[0-9][0-9]-*")}
    if (
        done is not None
        and [member["arch_key"] for member in done] == chosen
        and {member["name"] for member in done} == there
    ):
        listener.note("the front is exported already")
        return list(done)
    with _timed(bench, "export"):
        return export_members(bench, result, on_member=listener.exported)


def export_arch(bench: Workbench, arch: Arch, *, listener: Listener) -> dict[str, Any]:
    """One network of the space, handed over as members of the front are; its figures.

    Raises:
        EvaluationFailed: its file does not compute what PyTorch computes.
    """
    listener.stage("export")
    searched: Mapping[str, float] = {}
    if bench.run.study_file.exists():
        result = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
        searched = next((trial.metrics for trial in result.complete if trial.arch == arch), {})
    return write_member(bench, arch, name=arch.key, searched=searched)


def make_report(bench: Workbench, *, listener: Listener) -> ReportFiles:
    """The run's report, from what the run has so far."""
    listener.stage("report")
    result: SearchResult | None = None
    if bench.run.study_file.exists():
        result = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
    return write_report(report_content(bench, result), bench.run.folder)


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


def _reference_ms(bench: Workbench, measurement: Measurement) -> float:
    """The reference model's milliseconds on the run's device: those of the run's first measurement."""
    fingerprint = measurement.fingerprint
    known = bench.run.read_json("reference.json")
    if known is not None and known["key"] != fingerprint.key:
        raise RunError(
            f"{bench.run.folder} was measured on another device or runtime ({known['fingerprint']}) than "
            f"this one ({fingerprint}); their latencies do not compare: search in a new run"
        )
    if known is None:
        known = {
            "key": fingerprint.key,
            "latency_ms": float(np.median(measurement.reference_seconds)) * 1e3,
            "fingerprint": asdict(fingerprint),
        }
        bench.run.write_json("reference.json", known)
    return float(known["latency_ms"])


@contextmanager
def _timed(bench: Workbench, stage: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Adds the seconds spent inside to the run's account, also where the stage is interrupted."""
    began = clock()
    try:
        yield
    finally:
        seconds = bench.run.read_json("seconds.json") or {}
        seconds[stage] = seconds.get(stage, 0.0) + clock() - began
        bench.run.write_json("seconds.json", seconds)
