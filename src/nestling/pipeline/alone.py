"""One network of a run's space, trained by itself: from new weights, or from those that it is given."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from nestling.config import TrainConfig
from nestling.models.building import Build
from nestling.models.layouts import Layout
from nestling.models.supernet import Supernet
from nestling.pipeline.asked import float_space
from nestling.pipeline.counting import counted
from nestling.pipeline.listening import Listener
from nestling.pipeline.turns import training_in
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
    part of them. The warm-up is the same part of `epochs` as it is of the supernet's. As within the supernet,
    the space's largest network alone has dropout and stochastic depth; a sandwich's learning rate with a
    constant tail has it here too.

    Raises:
        TrainingStopped: the loss runs away.
    """
    config = bench.config.train
    return train_network(
        bench,
        arch,
        begins=new_weights(bench, arch),
        strategy=alone_with(config),
        config=recipe_alone(
            config,
            epochs=epochs,
            given=bool(bench.space.largest.get("pretrained", False)),
            largest=arch == float_space(bench.space).largest,
        ),
        teachers=bench.teachers,
        folder=folder,
        listener=listener,
    )


def alone_with(config: TrainConfig) -> Alone:
    """What one network alone learns from, in a run of `config`: labels, and the teachers that it names.

    Their weights are those with which the supernet's subnets learn from them: of progressive shrinking the
    labels' is 1.
    """
    tail = config.strategy == "sandwich" and config.constant_tail
    if not config.teachers:
        return Alone(constant_tail=tail)
    labels = config.teacher_labels if config.strategy == "alone" else 1.0
    return Alone(teacher=config.teacher_weight, labels=labels, constant_tail=tail)


def recipe_alone(train: TrainConfig, *, epochs: float, given: bool, largest: bool) -> TrainConfig:
    """The supernet's recipe `train`, for one network for so many epochs.

    Args:
        train: the supernet's.
        epochs: in place of the supernet's; warm-up takes the same part of them.
        given: whether the network has weights already, which are then left as they are.
        largest: whether it is the space's largest, which alone is regularised.
    """
    changed: dict[str, object] = {
        "epochs": epochs,
        "warmup_epochs": train.warmup_epochs * epochs / train.epochs,
        "zero_last_norms": train.zero_last_norms and not given,
    }
    if not largest:
        changed |= {"dropout": 0.0, "drop_path": 0.0}
    return train.model_copy(update=changed)


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
    build: Build | None = None,
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
        build: makes a network like `begins`, where that is not one of the run's family.

    Raises:
        TrainingStopped: the loss runs away.
        RunError: another process trains in `folder`.
    """
    space = bench.space.only({name: [value] for name, value in arch.items()})
    torch.manual_seed(bench.config.seed)
    supernet = Supernet(
        space,
        bench.family.build if build is None else build,
        layout=bench.family.layout if build is None else _whole,
        largest=begins,
        dropout=config.dropout,
        drop_path=config.drop_path,
        calling=bench.calling if config.quantize else None,
    ).to(bench.torch_device)
    with training_in(folder, ranks=bench.ranks), counted(bench, teachers=teachers) as account:
        train(
            supernet,
            bench.data.train.divided(bench.ranks.rank, of=bench.ranks.world),
            strategy=strategy,
            config=config,
            batch_size=bench.config.data.batch_size,
            augment=bench.config.data.augment,
            seed=bench.config.seed,
            folder=folder,
            device=bench.torch_device,
            teachers=teachers,
            ranks=bench.ranks,
            on_record=listener.training,
            account=account,
        )
    told = {"finished": True, "spent": account.spent().to_dict()}
    if bench.ranks.first:
        write_atomically(folder / "training.json", json.dumps(told, indent=2).encode())
    return supernet.materialize(space.largest)


def _whole(network: nn.Module, arch: Arch) -> Layout:
    """No axis is made of parts: nothing is cut where there is one arch."""
    del network, arch
    return {}
