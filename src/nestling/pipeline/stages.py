"""The stages of a run: train, search, export, report. Each continues where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nestling.config import RunConfig
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import family
from nestling.pipeline.candidate import candidate_metrics, measure, score, write_candidate
from nestling.pipeline.forecast import Forecast, forecast
from nestling.pipeline.members import export_members, write_member
from nestling.pipeline.summary import data_facts, report_content
from nestling.pipeline.workbench import Workbench
from nestling.profile import Measurement
from nestling.report import ReportFiles, write_report
from nestling.run import Run
from nestling.search import Problem, SearchResult, Trial, check_sampler, load_result, search
from nestling.space import Arch, SpaceError, load_space
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
    problem(bench)
    check_sampler(config.search.sampler, problem(bench), population=config.search.population)
    bench.new_supernet()
    bench.run.write_json("data.json", data_facts(bench))
    listener.note(f"device: {bench.device.fingerprint}")
    return bench


def open_run(folder: Path) -> Workbench:
    """The workbench of the run that `folder` holds.

    Raises:
        RunError: there is none.
    """
    return Workbench(Run.open(folder))


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
    scored = data.search.take(min(len(data.search.labels), 512))

    def estimate(arch: Arch) -> float:
        """Top-1 of `arch` on some search images, normalized by each batch's own statistics."""
        supernet.eval()
        correct = total = 0
        with torch.no_grad():
            for batch in scored.at(data.size, batch_size=config.data.batch_size, device=bench.torch_device):
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

    def evaluate(arch: Arch) -> Mapping[str, float]:
        path = candidate_path(bench, arch)
        candidate = write_candidate(bench, arch, path)
        accuracy = score(bench.device, path, bench.data.search, resolution=candidate.resolution)
        measurement = measure(bench.device, path)
        reference_ms = _reference_ms(bench, measurement)
        return candidate_metrics(candidate, accuracy, measurement, reference_ms=reference_ms)

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
    for file in (bench.run.folder / "candidates").glob("*.onnx"):
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
    done = bench.run.read_json("members.json")
    if done is not None:
        listener.note("the front is exported already")
        return list(done)
    with _timed(bench, "export"):
        result = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
        return export_members(bench, result, on_member=listener.exported)


def export_arch(bench: Workbench, arch: Arch, *, listener: Listener) -> dict[str, Any]:
    """One network of the space, handed over as members of the front are; its figures.

    Raises:
        EvaluationFailed: its file does not compute what PyTorch computes.
    """
    listener.stage("export")
    return write_member(bench, arch, name=arch.key, searched={})


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


def candidate_path(bench: Workbench, arch: Arch) -> Path:
    """Where the file of the candidate `arch` lies during the search."""
    return bench.run.folder / "candidates" / f"{arch.key}.onnx"


def space_summary(path: Path, *, classes: int, resolution: int) -> dict[str, Any]:
    """The size of the space in the file `path`, its choices, and the cost of its smallest and largest arch.

    `classes` and `resolution` stand in for what the space leaves to the data.

    Raises:
        ValueError: the file is no space, or its networks cannot be built.
    """
    space = load_space(path)
    if "classes" not in {choice.name for choice in space.choices}:
        space = space.with_constants({"classes": classes})
    build = family(space.family).build
    costs = {}
    for name, arch in (("smallest", space.smallest), ("largest", space.largest)):
        side = arch.integer("resolution") if "resolution" in arch else resolution
        found = cost(build_shapes(build, arch), side)
        costs[name] = {
            "resolution": side,
            "macs": found.macs,
            "params": found.params,
            "activation_bytes": found.activation_bytes,
            "peak_bytes": found.peak_bytes,
        }
    return {
        "family": space.family,
        "size": space.size,
        "choices": {choice.name: list(choice.values) for choice in space.choices},
        **costs,
    }


def _reference_ms(bench: Workbench, measurement: Measurement) -> float:
    """The reference model's milliseconds on the run's device: those of the run's first measurement."""
    fingerprint = measurement.fingerprint
    known = bench.run.read_json("reference.json")
    if known is None or known["key"] != fingerprint.key:
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


def find_arch(bench: Workbench, name: str) -> Arch:
    """The arch that `name` means: `smallest`, `largest`, the key of a trial, or a JSON file of decisions.

    Raises:
        SpaceError: none of these, or decisions that are not of the run's space.
    """
    if name in ("smallest", "largest"):
        return bench.space.smallest if name == "smallest" else bench.space.largest
    if Path(name).is_file():
        return bench.space.canonical(Arch.from_json(Path(name).read_text()))
    found = load_result(problem(bench), storage=bench.run.study_file, name=STUDY)
    for trial in found.trials:
        if trial.arch.key == name:
            return trial.arch
    raise SpaceError(
        f"no arch {name!r} in {bench.run.folder}: give smallest, largest, a trial's key (`nestling report` "
        "lists them), or a JSON file of decisions"
    )
