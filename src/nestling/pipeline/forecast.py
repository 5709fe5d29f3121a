"""What training will cost, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nestling.models.supernet import Supernet
from nestling.pipeline.workbench import Workbench
from nestling.space import Arch
from nestling.train.losses import label_loss
from nestling.train.strategies import Strategy
from nestling.train.strategies.accounting import BACKWARD, training_macs


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

    Nothing of the supernet changes.
    """
    config = bench.config
    batch_size = config.data.batch_size
    per_epoch = bench.data.train.steps_per_epoch(batch_size)
    steps = max(1, round(config.train.epochs * per_epoch))
    of_an_image = training_macs(
        strategy,
        supernet.space,
        bench.macs,
        steps=steps,
        steps_per_epoch=per_epoch,
        teachers_macs=bench.teachers_macs,
    )
    total = of_an_image * batch_size
    largest = supernet.space.largest
    seconds = _seconds_of_a_pass(bench, supernet, largest, batch_size, clock)
    speed = bench.macs(largest) * batch_size * BACKWARD / seconds
    return Forecast(steps=steps, images=steps * batch_size, macs=total, seconds=total / speed)


def _seconds_of_a_pass(
    bench: Workbench, supernet: Supernet, arch: Arch, batch_size: int, clock: Callable[[], float]
) -> float:
    device = bench.torch_device
    images = torch.randn(batch_size, 3, bench.data.size, bench.data.size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    times = []
    supernet.train()
    for _ in range(3):
        began = clock()
        label_loss(supernet(images, arch), labels, smoothing=0.0).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    supernet.zero_grad(set_to_none=True)
    return min(times)
