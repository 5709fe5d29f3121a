"""How good a run's supernet is: subnets spread over the cost axis, scored, and compared with training alone.

Every network's result is a file of its own in the run's folder, written when it is known; `evaluation.json`
holds them together with the figures, and can be read at any time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nestling.pipeline.alone import alone_with, train_alone
from nestling.pipeline.asked import Asked, ask, check_numbers
from nestling.pipeline.forecast import run_macs
from nestling.pipeline.listening import Listener
from nestling.pipeline.scored import Scored, area_under, compared, gained, row
from nestling.pipeline.workbench import EVALUATION_BATCH, Workbench
from nestling.run import RunError
from nestling.space import Arch
from nestling.train.quality import hits_from_text, hits_to_text
from nestling.train.sharing import recalibrate_together

SUMMARY = "evaluation.json"
RESULTS = "evaluation"
"""The folder of single results."""


def evaluate_supernet(
    bench: Workbench,
    *,
    subnets: int = 20,
    alone: int = 0,
    epochs: float | None = None,
    listener: Listener,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """What `evaluation.json` holds of the run's supernet; continues where it was stopped.

    All accuracies are those of the search split, which training never saw, of networks that were
    materialized (or trained alone) and recalibrated, in float. `*.precision` choices are set aside: two archs
    that differ in nothing else are one network here.

    - `area`: under the line through accuracy and the logarithm of the MACs; see `quality.area`.
    - `alone.tau`: how shared weights order networks against training each alone, for as many steps of the
      same recipe as `epochs` make, with the run's teachers where it has some; `alone.tau_of_macs`: how their
      MACs alone order them; `alone.partial_tau`: what shared weights know beside MACs.
    - `alone.gap`: the mean of what accuracy is higher with shared weights than alone.
    - `alone.improvement`: of every two neighbours in MACs the one that shared weights prefer, against either;
      `alone.improvement_of_macs`: the dearer one, against either.
    - `search.improvement`: the search's front against subnets that nobody chose, at the same MACs. The front
      was chosen on these same images, so that it is somewhat too high.

    A figure is None as long as what it is taken from is missing, or too alike to have one. Several ranks
    share the images of statistics and scores, and train together; the first alone reads and writes.

    Args:
        bench: the run.
        subnets: how many, spread over the logarithm of the MACs, smallest and largest among them.
        alone: how many of them are trained alone as well, in pairs of neighbours, so that networks of about
            the same MACs can be compared.
        epochs: of training alone; as many as the supernet's where it is None.
        listener: hears of every scored network, and of training.
        clock: seconds.

    Raises:
        ConfigError: numbers that cannot be used, or a space whose networks all cost the same.
        RunError: training is not finished, or a result's file is damaged.
        TrainingStopped: the loss of a network trained alone runs away.
    """
    check_numbers(subnets, alone, epochs)
    listener.stage("evaluate")
    _ = bench.supernet  # an unfinished training is told before anything else is computed
    asked = bench.ranks.from_first(lambda: ask(bench, subnets, alone, epochs))
    ranks = bench.ranks
    if ranks.first:
        (bench.run.folder / RESULTS).mkdir(exist_ok=True)
    networks = list(dict.fromkeys([*asked.subnets, *asked.front]))
    shared: dict[Arch, Scored] = {}
    for number, arch in enumerate(networks, 1):
        name = f"{RESULTS}/{arch.key}.json"
        known = _known(bench, arch, name)
        shared[arch] = known or _score(bench, arch, name, partial(bench.supernet.materialize, arch), clock)
        if known is None and ranks.first:
            _write(bench, asked, shared, {}, figures=False)
        listener.scored(arch.key, number, len(networks))
    # networks trained alone without the run's teachers, as they once all were, are other results
    how = "taught" if bench.config.train.teachers else "alone"
    files = {arch: f"{RESULTS}/{arch.key}-{how}-{asked.epochs:g}" for arch in asked.alone}
    trained = {arch: _known(bench, arch, f"{name}.json") for arch, name in files.items()}
    found = ranks.from_first(lambda: _write(bench, asked, shared, trained, figures=True))
    missing = [arch for arch, known in trained.items() if known is None]
    if missing:
        listener.note(_forecast(bench, missing, asked.epochs))
    for number, arch in enumerate(missing, 1):
        listener.stage(f"train alone, {number} of {len(missing)}: {arch.key}")
        folder = bench.run.folder / files[arch]
        make = partial(train_alone, bench, arch, epochs=asked.epochs, folder=folder, listener=listener)
        name, cost = f"{files[arch]}.json", folder / "training.json"
        trained[arch] = _score(bench, arch, name, make, clock, training=cost)
        found = ranks.from_first(lambda: _write(bench, asked, shared, trained, figures=True))
    if not ranks.first:
        return found
    for name in files.values():
        shutil.rmtree(bench.run.folder / name, ignore_errors=True)  # the checkpoints of what is done
    return found


def _forecast(bench: Workbench, archs: Sequence[Arch], epochs: float) -> str:
    batch = bench.config.data.batch_size
    per_epoch = bench.data.train.steps_per_epoch(batch)
    steps = max(1, round(epochs * per_epoch))
    train = bench.config.train
    of_an_image = sum(
        run_macs(bench, replace(alone_with(train), arch=arch), train, steps=steps, steps_per_epoch=per_epoch)
        for arch in archs
    )
    macs = of_an_image * batch
    return f"{len(archs)} networks to train alone, {steps:,} steps each: {macs:.3g} MACs in all"


def _known(bench: Workbench, arch: Arch, name: str) -> Scored | None:
    """What the file `name` holds of `arch`; None where there is no such file.

    Raises:
        RunError: it is damaged.
    """
    return bench.ranks.from_first(lambda: _read(bench, arch, name))


def _read(bench: Workbench, arch: Arch, name: str) -> Scored | None:
    try:
        known = bench.run.read_json(name)
        if known is None:
            return None
        return Scored(arch, known["macs"], hits_from_text(known["hits"], known["images"]), known["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{bench.run.folder / name} is damaged ({error}); remove it, and the network is scored again"
        ) from None


def _score(
    bench: Workbench,
    arch: Arch,
    name: str,
    make: Callable[[], nn.Module],
    clock: Callable[[], float],
    *,
    training: Path | None = None,
) -> Scored:
    """The network that `make` makes of `arch`, recalibrated and scored; its result is written to `name`.

    Beside it stands what its training cost, where `training` is the file that tells.
    """
    began = clock()
    network = make()
    resolution = bench.resolution(arch)
    recalibrate_together(network, bench.recalibration_images(resolution), ranks=bench.ranks)
    found = Scored(arch, bench.macs(arch), _hits(bench, network, resolution), clock() - began)
    if not bench.ranks.first:
        return found
    content = {
        "decisions": dict(arch),
        "macs": found.macs,
        "top1": found.accuracy.top1,
        "images": len(found.hits),
        "hits": hits_to_text(found.hits),
        "seconds": found.seconds,
    }
    if training is not None:
        content["training"] = json.loads(training.read_text())["spent"]
    bench.run.write_json(name, content)
    return found


def _hits(bench: Workbench, network: nn.Module, resolution: int) -> NDArray[np.bool_]:
    """Which images of the search split `network` gets right; each rank looks at its part of every batch."""
    images = bench.data.search.at(resolution, batch_size=EVALUATION_BATCH, device=bench.torch_device)
    right = torch.zeros(len(bench.data.search), dtype=torch.int64, device=bench.torch_device)
    first = 0
    with torch.no_grad():
        for number, batch in enumerate(images):
            if number % bench.ranks.world == bench.ranks.rank:
                hit = network(batch.images).argmax(dim=1) == batch.labels
                right[first : first + len(hit)] = hit.long()
            first += len(batch.labels)
    hits: NDArray[np.bool_] = bench.ranks.sum(right).cpu().numpy().astype(np.bool_)
    return hits


def _write(
    bench: Workbench,
    asked: Asked,
    shared: Mapping[Arch, Scored],
    trained: Mapping[Arch, Scored | None],
    *,
    figures: bool,
) -> dict[str, Any]:
    """What is known so far, also written to the run's folder; without `figures`, the single results only."""
    rows = [shared[arch] for arch in asked.subnets if arch in shared]
    alone = [known for arch in asked.alone if (known := trained.get(arch)) is not None]
    front = [shared[arch] for arch in asked.front if arch in shared]
    seed, extremes = bench.config.seed, asked.extremes
    content = {
        "finished": figures and len(alone) == len(asked.alone),
        "images": len(bench.data.search),
        "extremes_macs": list(extremes),
        "subnets_wanted": len(asked.subnets),
        "area": area_under(rows, extremes, seed=seed) if figures else None,
        "subnets": [row(scored) for scored in rows],
        "alone": {
            "epochs": asked.epochs,
            "wanted": len(asked.alone),
            **(compared([shared[s.arch] for s in alone], alone, seed=seed) if alone and figures else {}),
            "networks": [row(scored) for scored in alone],
        },
        "search": {
            "improvement": gained(rows, front, extremes, seed=seed) if front and figures else None,
            "networks": [row(scored) for scored in front],
        },
    }
    bench.run.write_json(SUMMARY, content)
    return content
