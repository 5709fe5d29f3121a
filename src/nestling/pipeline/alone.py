"""One network of a run's space, trained by itself: from new weights, or from those that it is given."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from nestling.config import TrainConfig
from nestling.models.supernet import Supernet
from nestling.pipeline.counting import counted
from nestling.pipeline.listening import Listener
from nestling.pipeline.workbench import Workbench
from nestling.run import write_atomically
from nestling.space import Arch
from nestling.train.loop import train
from nestling.train.strategies import Alone
from nestling.train.teachers import SoftLabels


def train_alone(
    bench: Workbench, arch: Arch, *, epochs: float, folder: Path, listener: Listener
) -> nn.Module:
    """The network of `arch`, trained by itself with the run's recipe; not recalibrated yet.

    It learns from the labels, and from the teachers outside the supernet where the supernet has learnt from
    them: what sharing weights is worth is the difference to a network that was told the same. Continues from
    the checkpoints in `folder`. Where the supernet began from pretrained weights, the network begins from its
    part of them.

    Raises:
        TrainingStopped: the loss runs away.
    """
    config = bench.config.train
    return train_network(
        bench,
        arch,
        begins=new_weights(bench, arch),
        strategy=alone_with(config),
        config=config.model_copy(update={"epochs": epochs}),
        teachers=bench.teachers,
        folder=folder,
        listener=listener,
    )


def alone_with(config: TrainConfig) -> Alone:
    """What one network alone learns from, in a run of `config`: labels, and the teachers that it names.

    Their weights are those with which the supernet's subnets learn from them: of progressive shrinking the
    labels' is 1.
    """
    if not config.teachers:
        return Alone()
    labels = config.teacher_labels if config.strategy == "alone" else 1.0
    return Alone(teacher=config.teacher_weight, labels=labels)


def new_weights(bench: Workbench, arch: Arch) -> nn.Module | None:
    """The pretrained weights that `arch` begins from, where the run's supernet began from such; else None."""
    if not bench.space.largest.get("pretrained", False):
        return None
    return bench.new_supernet().materialize(arch)


def train_network(
    bench: Workbench,
    arch: Arch,
    *,
    begins: nn.Module | None,
    strategy: Alone,
    config: TrainConfig,
    teachers: SoftLabels | None,
    folder: Path,
    listener: Listener,
) -> nn.Module:
    """The network of `arch`, trained by itself on the run's images; not recalibrated yet.

    Continues from the checkpoints in `folder`; its `training.json` then tells what it cost.

    Args:
        bench: the run.
        arch: of its space.
        begins: the network to train, which is changed; None: a new one, from the run's seed.
        strategy: what it learns from.
        config: how.
        teachers: outside the network.
        folder: for checkpoints and records.
        listener: hears of every step.

    Raises:
        TrainingStopped: the loss runs away.
    """
    space = bench.space.only({name: [value] for name, value in arch.items()})
    torch.manual_seed(bench.config.seed)
    supernet = Supernet(
        space,
        bench.family.build,
        layout=bench.family.layout,
        largest=begins,
        dropout=config.dropout,
        drop_path=config.drop_path,
    ).to(bench.torch_device)
    with counted(bench, teachers=teachers) as account:
        train(
            supernet,
            bench.data.train,
            strategy=strategy,
            config=config,
            batch_size=bench.config.data.batch_size,
            augment=bench.config.data.augment,
            seed=bench.config.seed,
            folder=folder,
            device=bench.torch_device,
            teachers=teachers,
            on_record=listener.training,
            account=account,
        )
    told = {"finished": True, "spent": account.spent().to_dict()}
    write_atomically(folder / "training.json", json.dumps(told, indent=2).encode())
    return supernet.materialize(space.largest)
