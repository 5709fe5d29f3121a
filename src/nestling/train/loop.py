"""train(): the one loop, which obeys every strategy."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nestling.config import TrainConfig
from nestling.data import TrainStream
from nestling.data.curriculum import CURRICULA, CurriculumStream
from nestling.models.channels import channel_groups
from nestling.models.compiling import compiled_calls
from nestling.models.initialization import zero_last_norms
from nestling.models.sorting import shapes_within, sort_channels
from nestling.models.supernet import Supernet
from nestling.space import Arch
from nestling.train.account import Account
from nestling.train.averaging import WeightAverage, averaged_weights
from nestling.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from nestling.train.distributed import ALONE, STEPS_BETWEEN_CHECKS, Ranks, check_agreement
from nestling.train.gradients import average, average_gradients
from nestling.train.joint_norm import joint_statistics
from nestling.train.lessons import LessonError, Teachers, remember, teach
from nestling.train.optimization import Precision, make_optimizer
from nestling.train.records import TrainingRecord, append_record, read_records, write_records
from nestling.train.strategies import Progress, Strategy
from nestling.train.teachers import Frozen, refrozen
from nestling.train.watching import RECENT_STEPS, Watch


class TrainingStopped(RuntimeError):  # noqa: N818 - it names what happened
    """Training that cannot go on; the message says why and what is kept."""


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
    teachers: Teachers | None = None,
    ranks: Ranks = ALONE,
    estimate: Callable[[Arch], float] | None = None,
    on_record: Callable[[TrainingRecord, Progress], None] | None = None,
    account: Account | None = None,
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
        teachers: gives soft labels (N, classes), probabilities, for images (N, 3, H, W), to visits that ask.
        ranks: which train together. `stream` gives each its part of the batches, of which `batch_size` is
            the size before they are divided; every rank calls this with the same arguments. Nothing saved
            depends on their number: training may go on with another.
        estimate: top-1 of an arch, for the records; called once an epoch for the largest and the smallest,
            on every rank.
        on_record: called after every step with what is known.
        account: counts what the run costs, from where the checkpoint's left off.
        clock: seconds.

    Raises:
        TrainingStopped: a loss or a weight is not a number, or the loss runs away; the last good checkpoint
            is kept.
        CheckpointError: there are checkpoints, and none is whole.
        RanksError: a rank is gone, or does something else than the others.
        Unsortable: the strategy sorts channels, and the network's data flow cannot be followed.
    """
    per_epoch = stream.steps_per_epoch(batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    warmup = round(config.warmup_epochs * per_epoch)
    schedule = strategy.schedule(
        lr=config.lr,
        warmup_steps=warmup if warmup < steps else steps // 2,
        steps=steps,
        steps_per_epoch=per_epoch,
    )
    parameters = dict(supernet.largest.named_parameters())
    trained = list(parameters.values())
    optimizer = make_optimizer(supernet.largest, config)
    precision = Precision(config.amp, torch.device(device))
    sorted_at = (strategy.sorts_channels(supernet.space, Progress(s, steps, per_epoch)) for s in range(steps))
    if any(part is not None for part in sorted_at):
        channel_groups(supernet.largest)  # a network that cannot be sorted is refused now, not at the switch

    begun = ranks.from_first(lambda: load_checkpoint(folder))
    records = ranks.from_first(lambda: read_records(folder, until=begun.step if begun else 0))
    if begun is not None:
        restore(supernet, begun, averaged=False)
        restore_optimizer(optimizer, begun.tensors, parameters)
        precision.load(begun.state["scaler"])
        teachers = refrozen(supernet, begun.tensors) or teachers
    elif config.zero_last_norms:
        zero_last_norms(supernet.largest)
    ranks.share(supernet.largest)
    averaged = WeightAverage(parameters, decay=config.average) if config.average else None
    if averaged is not None and begun is not None:
        averaged.load(begun.tensors, updates=begun.state.get("updates", 0))
    if ranks.first:
        write_records(folder, records)

    recent = deque(begun.state.get("recent", []) if begun else [], maxlen=RECENT_STEPS)
    watch = Watch(begun.state.get("watch") if begun else None)
    gaps: dict[str, float] = dict(begun.state.get("gaps", {})) if begun else {}
    first = begun.step if begun else 0
    if account is not None:
        account.begin(begun.state.get("account") if begun else None, ranks=ranks)
    saved_at = epoch_began = clock()
    supernet.train()

    def save(step: int) -> None:
        tensors = {f"largest/{name}": t for name, t in supernet.largest.state_dict().items()}
        tensors |= optimizer_tensors(optimizer, parameters)
        if isinstance(teachers, Frozen):
            tensors |= teachers.tensors()
        state: dict[str, Any] = {"scaler": precision.state(), "gaps": gaps}
        state |= {"recent": list(recent), "watch": watch.state()}
        if averaged is not None:
            tensors |= averaged.tensors()
            state["updates"] = averaged.updates
        if account is not None:
            state["account"] = account.state()
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
            "In a new folder, try a smaller train.lr (of a finetuning, --lr), a longer train.warmup_epochs "
            "or train.clip_norm=1"
        )

    curriculum = CURRICULA.get(config.curriculum)
    if curriculum is not None:
        stream = CurriculumStream(stream, replace(curriculum, multiple=config.curriculum_multiple), steps)
    if config.compile:
        supernet.calls |= compiled_calls([supernet.space.largest, supernet.space.smallest])
    batches = stream.batches(start_step=first, batch_size=batch_size, augment=augment, device=device)
    for step in range(first, steps):
        progress = Progress(step, steps, per_epoch, gaps)
        if strategy.freezes_teacher(progress):
            teachers = Frozen(supernet)
        trained_part = strategy.sorts_channels(supernet.space, progress)
        if trained_part is not None:
            sort_channels(supernet.largest, optimizer, nested=shapes_within(supernet.build, trained_part))
            if averaged is not None:
                averaged.restart()
        torch.manual_seed(_mix(seed, step) + ranks.rank)
        lr = schedule.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = random.Random(f"visits/{seed}/{step}")
        visits = strategy.visits(supernet.space, progress, rng)
        if step == first or step % STEPS_BETWEEN_CHECKS == 0:
            check_agreement(ranks, [visit.arch for visit in visits], supernet.largest, step=step)
        batch = next(batches)
        try:
            with joint_statistics(ranks if config.joint_norm else ALONE):
                taught = teach(
                    supernet,
                    batch,
                    visits,
                    smoothing=config.label_smoothing,
                    precision=precision,
                    teachers=teachers,
                    at_most=None if curriculum is None else batch.images.shape[-1],
                    mean=partial(average, ranks, images=len(batch.labels)),
                    finish=partial(average_gradients, ranks, trained, images=len(batch.labels)),
                )
        except LessonError as error:
            raise LessonError(f"{error}, as {strategy} says at step {step}") from None
        losses = taught.losses
        gaps = remember(gaps, taught.gaps)
        if account is not None:
            account.step(progress, visits, taught.archs, batch=batch)
        precision.step(optimizer, trained, clip_norm=config.clip_norm, clip_value=config.clip_value)
        if averaged is not None:
            averaged.update()

        recent.append(losses[0])
        watch.note(visits, taught.on_labels, classes=taught.classes)
        done = step + 1
        spoilt = [loss for loss in losses if not math.isfinite(loss)]
        if spoilt:
            raise stopped(f"the loss is {spoilt[0]:.3g} (learning rate {lr:.3g})", done)
        if watch.runs_away:
            raise stopped(
                f"the loss on the labels is {watch.mean:.3g}, the mean of {RECENT_STEPS} steps (of what is "
                f"visited now it began at {watch.first:.3g}; learning rate {lr:.3g})",
                done,
            )

        now = clock()
        ends_epoch = done % per_epoch == 0 or done == steps
        steps_of_epoch = done - max(first, (step // per_epoch) * per_epoch)
        record = TrainingRecord(
            step=done,
            epoch=done / per_epoch,
            loss=sum(recent) / len(recent),
            lr=lr,
            images_per_second=steps_of_epoch * batch_size / max(now - epoch_began, 1e-9),
            seconds=now - epoch_began,
        )
        if ends_epoch:
            if estimate is not None:
                with averaged.in_place() if averaged is not None else nullcontext():
                    largest, smallest = map(estimate, (supernet.space.largest, supernet.space.smallest))
                record = replace(record, largest_top1=largest, smallest_top1=smallest)
                supernet.train()
            if account is not None:
                account.settle()
            records.append(record)
            if ranks.first:
                append_record(folder, record)
            epoch_began = clock()
        if on_record is not None:
            on_record(record, Progress(done, steps, per_epoch, gaps))
        if ranks.first and (done == steps or now - saved_at >= config.checkpoint_seconds):
            save(done)
            saved_at = clock()
    ranks.wait()  # until the last checkpoint is written
    if averaged is not None:
        averaged.settle()
    supernet.eval()
    return records


def restore(supernet: Supernet, checkpoint: Checkpoint, *, averaged: bool = True) -> None:
    """Gives `supernet` the weights of `checkpoint`, in place: the averaged ones, where there are any.

    With `averaged` false they are those that training goes on with.
    """
    prefix = "largest/"
    weights = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    supernet.largest.load_state_dict(weights | (averaged_weights(checkpoint.tensors) if averaged else {}))


def _mix(seed: int, step: int) -> int:
    return random.Random(f"torch/{seed}/{step}").getrandbits(63)
