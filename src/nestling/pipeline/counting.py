"""An account of what a training of this run costs, with the meters of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

from nestling.energy import Part, kept_up, meters
from nestling.pipeline.workbench import Workbench, macs_of
from nestling.train.account import Account
from nestling.train.teachers import SoftLabels


@contextmanager
def counted(bench: Workbench, *, teachers: SoftLabels | None = None) -> Iterator[Account]:
    """An account for a training of `bench`'s data on its device, whose meters are read as long as it lasts.

    The first rank on a machine tells its processors, and each rank the GPU that it trains on. `teachers` are
    those that this training asks, where they are not the run's.
    """
    device = bench.torch_device
    tells: set[Part] = {"gpu"}
    if bench.ranks.world == 1 or os.environ.get("LOCAL_RANK") == "0":
        tells |= {"cpu", "dram"}
    gpus = [f"GPU-{torch.cuda.get_device_properties(device).uuid}"] if device.type == "cuda" else []
    found = [meter for meter in meters(gpus=gpus) if meter.part in tells]
    with kept_up(found):
        asked = bench.teachers_macs_at if teachers is None else cache(partial(macs_of, teachers))
        yield Account(macs=bench.macs, teachers_macs=asked, meters=found, tells=tells)
