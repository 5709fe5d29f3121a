"""The trainings of `strategies.py`: how many steps each may take, what each comes to, all in parallel."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from record import store
from strategies_entries import Entry, Size

from nestling.config import DataConfig, TrainConfig
from nestling.data import Data, load_data
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace, load_space
from nestling.space.sampling import stratified
from nestling.train.evaluate import recalibrate, top1
from nestling.train.loop import train
from nestling.train.quality import along_cost, area
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress, Strategy, Visit, make_strategy
from nestling.train.strategies.accounting import training_macs, visits_macs

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "search_spaces" / "resnet_cifar.toml"
CLASSES = 10
WARMUP = 0.05
"""The part of a run over which the learning rate rises."""
RECALIBRATION_IMAGES = 1024
EVALUATION_BATCH = 250
SEARCH_IMAGES = 5000


@dataclass(frozen=True, slots=True)
class Job:
    """One training: of which entry, with which seed.

    Attributes:
        macs_of_step: the mean over steps, for each image of a batch.
        folder: for checkpoints, and the result.
    """

    name: str
    entry: Entry
    size: Size
    seed: int
    source: str
    macs_of_step: float
    folder: Path

    @property
    def steps(self) -> int:
        """How many the budget buys."""
        return max(1, int(self.entry.share * self.size.budget / (self.macs_of_step * self.size.batch_size)))

    @property
    def result_file(self) -> Path:
        """What is kept of the finished training."""
        return self.folder / f"seed-{self.seed}.json"

    @property
    def training(self) -> Path:
        """Where its checkpoints are, until it is finished."""
        return self.folder / f"seed-{self.seed}"


def space_of(size: Size) -> SearchSpace:
    """The space that all train: in float, at the size's resolutions."""
    space = load_space(SPACE).with_constants({"classes": CLASSES})
    finest = {c.name: c.values[-1:] for c in space.choices if c.name.endswith(".precision")}
    return space.only({**finest, "resolution": size.resolutions})


@cache
def macs(arch: Arch) -> int:
    """The multiply-accumulates of one image through `arch`."""
    return cost(build_shapes(family("resnet").build, arch), arch.integer("resolution")).macs


@lru_cache(maxsize=1)
def data_of(size: Size, source: str) -> Data:
    """The images: the same for every seed."""
    config = DataConfig(
        source=source,
        size=max(size.resolutions),
        train_images=size.train_images,
        search_images=SEARCH_IMAGES,
        test_images=size.test_images,
    )
    return load_data(config, seed=0)


@lru_cache(maxsize=1)
def scored_archs(size: Size) -> tuple[Arch, ...]:
    """The networks that are scored, cheapest first: spread over the logarithm of their cost."""
    space = space_of(size)
    least = macs(space.smallest)
    between = stratified(space, lambda arch: 1 + math.log(macs(arch) / least), size.subnets - 2, seed=0)
    chosen = dict.fromkeys([space.smallest, *between, space.largest])
    return tuple(sorted(chosen, key=macs))


def config_of(job: Job, *, per_epoch: int) -> TrainConfig:
    """How the job trains: exactly its number of steps."""
    epochs = job.steps / per_epoch
    settings: dict[str, Any] = {
        "lr": job.size.lr,
        "weight_decay": 1e-4,
        "warmup_epochs": WARMUP * epochs,
        "ramp_epochs": job.entry.ramp * epochs,
        "checkpoint_seconds": 60.0,
    }
    return TrainConfig(epochs=epochs, **{**settings, **job.entry.train})


def trained(job: Job, data: Data) -> tuple[Supernet, list[TrainingRecord], float]:
    """The supernet after the job's training, its records, and the multiply-accumulates of a step's image.

    Continues from a checkpoint in its folder.
    """
    size, space = job.size, space_of(job.size)
    stream = dataclasses.replace(data.train, seed=job.seed)
    config = config_of(job, per_epoch=stream.steps_per_epoch(size.batch_size))
    kin = family("resnet")
    torch.manual_seed(job.seed)
    supernet = Supernet(space, kin.build, layout=kin.layout).to(size.device)
    strategy = Counted(make_strategy(config, space=space, cost=macs, seed=job.seed))
    records = train(
        supernet,
        stream,
        strategy=strategy,
        config=config,
        batch_size=size.batch_size,
        augment="standard",
        seed=job.seed,
        folder=job.training,
        device=size.device,
    )
    return supernet, records, strategy.mean(otherwise=job.macs_of_step)


def run_job(job: Job) -> dict[str, Any]:
    """What the finished training comes to; also written to the job's file. Continues from a checkpoint."""
    size = job.size
    data = data_of(size, job.source)
    supernet, records, macs_of_step = trained(job, data)
    began = time.monotonic()
    archs = scored_archs(size)
    accuracies = [score(supernet, arch, data, size) for arch in archs]
    costs = [macs(arch) for arch in archs]
    places = along_cost(costs, least=costs[0], most=costs[-1])
    middle = min(range(len(archs)), key=lambda index: abs(places[index] - 0.5))
    found = {
        "entry": job.name,
        "seed": job.seed,
        "steps": records[-1].step,
        "images": records[-1].step * size.batch_size,
        "macs": records[-1].step * size.batch_size * macs_of_step,
        "seconds": sum(record.seconds for record in records),  # those of a part that was killed are lost
        "scoring_seconds": time.monotonic() - began,
        "last_loss": records[-1].loss,
        "archs": [arch.key for arch in archs],
        "arch_macs": costs,
        "top1": accuracies,
        "smallest": accuracies[0],
        "middle": accuracies[middle],
        "largest": accuracies[-1],
        "area": area(places, torch.tensor(accuracies, dtype=torch.float64).numpy()),
    }
    store(job.result_file, found)
    shutil.rmtree(job.training, ignore_errors=True)
    return found


def score(supernet: Supernet, arch: Arch, data: Data, size: Size) -> float:
    """The accuracy of `arch` on the images of the judging split, with statistics of its own."""
    resolution = arch.integer("resolution")
    network = supernet.materialize(arch)
    images = data.train.calibration(RECALIBRATION_IMAGES)
    batches = images.at(resolution, batch_size=EVALUATION_BATCH, device=size.device)
    recalibrate(network, (batch.images for batch in batches))
    judging = data.test() if size.judge == "test" else data.search
    tested = judging.at(resolution, batch_size=EVALUATION_BATCH, device=size.device)
    return top1(network, tested).top1


class Counted(Strategy):
    """A strategy, and what the visits that it said really cost.

    Those before a kill are not known; a mean of those after it stands for them.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.sorts_channels, self.schedule = strategy.sorts_channels, strategy.schedule
        self.freezes_teacher = strategy.freezes_teacher
        self._macs, self._steps = 0.0, 0

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        """What the strategy says."""
        said = self._strategy.visits(space, progress, rng)
        self._macs += visits_macs(said, macs, teachers_macs=macs(space.largest))
        self._steps += 1
        return said

    def mean(self, *, otherwise: float) -> float:
        """Multiply-accumulates of a step, for each image; `otherwise` where no step was seen."""
        return self._macs / self._steps if self._steps else otherwise


@cache
def code() -> str:
    """A digest of all code that training and scoring run through."""
    source = ROOT / "src" / "nestling"
    files = [file for part in ("train", "models", "space", "data") for file in (source / part).rglob("*.py")]
    files += [source / "config.py", Path(__file__)]
    told = hashlib.sha256()
    for file in sorted(files):
        told.update(file.read_bytes())
    return told.hexdigest()


def key_of(name: str, entry: Entry, size: Size, fingerprint: str) -> str:
    """What tells results of the same settings and code from others; the number of seeds is none of them."""
    settings = {**dataclasses.asdict(size), "seeds": None}
    told = [dataclasses.asdict(entry), settings, SPACE.read_text(), fingerprint, code()]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return f"{words}-{digest[:12]}"


def mean_step(entry: Entry, size: Size, folder: Path) -> float:
    """The multiply-accumulates of the entry's mean step, for each image; kept in `folder`."""
    file = folder / "macs_of_step.json"
    if not file.exists():
        space = space_of(size)
        # without a ramp: it changes no cost
        config = TrainConfig(**{**entry.train, "ramp_epochs": 0.0})
        strategy = make_strategy(config, space=space, cost=macs, seed=0)
        steps = size.sampled
        total = training_macs(
            strategy,
            space,
            macs,
            steps=steps,
            steps_per_epoch=steps,
            teachers_macs=macs(space.largest),  # whom progressive shrinking freezes
            sampled=steps,
        )
        store(file, {"macs": total / steps})
    return float(json.loads(file.read_text())["macs"])


def plan(entries: Mapping[str, Entry], size: Size, *, source: str, work: Path) -> list[Job]:
    """All trainings, seed by seed, so that a run that is stopped has compared all strategies."""
    fingerprint = data_of(size, source).fingerprint
    folders = {name: work / key_of(name, entry, size, fingerprint) for name, entry in entries.items()}
    costs = {}
    for name, entry in entries.items():
        folders[name].mkdir(parents=True, exist_ok=True)
        costs[name] = mean_step(entry, size, folders[name])
    return [
        Job(name, entry, size, seed, source, costs[name], folders[name])
        for seed in range(size.seeds)
        for name, entry in entries.items()
    ]


def pin(cores: Any) -> None:
    """Keeps this process on a core of its own, with one thread; it ends when the one that began it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if (core := cores.get()) is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Ends this process: a run that was killed leaves nothing that writes where the next one goes on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_all(
    jobs: list[Job],
    processes: int,
    *,
    told: Callable[[dict[str, Any]], None],
    run: Callable[[Job], dict[str, Any]] = run_job,
) -> None:
    """Runs `jobs`; `told` hears of each result. More than one process: a core and a thread for each."""
    if processes == 1:
        for job in jobs:
            told(run(job))
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    for index in range(processes):
        cores.put(free[index % len(free)] if free else None)
    with concurrent.futures.ProcessPoolExecutor(processes, context, pin, (cores,)) as pool:
        waiting = [pool.submit(run, job) for job in jobs]
        try:
            for done in concurrent.futures.as_completed(waiting):
                told(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
