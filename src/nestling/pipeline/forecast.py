"""What training will cost, said before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from nestling.config import TrainConfig
from nestling.data.curriculum import CURRICULA
from nestling.models.supernet import Supernet, capped
from nestling.pipeline.workbench import Workbench
from nestling.space import Arch
from nestling.train.losses import label_loss
from nestling.train.optimization import Precision
from nestling.train.sharing import rows_of
from nestling.train.strategies import Strategy
from nestling.train.strategies.accounting import BACKWARD, SAMPLED_STEPS, training_macs


@dataclass(frozen=True, slots=True)
class Forecast:
    """The cost of a whole training run: optimizer steps, images read, multiply-accumulates, seconds."""

    steps: int
    images: int
    macs: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def forecast(
    bench: Workbench,
    supernet: Supernet,
    strategy: Strategy,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """The cost of training `supernet` by `strategy`, from the visits of some steps and the speed of one.

    Under a curriculum each of its periods is counted at its side of the images. On several ranks this one
    times its own part of a batch, in the precision of training; the cost is that of all, the seconds those
    until all are done. Nothing of the supernet changes.
    """
    config = bench.config
    batch_size = config.data.batch_size
    per_epoch = bench.data.train.steps_per_epoch(batch_size)
    steps = max(1, round(config.train.epochs * per_epoch))
    of_an_image = run_macs(bench, strategy, config.train, steps=steps, steps_per_epoch=per_epoch)
    rows = rows_of(batch_size, bench.ranks)
    mine = rows.stop - rows.start
    largest = supernet.space.largest
    seconds = _seconds_of_a_pass(bench, supernet, largest, mine, clock)
    speed = bench.macs(largest) * mine * BACKWARD / seconds
    return Forecast(
        steps=steps,
        images=steps * batch_size,
        macs=of_an_image * batch_size,
        seconds=of_an_image * mine / speed,
    )


def run_macs(
    bench: Workbench, strategy: Strategy, train: TrainConfig, *, steps: int, steps_per_epoch: int
) -> float:
    """The multiply-accumulates for each image of a batch, of the run's `steps` under `train`'s curriculum."""
    full = bench.data.size
    curriculum = CURRICULA.get(train.curriculum)
    if curriculum is None:
        parts = [(0, steps, full)]
    else:
        curriculum = replace(curriculum, multiple=train.curriculum_multiple)
        starts = curriculum.starts(steps)
        sides = [curriculum.side(period, full=full) for period in curriculum.periods]
        parts = list(zip(starts, [*starts[1:], steps], sides, strict=True))

    def macs_at(side: int, arch: Arch) -> int:
        return bench.macs(arch if curriculum is None else capped(arch, side))

    return sum(
        training_macs(
            strategy,
            bench.space,
            partial(macs_at, side),
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            teachers_macs=bench.teachers_macs_at(side),
            sampled=math.ceil(SAMPLED_STEPS * (end - first) / steps),
            part=(first, end),
        )
        for first, end, side in parts
        if end > first
    )


def _seconds_of_a_pass(
    bench: Workbench, supernet: Supernet, arch: Arch, images: int, clock: Callable[[], float]
) -> float:
    """Seconds of a forward and a backward pass of `images` images, the least of three."""
    device = bench.torch_device
    precision = Precision(bench.config.train.amp, device)
    shown = torch.randn(images, 3, bench.data.size, bench.data.size, device=device)
    labels = torch.zeros(images, dtype=torch.long, device=device)
    times = []
    supernet.train()
    for _ in range(3):
        began = clock()
        with precision.autocast():
            loss = label_loss(supernet(shown, arch), labels, smoothing=0.0)
        precision.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    supernet.zero_grad(set_to_none=True)
    return min(times)
