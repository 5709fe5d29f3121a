"""train(): the one loop, which obeys every strategy."""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nestling.config import TrainConfig
from nestling.data import Batch
from nestling.models.channels import channel_groups
from nestling.models.sorting import sort_channels
from nestling.models.supernet import Supernet
from nestling.run import write_atomically
from nestling.space import Arch
from nestling.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from nestling.train.losses import label_loss, soft_label_loss
from nestling.train.optimization import Precision, Schedule, make_optimizer
from nestling.train.strategies import Progress, Strategy

DIVERGED = 3.0
RECENT_STEPS = 50


class TrainingStopped(RuntimeError):  # noqa: N818 - it names what happened
    """Training that cannot go on; the message says why and what is kept."""


class TrainStream(Protocol):
    """Training batches whose content depends on the step alone, so that a run resumes where it stopped."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        """Batches without end, from that of `start_step` on."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make an epoch."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What is noted of a moment of training. Accuracies are estimates with the batch's own statistics."""

    step: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    largest_top1: float | None = None
    smallest_top1: float | None = None


def train(
    supernet: Supernet,
    stream: TrainStream,
    *,
    strategy: Strategy,
    config: TrainConfig,
    batch_size: int,
    augment: str,
    seed: int,
    folder: Path,
    device: torch.device | str = "cpu",
    estimate: Callable[[Arch], float] | None = None,
    on_record: Callable[[TrainingRecord, Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[TrainingRecord]:
    """The records of the whole run, after which `supernet` holds the trained weights.

    Continues from the newest checkpoint in `folder`. Chance comes from `seed` and the step alone: a run that
    was killed and continued ends, on a CPU, with the same weights to the last bit. Records are kept in
    `folder/records.jsonl`, one an epoch.

    Args:
        supernet: changed in place.
        stream: where batches come from.
        strategy: which subnets each step visits.
        config: the optimizer, its schedule, regularisation.
        batch_size: images a step.
        augment: how `stream` augments.
        seed: of the subnets drawn, dropout and stochastic depth.
        folder: for checkpoints and records.
        device: where the network is.
        estimate: top-1 of an arch, for the records; called once an epoch for the largest and the smallest.
        on_record: called after every step with what is known.
        clock: seconds.

    Raises:
        TrainingStopped: a loss or a weight is not a number, or the loss runs away; the last good checkpoint
            is kept.
        CheckpointError: there are checkpoints, and none is whole.
        Unsortable: the strategy sorts channels, and the network's data flow cannot be followed.
    """
    per_epoch = stream.steps_per_epoch(batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    schedule = Schedule(config.lr, round(config.warmup_epochs * per_epoch), steps)
    parameters = dict(supernet.largest.named_parameters())
    optimizer = make_optimizer(supernet.largest, config)
    precision = Precision(config.amp, torch.device(device))
    if any(strategy.sorts_channels(Progress(step, steps, per_epoch)) for step in range(steps)):
        channel_groups(supernet.largest)  # a network that cannot be sorted is refused now, not at the switch

    begun = load_checkpoint(folder)
    records = _read_records(folder, until=begun.step if begun else 0)
    if begun is not None:
        restore(supernet, begun)
        restore_optimizer(optimizer, begun.tensors, parameters)
        precision.load(begun.state["scaler"])
    _write_records(folder, records)

    recent: deque[float] = deque(maxlen=RECENT_STEPS)
    first_loss: float | None = begun.state["first_loss"] if begun else None
    first = begun.step if begun else 0
    saved_at = epoch_began = clock()
    supernet.train()

    def save(step: int) -> None:
        tensors = {f"largest/{name}": t for name, t in supernet.largest.state_dict().items()}
        tensors |= optimizer_tensors(optimizer, parameters)
        state = {"scaler": precision.state(), "first_loss": first_loss}
        try:
            save_checkpoint(folder, Checkpoint(step, tensors, state))
        except ValueError as error:
            raise stopped(str(error), step) from None

    def stopped(reason: str, step: int) -> TrainingStopped:
        kept = load_checkpoint(folder)
        where = (
            f"the checkpoint of step {kept.step} is kept in {folder}" if kept else "no checkpoint was saved"
        )
        return TrainingStopped(
            f"{reason}, after step {step} of {steps}; {where}. "
            "In a new folder, try a smaller train.lr, a longer train.warmup_epochs or train.clip_norm=1"
        )

    batches = stream.batches(start_step=first, batch_size=batch_size, augment=augment, device=device)
    for step in range(first, steps):
        progress = Progress(step, steps, per_epoch)
        if strategy.sorts_channels(progress):
            sort_channels(supernet.largest, optimizer)
        torch.manual_seed(_mix(seed, step))
        lr = schedule.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = random.Random(f"visits/{seed}/{step}")
        losses = _step(supernet, next(batches), strategy, progress, rng, config, precision)
        loss = losses[0]
        precision.step(optimizer, list(parameters.values()), clip_norm=config.clip_norm)

        recent.append(loss)
        first_loss = loss if first_loss is None else first_loss
        mean = sum(recent) / len(recent)
        done = step + 1
        runs_away = len(recent) == RECENT_STEPS and mean > DIVERGED * first_loss
        if runs_away or not all(map(math.isfinite, losses)):
            worst = mean if runs_away else next(x for x in losses if not math.isfinite(x))
            raise stopped(
                f"the loss is {worst:.3g} (it began at {first_loss:.3g}; learning rate {lr:.3g})", done
            )

        now = clock()
        ends_epoch = done % per_epoch == 0 or done == steps
        steps_of_epoch = done - max(first, (step // per_epoch) * per_epoch)
        record = TrainingRecord(
            step=done,
            epoch=done / per_epoch,
            loss=mean,
            lr=lr,
            images_per_second=steps_of_epoch * batch_size / max(now - epoch_began, 1e-9),
            seconds=now - epoch_began,
        )
        if ends_epoch:
            if estimate is not None:
                largest, smallest = estimate(supernet.space.largest), estimate(supernet.space.smallest)
                record = replace(record, largest_top1=largest, smallest_top1=smallest)
                supernet.train()
            records.append(record)
            _append_record(folder, record)
            epoch_began = clock()
        if on_record is not None:
            on_record(record, Progress(done, steps, per_epoch))
        if done == steps or now - saved_at >= config.checkpoint_seconds:
            save(done)
            saved_at = clock()
    supernet.eval()
    return records


def restore(supernet: Supernet, checkpoint: Checkpoint) -> None:
    """Gives `supernet` the weights of `checkpoint`, in place."""
    prefix = "largest/"
    weights = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    supernet.largest.load_state_dict(weights)


def _step(
    supernet: Supernet,
    batch: Batch,
    strategy: Strategy,
    progress: Progress,
    rng: random.Random,
    config: TrainConfig,
    precision: Precision,
) -> list[float]:
    """The visits' losses, in their order, after the gradients of all were added up.

    Raises:
        ValueError: the strategy visits no subnet, or one that learns from an arch not visited before it.
    """
    soft_labels: dict[Arch, Tensor] = {}
    losses: list[Tensor] = []
    for visit in strategy.visits(supernet.space, progress, rng):
        if visit.learns_from is not None and visit.learns_from not in soft_labels:
            raise ValueError(
                f"{strategy}: {visit.arch.key} learns from {visit.learns_from.key}, "
                f"which is not visited before it at step {progress.step}"
            )
        with precision.autocast():
            logits = supernet(batch.images, visit.arch)
            if visit.learns_from is None:
                loss = label_loss(logits, batch.labels, smoothing=config.label_smoothing)
            else:
                loss = soft_label_loss(logits, soft_labels[visit.learns_from])
        # a random subnet may be the teacher itself: its first visit is the one to learn from
        soft_labels.setdefault(visit.arch, logits.detach())
        precision.backward(loss * visit.weight)
        losses.append(loss.detach())
    if not losses:
        raise ValueError(f"{strategy} visits no subnet at step {progress.step}")
    values: list[float] = torch.stack(losses).tolist()
    return values


def _mix(seed: int, step: int) -> int:
    return random.Random(f"torch/{seed}/{step}").getrandbits(63)


def _read_records(folder: Path, *, until: int) -> list[TrainingRecord]:
    path = folder / "records.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(TrainingRecord(**json.loads(line)))
        except json.JSONDecodeError:
            break  # a line cut by a crash; the step it tells of is done again
    return [record for record in records if record.step <= until]


def read_records(folder: Path) -> list[TrainingRecord]:
    """Every record of the run in `folder`."""
    return _read_records(folder, until=2**62)


def _write_records(folder: Path, records: list[TrainingRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_atomically(folder / "records.jsonl", lines.encode())


def _append_record(folder: Path, record: TrainingRecord) -> None:
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
