"""One suite over every training strategy: that the one loop can train with it, and what it then costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.config import READ_BY, TrainConfig
from nestling.data import Batch
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, Need, SearchSpace
from nestling.train.account import Account
from nestling.train.checkpoint import load_checkpoint
from nestling.train.loop import train
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress, Strategy, Visit, make_strategy
from nestling.train.strategies.accounting import BACKWARD, training_macs, visits_macs

CLASSES, SIDE, BATCH = 3, 6, 8
PER_EPOCH, EPOCHS, SEED = 4, 3, 3
STEPS = PER_EPOCH * EPOCHS
TEACHER_MACS = 1000.0

SPACE = SearchSpace(
    "toy",
    (
        Choice("s1.depth", (1, 2)),
        Choice("s1.b1.kernel", (1, 3)),
        Choice("s1.b1.expand", (1, 2, 4)),
        Choice("s1.b2.kernel", (1, 3), (Need("s1.depth", 2),)),
        Choice("s1.b2.expand", (1, 2, 4), (Need("s1.depth", 2),)),
    ),
)

RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in READ_BY if name != "fixed-list"},
    "fixed-list": {"strategy": "fixed-list", "spread": 3},
    "alphanet": {"strategy": "sandwich", "divergence": "alpha", "constant_tail": False, "clip_value": 1.0},
    "worst-up": {"strategy": "attentive", "keeps": "worst", "cost_bins": 4, "clip_value": 1.0},
    "sorted-set": {"strategy": "sorted-net", "spread": 4, "random_subnets": 3},
    "distilled": {"strategy": "alone", "teachers": ("outside",)},
    "once-for-all": {"strategy": "progressive-shrinking", "teachers": ("outside",)},
    "smallest-alone": {"strategy": "alone", "subnets": (SPACE.smallest.to_json(),)},
}
RECIPES["delayed-shrinking"] |= {"ramp_epochs": 1.0}
RECIPES["shifting"] |= {"cost_bins": 4}


class Block(nn.Module):
    def __init__(self, kernel: int, expand: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4 * expand, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(4 * expand)
        self.project = nn.Conv2d(4 * expand, 4, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(4)
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.last_norm(self.project(torch.relu(self.norm(self.conv(maps)))))
        result: Tensor = self.drop_path(branch) + maps
        return result


class Network(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.drop_rate = 0.0
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        blocks = range(1, arch.integer("s1.depth") + 1)
        self.blocks = nn.Sequential(
            *(Block(arch.integer(f"s1.b{b}.kernel"), arch.integer(f"s1.b{b}.expand")) for b in blocks)
        )
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.stem(images))
        pooled = F.dropout(maps.mean((2, 3)), self.drop_rate, self.training)
        logits: Tensor = self.classifier(pooled)
        return logits


class Stream:
    """Images whose brightness tells the label; a batch depends on its step alone."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        del augment
        step = start_step
        while True:
            generator = torch.Generator().manual_seed(step)
            labels = torch.randint(CLASSES, (batch_size,), generator=generator)
            images = torch.randn(batch_size, 3, SIDE, SIDE, generator=generator) + labels.view(-1, 1, 1, 1)
            yield Batch(images.to(device), labels.to(device))
            step += 1

    def steps_per_epoch(self, batch_size: int) -> int:
        assert batch_size == BATCH
        return PER_EPOCH


def outside(images: Tensor) -> Tensor:
    """A teacher that knows what brightness means."""
    brightness = images.mean((1, 2, 3)).unsqueeze(1)
    return (-4 * (brightness - torch.arange(CLASSES)).abs()).softmax(1)


MACS: dict[Arch, int] = {}


def macs(arch: Arch) -> int:
    if arch not in MACS:
        MACS[arch] = cost(build_shapes(Network, arch), SIDE).macs
    return MACS[arch]


class CountingSupernet(Supernet):
    """Notes every pass, and whether gradients flow through it."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(SPACE, Network, dropout=config.dropout, drop_path=config.drop_path)
        self.passes: list[tuple[Arch, bool]] = []

    def forward(self, images: Tensor, arch: Arch, *, at_most: int | None = None) -> Tensor:
        self.passes.append((arch, torch.is_grad_enabled()))
        return super().forward(images, arch, at_most=at_most)


@dataclass
class Trained:
    """What a run left behind."""

    supernet: CountingSupernet
    account: Account
    visited: list[list[Visit]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.supernet.largest.state_dict())


class Watched:
    """A strategy, and what it said at each step."""

    def __init__(self, strategy: Strategy, trained: Trained) -> None:
        self.strategy, self.trained = strategy, trained
        self.sorts_channels, self.schedule = strategy.sorts_channels, strategy.schedule
        self.freezes_teacher = strategy.freezes_teacher

    def visits(self, space: SearchSpace, progress: Progress, rng: random.Random) -> list[Visit]:
        self.trained.visited.append(self.strategy.visits(space, progress, rng))
        self.trained.progress.append(progress)
        return self.trained.visited[-1]


def strategy_of(recipe: str) -> Strategy:
    return make_strategy(config_of(recipe), space=SPACE, cost=macs)


def config_of(recipe: str, **changes: Any) -> TrainConfig:
    keys = {"epochs": EPOCHS, "lr": 0.02, "warmup_epochs": 0.5, "checkpoint_seconds": 1e9}
    return TrainConfig(**(keys | RECIPES[recipe] | changes))


class StopError(Exception):
    """What a test interrupts training with."""


def killed_at(stop: int) -> Callable[[TrainingRecord, Progress], None]:
    def on_record(record: TrainingRecord, _: Progress) -> None:
        if record.step == stop:
            raise StopError

    return on_record


def trained(
    recipe: str,
    folder: Path,
    *,
    on_record: Callable[[TrainingRecord, Progress], None] | None = None,
    **changes: Any,
) -> Trained:
    config = config_of(recipe, **changes)
    torch.manual_seed(7)
    found = Trained(CountingSupernet(config), Account(macs=macs, teachers_macs=lambda _: TEACHER_MACS))
    train(
        found.supernet,
        Stream(),
        strategy=Watched(strategy_of(recipe), found),
        config=config,
        batch_size=BATCH,
        augment="none",
        seed=SEED,
        folder=folder,
        teachers=outside,
        on_record=on_record,
        account=found.account,
    )
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def test_the_recipes_name_every_strategy() -> None:
    assert {keys["strategy"] for keys in RECIPES.values()} == set(READ_BY)


@every_recipe
def test_the_loss_of_what_is_trained_falls(recipe: str, tmp_path: Path) -> None:
    config = config_of(recipe)
    torch.manual_seed(7)
    before = Supernet(SPACE, Network, dropout=config.dropout)
    after = trained(recipe, tmp_path, epochs=15)
    batch = next(Stream().batches(start_step=10**6, batch_size=64, augment="none", device="cpu"))
    archs = {visit.arch for visits in after.visited[-PER_EPOCH:] for visit in visits}
    with torch.no_grad():
        losses = [
            sum(float(F.cross_entropy(supernet(batch.images, arch), batch.labels)) for arch in archs)
            / len(archs)
            for supernet in (before.eval(), after.supernet.eval())
        ]
    assert losses[1] < 0.8 * losses[0]


@every_recipe
def test_a_run_depends_on_its_seed_alone(recipe: str, tmp_path: Path) -> None:
    first = trained(recipe, tmp_path / "first")
    torch.manual_seed(99)
    random.seed(99)
    second = trained(recipe, tmp_path / "second")
    assert first.visited == second.visited
    assert same(first.weights, second.weights)


@every_recipe
def test_a_run_that_was_killed_and_continued_ends_with_the_same_weights(recipe: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "dropout": 0.3,
        "drop_path": 0.5,
        "checkpoint_seconds": 0.0,
        "zero_last_norms": True,
    }
    whole = trained(recipe, tmp_path / "whole", **changes)
    for stop in (2, 6, 7, 11):
        with pytest.raises(StopError):
            trained(recipe, tmp_path / "parts", on_record=killed_at(stop), **changes)
    rest = trained(recipe, tmp_path / "parts", **changes)
    assert rest.visited == whole.visited[10:]
    assert rest.progress[0].gaps == whole.progress[10].gaps
    assert same(rest.weights, whole.weights)
    spent, wanted = rest.account.spent(), whole.account.spent()
    assert (spent.steps, spent.images) == (wanted.steps, wanted.images) == (STEPS, STEPS * BATCH)
    assert (spent.macs, spent.macs_error) == (wanted.macs, 0.0)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_mixed_precision_that_was_killed_ends_with_the_same_weights(
    amp: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "amp": amp, "average": 0.9, "clip_norm": 0.5, "clip_value": 0.1, "checkpoint_seconds": 0.0,
        "epochs": 4,
    }  # fmt: skip
    whole = trained("delayed-shrinking", tmp_path / "whole", **changes)
    for stop in (3, 9, 14):
        with pytest.raises(StopError):
            trained("delayed-shrinking", tmp_path / "parts", on_record=killed_at(stop), **changes)
    rest = trained("delayed-shrinking", tmp_path / "parts", **changes)
    assert same(rest.weights, whole.weights)
    ends = [load_checkpoint(tmp_path / name) for name in ("whole", "parts")]
    scalers = [end.state["scaler"] for end in ends if end is not None]
    assert scalers[0] == scalers[1]
    # every step counts towards the next growth of fp16's scale, also those before a kill
    assert scalers[0].get("_growth_tracker", 16) == 16
    plain = trained("delayed-shrinking", tmp_path / "plain", **(changes | {"amp": "off"}))
    assert not same(plain.weights, whole.weights)
    assert all(bool(tensor.isfinite().all()) for tensor in whole.weights.values())


@every_recipe
def test_visits_are_archs_of_the_space(recipe: str, tmp_path: Path) -> None:
    for visits in trained(recipe, tmp_path).visited:
        assert visits
        for visit in visits:
            for arch in (visit.arch, *visit.rivals, visit.learns_from or visit.arch):
                assert SPACE.canonical(arch) == arch


@every_recipe
def test_the_largest_alone_is_regularised(recipe: str, tmp_path: Path) -> None:
    found = trained(recipe, tmp_path, dropout=0.5, drop_path=0.5)
    supernet = found.supernet.train()
    images = torch.randn(32, 3, SIDE, SIDE)
    for arch in {arch for arch, _ in found.supernet.passes}:
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(supernet(images, arch))
        assert torch.equal(*outputs) == (arch != SPACE.largest)


@every_recipe
def test_the_passes_of_a_run_are_those_that_are_counted(recipe: str, tmp_path: Path) -> None:
    found = trained(recipe, tmp_path)
    counted = sum(visits_macs(visits, macs) for visits in found.visited)
    done = sum(macs(arch) * (BACKWARD if learns else 1.0) for arch, learns in found.supernet.passes)
    contests = any(visit.rivals for visits in found.visited for visit in visits)
    # who wins a contest is not known before: it counts as the mean
    assert counted == pytest.approx(done, rel=0.15 if contests else 1e-9)
    asked = sum(any(visit.teacher for visit in visits) for visits in found.visited)
    assert found.account.spent().macs == BATCH * (done + asked * TEACHER_MACS)  # afterwards, it is
    forecast = training_macs(strategy_of(recipe), SPACE, macs, steps=STEPS, steps_per_epoch=PER_EPOCH)
    assert forecast == pytest.approx(done, rel=0.25)  # of 12 steps; other archs are drawn


@every_recipe
def test_the_learning_rate_is_one_for_each_step(recipe: str) -> None:
    schedule = strategy_of(recipe).schedule(lr=0.4, warmup_steps=3, steps=60, steps_per_epoch=6)
    rates = [schedule.at(step) for step in range(60)]
    assert 0 < min(rates) < max(rates) == pytest.approx(0.4)
    assert rates[0] < rates[3]


def test_the_memory_of_gaps_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    found = trained("shifting", tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    names = {visit.remembered for visits in found.visited for visit in visits} - {""}
    assert set(checkpoint.state["gaps"]) == names
    assert set(found.progress[-1].gaps) <= names
    assert found.progress[0].gaps == {}
