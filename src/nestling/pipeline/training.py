"""The stage that trains a run's supernet, on one process or on all that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch

from nestling.config import RunConfig
from nestling.pipeline.counting import counted
from nestling.pipeline.forecast import forecast
from nestling.pipeline.listening import Listener
from nestling.pipeline.turns import training_in
from nestling.pipeline.workbench import Workbench, even_batch, find_device
from nestling.space import Arch
from nestling.train.distributed import ALONE, Ranks, joined, ranks_of
from nestling.train.loop import train


@contextmanager
def join_ranks(config: RunConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, this process among them; without it, this process alone.

    Raises:
        ConfigError: the device to train on is unknown or not there.
        RanksError: they cannot be joined as torchrun started them.
    """
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    with joined(ranks_of(os.environ, device=find_device(config.torch_device))) as ranks:
        yield ranks


def train_supernet(bench: Workbench, *, listener: Listener) -> None:
    """Trains the run's supernet to the end, from the newest checkpoint on, on all of the bench's ranks.

    Raises:
        TrainingStopped: the loss runs away or is not a number.
        RanksError: a rank is gone, or does something else than the others.
        RunError: another process is training the run.
    """
    ranks = bench.ranks
    if ranks.from_first(lambda: bench.run.read_json("training.json")) is not None:
        listener.note("training is finished already")
        return
    listener.stage("train")
    config, data = bench.config, bench.data
    supernet = bench.new_supernet()
    strategy = bench.strategy
    expected = ranks.from_first(lambda: forecast(bench, supernet, strategy))
    listener.forecast(expected)
    scored = data.search.take(min(len(data.search), 512))
    size = even_batch(len(scored), at_most=max(64, config.data.batch_size))

    def estimate(arch: Arch) -> float:
        """Top-1 of `arch` on some search images, normalized by each batch's own statistics."""
        supernet.eval()
        correct = total = 0
        with torch.no_grad():
            batches = scored.at(data.size, batch_size=size, device=bench.torch_device)
            for batch in islice(batches, ranks.rank, None, ranks.world):
                correct += int((supernet(batch.images, arch).argmax(dim=1) == batch.labels).sum())
                total += len(batch.labels)
        told = ranks.sum(torch.tensor([correct, total], device=bench.torch_device)).tolist()
        return float(told[0] / told[1])

    with (
        training_in(bench.checkpoints, ranks=ranks),
        bench.timed("train") if ranks.first else nullcontext(),
        counted(bench) as account,
    ):
        train(
            supernet,
            data.train.divided(ranks.rank, of=ranks.world),
            strategy=strategy,
            config=config.train,
            batch_size=config.data.batch_size,
            augment=config.data.augment,
            seed=config.seed,
            folder=bench.checkpoints,
            device=bench.torch_device,
            teachers=bench.teachers,
            ranks=ranks,
            estimate=estimate,
            on_record=listener.training,
            account=account,
        )
    spent = account.spent()
    listener.spent(spent, expected)
    if ranks.first:
        told = {"finished": True, "forecast": expected.to_dict(), "spent": spent.to_dict()}
        bench.run.write_json("training.json", told)
