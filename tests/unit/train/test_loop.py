from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.config import TrainConfig
from nestling.data import Batch
from nestling.models.channels import Unsortable
from nestling.models.compiling import Call, call_lent
from nestling.models.sorting import Shapes, sort_channels
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace
from nestling.train import lessons, loop, watching
from nestling.train.checkpoint import load_checkpoint
from nestling.train.loop import TrainingStopped, restore, train
from nestling.train.records import TrainingRecord, read_records
from nestling.train.schedules import Cosine, Schedule
from nestling.train.strategies import (
    DelayedShrinking,
    Phase,
    Progress,
    ProgressiveShrinking,
    Sandwich,
    Strategy,
    Visit,
)

CLASSES = 3


class ToyBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, width, 1)
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.project(torch.relu(self.norm(self.expand(maps))))
        result: Tensor = self.drop_path(branch) + maps
        return result


class Toy(nn.Module):
    """A hundred weights with all that training treats apart: norms, biases, dropout, drop path."""

    def __init__(self, hidden: int, depth: int) -> None:
        super().__init__()
        self.drop_rate = 0.0
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(ToyBlock(4, hidden) for _ in range(depth)))
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.stem(images))
        pooled = F.dropout(maps.mean((2, 3)), self.drop_rate, self.training)
        logits: Tensor = self.classifier(pooled)
        return logits


def build_toy(arch: Arch) -> nn.Module:
    return Toy(arch.integer("hidden"), arch.integer("depth"))


@dataclass
class ToyStream:
    """Batches that depend on the step alone."""

    per_epoch: int = 4
    spoil_from: int | None = None
    """The first step whose images hold something that is not a number."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        assert augment == "none"
        step = start_step
        while True:
            generator = torch.Generator().manual_seed(step)
            labels = torch.randint(CLASSES, (batch_size,), generator=generator)
            images = torch.randn(batch_size, 3, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
            if self.spoil_from is not None and step >= self.spoil_from:
                images[0, 0, 0, 0] = torch.nan
            yield Batch(images.to(device), labels.to(device))
            step += 1

    def steps_per_epoch(self, batch_size: int) -> int:
        assert batch_size == 8
        return self.per_epoch


def new_supernet(space: SearchSpace, config: TrainConfig) -> Supernet:
    torch.manual_seed(7)
    return Supernet(space, build_toy, dropout=config.dropout, drop_path=config.drop_path)


@dataclass(frozen=True)
class Visits(Strategy):
    """A strategy that says the same at every step."""

    visited: tuple[Visit, ...]

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        del space, progress, rng
        return list(self.visited)

    def schedule(self, *, lr: float, warmup_steps: int, steps: int, steps_per_epoch: int) -> Schedule:
        del steps_per_epoch
        return Cosine(lr, warmup_steps, steps)


QUICK = TrainConfig(epochs=3, lr=0.05, warmup_epochs=0.5, checkpoint_seconds=1e9)
SAVING = QUICK.model_copy(update={"checkpoint_seconds": 0.0})  # after every step
SHRINKING = DelayedShrinking(switch=0.5, ramp_epochs=1.0, random_subnets=1)


def run(supernet: Supernet, folder: Path, **changes: Any) -> list[TrainingRecord]:
    arguments: dict[str, Any] = {
        "strategy": SHRINKING, "config": QUICK, "batch_size": 8, "augment": "none", "seed": 3,
        "folder": folder,
    }  # fmt: skip
    stream = changes.pop("stream", ToyStream())
    return train(supernet, stream, **(arguments | changes))


def weights(supernet: Supernet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in supernet.largest.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class StopError(Exception):
    """What a test interrupts training with."""


def stop_at(step: int) -> Callable[[TrainingRecord, Progress], None]:
    def on_record(record: TrainingRecord, progress: Progress) -> None:
        assert record.step == progress.step
        if record.step == step:
            raise StopError

    return on_record


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_a_run_that_is_interrupted_and_continued_ends_with_the_same_weights(
    space: SearchSpace, tmp_path: Path, optimizer: str
) -> None:
    config = SAVING.model_copy(
        update={"optimizer": optimizer, "lr": 0.01, "dropout": 0.3, "drop_path": 0.5, "clip_norm": 1.0}
    )
    whole = new_supernet(space, config)
    run(whole, tmp_path / "whole", config=config)
    # at the first step, within an epoch, at the end of one, and on both sides of the switch at step 6
    for step in (1, 3, 4, 6, 7, 8, 11):
        supernet = new_supernet(space, config)
        with pytest.raises(StopError):
            run(supernet, tmp_path / "parts", config=config, on_record=stop_at(step))
        saved = load_checkpoint(tmp_path / "parts")
        assert (saved.step if saved else 0) == step - 1
        torch.manual_seed(step)  # chance must not come from what ran before
    supernet = new_supernet(space, config)
    records = run(supernet, tmp_path / "parts", config=config)
    assert same(weights(supernet), weights(whole))
    assert [record.step for record in records] == [4, 8, 12]
    assert read_records(tmp_path / "parts") == records
    losses = [record.loss for record in read_records(tmp_path / "whole")]
    assert [record.loss for record in records] == losses


def test_dropout_and_drop_path_make_a_difference_in_that_comparison(
    space: SearchSpace, tmp_path: Path
) -> None:
    ends = []
    for number, update in enumerate(({}, {"dropout": 0.3}, {"drop_path": 0.5})):
        config = QUICK.model_copy(update=update)
        supernet = new_supernet(space, config)
        run(supernet, tmp_path / str(number), config=config)
        ends.append(weights(supernet))
    assert not any(same(a, b) for a, b in itertools.combinations(ends, 2))


def test_another_seed_draws_other_subnets(space: SearchSpace, tmp_path: Path) -> None:
    ends = []
    for seed in (3, 4):
        supernet = new_supernet(space, QUICK)
        run(supernet, tmp_path / str(seed), seed=seed)
        ends.append(weights(supernet))
    assert not same(*ends)


def test_a_step_is_what_plain_pytorch_does_with_the_same_visits(space: SearchSpace, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"epochs": 0.25, "warmup_epochs": 0.0, "label_smoothing": 0.2})
    subnet = space.canonical({"hidden": 5, "depth": 2})
    visits = (Visit(space.largest), Visit(subnet, learns_from=space.largest, weight=0.25), Visit(subnet))
    trained = new_supernet(space, config)
    run(trained, tmp_path, config=config, strategy=Visits(visits))

    plain = new_supernet(space, config).train()
    decayed = [p for p in plain.largest.parameters() if p.ndim > 1]
    others = [p for p in plain.largest.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    batch = next(ToyStream().batches(start_step=0, batch_size=8, augment="none", device="cpu"))
    teacher = plain(batch.images, space.largest)
    torch.autograd.backward(F.cross_entropy(teacher, batch.labels, label_smoothing=0.2))
    student = plain(batch.images, subnet)
    torch.autograd.backward(0.25 * F.cross_entropy(student, teacher.detach().softmax(1)))
    torch.autograd.backward(F.cross_entropy(plain(batch.images, subnet), batch.labels, label_smoothing=0.2))
    optimizer.step()
    assert same(weights(trained), weights(plain))


def test_a_random_subnet_that_is_the_teacher_leaves_the_teacher_to_others(
    space: SearchSpace, tmp_path: Path
) -> None:
    config = QUICK.model_copy(update={"epochs": 0.25, "dropout": 0.5})
    largest, smallest = space.largest, space.smallest
    taught = Visit(smallest, learns_from=largest)
    ends = []
    # the second visit of the largest has other dropout; with weight 0 only its soft labels could matter
    for number, between in enumerate(((), (Visit(largest, learns_from=largest, weight=0.0),))):
        supernet = new_supernet(space, config)
        run(
            supernet,
            tmp_path / str(number),
            config=config,
            strategy=Visits((Visit(largest), *between, taught)),
        )
        ends.append(weights(supernet))
    assert same(*ends)


@pytest.mark.parametrize("visited", [(), ("smallest",)])
def test_a_strategy_whose_visits_cannot_be_done_is_refused(
    space: SearchSpace, tmp_path: Path, visited: tuple[str, ...]
) -> None:
    strategy = Visits(tuple(Visit(space.smallest, learns_from=space.largest) for _ in visited))
    message = (
        "which is not visited before it, .* at step 0" if visited else "no subnet is visited, .* at step 0"
    )
    with pytest.raises(ValueError, match=message):
        run(new_supernet(space, QUICK), tmp_path, strategy=strategy)


def test_channels_are_sorted_once_before_the_step_of_the_switch(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_after: list[int] = []
    done = [0]

    def counting(
        network: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, nested: Sequence[Shapes]
    ) -> int:
        sorted_after.append(done[0])
        assert optimizer is not None
        assert optimizer.state
        return sort_channels(network, optimizer, nested=nested)

    def on_record(record: TrainingRecord, _: Progress) -> None:
        done[0] = record.step

    monkeypatch.setattr(loop, "sort_channels", counting)
    run(new_supernet(space, QUICK), tmp_path, on_record=on_record)
    assert sorted_after == [6]


def test_training_changes_weights_and_no_running_statistics(space: SearchSpace, tmp_path: Path) -> None:
    supernet = new_supernet(space, QUICK)
    before = weights(supernet)
    buffers = {name for name, _ in supernet.largest.named_buffers()}
    run(supernet, tmp_path, strategy=Sandwich())
    after = weights(supernet)
    assert buffers
    assert {name for name in after if torch.equal(after[name], before[name])} == buffers
    assert not supernet.training


def test_training_learns(space: SearchSpace, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"epochs": 10})
    records = run(new_supernet(space, config), tmp_path, config=config, strategy=Sandwich())
    assert records[-1].loss < 0.8 * math.log(CLASSES)


def test_a_finished_run_is_not_trained_again(space: SearchSpace, tmp_path: Path) -> None:
    supernet = new_supernet(space, QUICK)
    records = run(supernet, tmp_path)
    again = new_supernet(space, QUICK)
    assert run(again, tmp_path, on_record=stop_at(12)) == records
    assert same(weights(again), weights(supernet))


def assert_stopped(space: SearchSpace, folder: Path, *, message: str, kept: int, **changes: Any) -> None:
    with pytest.raises(TrainingStopped, match=message) as caught:
        run(new_supernet(space, SAVING), folder, config=SAVING, **changes)
    assert f"the checkpoint of step {kept} is kept in {folder}" in str(caught.value)
    assert "try a smaller train.lr" in str(caught.value)
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.step == kept
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
    restore(new_supernet(space, QUICK), checkpoint)


def test_a_loss_that_is_not_a_number_stops_training_and_keeps_the_last_good_checkpoint(
    space: SearchSpace, tmp_path: Path
) -> None:
    stream = ToyStream(spoil_from=5)
    assert_stopped(space, tmp_path, message="the loss is nan .* after step 6 of 12", kept=5, stream=stream)


def test_a_loss_of_a_subnet_that_is_not_a_number_stops_training(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lessons._SOFT_LOSSES, "kl", lambda logits, _: logits.sum() * math.inf)
    assert_stopped(space, tmp_path, message="the loss is -?(inf|nan) .* after step 7 of 12", kept=6)


def test_weights_that_are_not_numbers_are_never_saved(space: SearchSpace, tmp_path: Path) -> None:
    # the loss is still a number at the step that spoils the weights
    spoiling = Visits((Visit(space.largest, weight=math.nan),))
    with pytest.raises(TrainingStopped, match=r"largest/.* not finite.*after step 1 of 12; no checkpoint"):
        run(new_supernet(space, SAVING), tmp_path, config=SAVING, strategy=spoiling)
    assert load_checkpoint(tmp_path) is None


def test_a_loss_that_runs_away_stops_training(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "RECENT_STEPS", 2)
    factors = iter([1.0, 1.0, 1.0, 1.0, 8.0, 1.0])

    def growing(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing) * next(factors)

    monkeypatch.setattr(lessons, "label_loss", growing)
    assert_stopped(space, tmp_path, message=r"the loss on the labels is \d.*it began at 1", kept=4)


def test_a_run_that_is_restarted_after_every_step_runs_away_all_the_same(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "RECENT_STEPS", 3)
    config = SAVING.model_copy(update={"epochs": 10.0, "lr": 100.0, "warmup_epochs": 0.0})
    told = []
    for name, every in (("whole", 100), ("parts", 1)):
        for start in range(0, 100, every):
            try:
                run(
                    new_supernet(space, config), tmp_path / name, config=config, strategy=Sandwich(1),
                    on_record=stop_at(start + every + 1),
                )  # fmt: skip
            except StopError:
                continue
            except TrainingStopped as error:
                told.append(str(error).replace(str(tmp_path / name), ""))
                break
    assert len(told) == 2
    assert told[0] == told[1]


def test_soft_labels_of_great_weight_do_not_look_like_training_that_runs_away(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "RECENT_STEPS", 2)
    phases = (Phase("full", 1, 0, 1.0, 1), Phase("depth", 1, 0, 1.0, 1, {"depth": 2}))
    strategy = ProgressiveShrinking(phases, distilled=8.0, sort_channels=False)
    records = run(new_supernet(space, QUICK), tmp_path, strategy=strategy)
    assert records[-1].loss > 2 * records[0].loss  # of which the labels are a ninth


def test_accuracies_of_both_ends_are_noted_at_the_end_of_each_epoch(
    space: SearchSpace, tmp_path: Path
) -> None:
    supernet = new_supernet(space, QUICK)
    asked: list[Arch] = []
    seen: list[TrainingRecord] = []

    def estimate(arch: Arch) -> float:
        supernet.eval()
        asked.append(arch)
        return 0.75 if arch == space.largest else 0.25

    def on_record(record: TrainingRecord, _: Progress) -> None:
        assert supernet.training
        seen.append(record)

    records = run(supernet, tmp_path, estimate=estimate, on_record=on_record)
    assert asked == [space.largest, space.smallest] * 3
    assert [(r.step, r.epoch, r.largest_top1, r.smallest_top1) for r in records] == [
        (4, 1.0, 0.75, 0.25),
        (8, 2.0, 0.75, 0.25),
        (12, 3.0, 0.75, 0.25),
    ]
    assert [r.step for r in seen] == list(range(1, 13))
    assert [r for r in seen if r.largest_top1 is not None] == records
    assert read_records(tmp_path) == records


def test_a_warm_up_as_long_as_the_run_is_cut_to_its_half(space: SearchSpace, tmp_path: Path) -> None:
    rates: list[float] = []
    config = QUICK.model_copy(update={"epochs": 1.0, "warmup_epochs": 1.0})
    run(
        new_supernet(space, config), tmp_path, config=config,
        on_record=lambda record, _: rates.append(record.lr),
    )  # fmt: skip
    assert rates == [Cosine(0.05, 2, 4).at(step) for step in range(4)]


def test_speed_is_that_of_the_epoch_so_far(space: SearchSpace, tmp_path: Path) -> None:
    ticks = itertools.count()
    seen: list[TrainingRecord] = []
    config = QUICK.model_copy(update={"epochs": 1.0})
    run(
        new_supernet(space, config), tmp_path, config=config,
        clock=lambda: float(next(ticks)), on_record=lambda record, _: seen.append(record),
    )  # fmt: skip
    assert [record.seconds for record in seen] == [1, 2, 3, 4]
    assert [record.images_per_second for record in seen] == [8, 8, 8, 8]


def test_checkpoints_are_saved_as_often_as_asked_and_at_the_end(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda _, checkpoint: saved.append(checkpoint.step))
    now = [0.0]

    def on_record(record: TrainingRecord, _: Progress) -> None:
        now[0] = record.step

    config = QUICK.model_copy(update={"checkpoint_seconds": 5.0})
    run(new_supernet(space, config), tmp_path, config=config, clock=lambda: now[0], on_record=on_record)
    assert saved == [6, 12]


def test_a_records_file_cut_in_the_middle_is_read_up_to_there(space: SearchSpace, tmp_path: Path) -> None:
    records = run(new_supernet(space, QUICK), tmp_path)
    file = tmp_path / "records.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [4, 8, 12]
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) - 9, len(data) * 2 // 5):
        file.write_bytes(data[:length])
        assert read_records(tmp_path) == records[: 3 if length == len(data) - 1 else 2 if length > 300 else 1]
    assert read_records(tmp_path / "missing") == []


def test_records_after_the_checkpoint_are_made_again_not_doubled(space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(new_supernet(space, QUICK), tmp_path, on_record=stop_at(9))
    assert [record.step for record in read_records(tmp_path)] == [4, 8]
    run(new_supernet(space, QUICK), tmp_path)
    assert [record.step for record in read_records(tmp_path)] == [4, 8, 12]


class Branching(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > -1e9 else images


def test_a_network_that_cannot_be_sorted_is_refused_before_the_first_step(
    space: SearchSpace, tmp_path: Path
) -> None:
    supernet = Supernet(space, lambda arch: Branching(arch.integer("hidden"), arch.integer("depth")))
    before = weights(supernet)
    with pytest.raises(Unsortable):
        run(supernet, tmp_path)
    assert same(weights(supernet), before)
    run(supernet, tmp_path, strategy=Sandwich())


def test_every_strategy_can_be_trained_with(space: SearchSpace, tmp_path: Path) -> None:
    strategies: list[Strategy] = [Sandwich(0), DelayedShrinking(switch=0.0, ramp_epochs=0.0)]
    for number, strategy in enumerate(strategies):
        assert len(run(new_supernet(space, QUICK), tmp_path / str(number), strategy=strategy)) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"average": 0.999},
        {"curriculum": "efficienttrain"},
        {"average": 0.9, "curriculum": "efficienttrain++"},
    ],
)
def test_a_run_with_a_speed_up_that_was_stopped_ends_with_the_same_weights(
    space: SearchSpace, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = SAVING.model_copy(update=options)
    whole, halves, plain = (new_supernet(space, config) for _ in range(3))
    run(whole, tmp_path / "whole", config=config)
    with pytest.raises(StopError):
        run(halves, tmp_path / "halves", config=config, on_record=stop_at(7))
    halves = new_supernet(space, config)
    run(halves, tmp_path / "halves", config=config)
    assert same(weights(whole), weights(halves))
    finished = load_checkpoint(tmp_path / "halves")
    assert finished is not None
    restored = new_supernet(space, config)
    restore(restored, finished)
    assert same(weights(whole), weights(restored))
    run(plain, tmp_path / "plain")
    assert not same(weights(whole), weights(plain))


def test_a_curriculum_shows_smaller_images_first_and_says_so_to_the_networks(
    space: SearchSpace, tmp_path: Path
) -> None:
    seen: list[tuple[int, int | None]] = []

    class Noting(Supernet):
        def forward(self, images: Tensor, arch: Arch, *, at_most: int | None = None) -> Tensor:
            seen.append((images.shape[-1], at_most))
            return super().forward(images, arch, at_most=at_most)

    config = QUICK.model_copy(update={"curriculum": "efficienttrain++"})
    run(Noting(space, build_toy), tmp_path, config=config, strategy=Sandwich(0))
    assert seen == sorted(seen)
    assert {side for side, _ in seen} == {2, 4}
    assert all(at_most == side for side, at_most in seen)


def test_the_largest_and_the_smallest_are_compiled_where_it_is_asked_for(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Arch] = []

    def noting(archs: list[Arch]) -> dict[Arch, Call]:
        def call_of(arch: Arch) -> Call:
            def call(network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
                called.append(arch)
                return call_lent(network, lent, images)

            return call

        return {arch: call_of(arch) for arch in archs}

    monkeypatch.setattr(loop, "compiled_calls", noting)
    plain, compiled = new_supernet(space, QUICK), new_supernet(space, QUICK)
    run(plain, tmp_path / "plain", strategy=Sandwich(1))
    assert not called
    config = QUICK.model_copy(update={"compile": True})
    run(compiled, tmp_path / "compiled", config=config, strategy=Sandwich(1))
    assert set(called) == {space.largest, space.smallest}
    assert same(weights(plain), weights(compiled))


def test_averaged_weights_are_those_that_accuracy_is_estimated_of(space: SearchSpace, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"average": 0.999})
    supernet, estimated = new_supernet(space, config), []

    def estimate(arch: Arch) -> float:
        del arch
        estimated.append(weights(supernet))
        return 0.5

    run(supernet, tmp_path, config=config, estimate=estimate)
    finished = load_checkpoint(tmp_path)
    assert finished is not None
    assert same(estimated[-1], weights(supernet))
    last = new_supernet(space, config)
    restore(last, finished, averaged=False)
    assert not same(estimated[-1], weights(last))


def test_the_average_begins_anew_when_channels_are_sorted(space: SearchSpace, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"average": 0.9})
    run(new_supernet(space, config), tmp_path, config=config)  # 12 steps, sorted before the seventh
    finished = load_checkpoint(tmp_path)
    assert finished is not None
    assert finished.state["updates"] == 6
