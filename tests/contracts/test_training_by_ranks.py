"""train() by two ranks. This file is also the program that torchrun starts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling import pipeline
from nestling.config import TrainConfig, load_config
from nestling.data import Batch
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, SearchSpace
from nestling.train.checkpoint import load_checkpoint
from nestling.train.distributed import ALONE, Ranks, joined, ranks_of
from nestling.train.loop import train
from nestling.train.records import TrainingRecord, read_records
from nestling.train.sharing import PartOfStream
from nestling.train.strategies import Progress, make_strategy

SPACE = SearchSpace("mobilenet", (Choice("hidden", (3, 5, 8)), Choice("depth", (1, 2))))
CLASSES = 3
SECONDS = 60
TOY = Path(__file__).parents[1] / "toy.toml"
STEPS = 12
RECIPES: dict[str, dict[str, Any]] = {
    "delayed-shrinking": {"switch": 0.5, "ramp_epochs": 1.0, "random_subnets": 1},
    **{name: {"strategy": name} for name in ("progressive-shrinking", "single-path", "sandwich")},
    "attentive": {"strategy": "attentive", "cost_bins": 3},
    "worst-up": {"strategy": "attentive", "keeps": "worst", "cost_bins": 3},
    "shifting": {"strategy": "shifting", "cost_bins": 3},
    "once-for-all": {"strategy": "progressive-shrinking", "teachers": ("outside",)},
}
OTHERS = tuple(RECIPES)[1:]


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, 4, 1)

    def forward(self, maps: Tensor) -> Tensor:
        branch: Tensor = self.project(torch.relu(self.norm(self.expand(maps))))
        return branch + maps


class Toy(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(arch.integer("hidden")) for _ in range(arch.integer("depth"))))
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class Stream:
    """Four batches an epoch that depend on the step alone."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        assert augment == "none"
        for step in itertools.count(start_step):
            generator = torch.Generator().manual_seed(step)
            labels = torch.randint(CLASSES, (batch_size,), generator=generator)
            images = torch.randn(batch_size, 3, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
            yield Batch(images.to(device), labels.to(device))

    def steps_per_epoch(self, batch_size: int) -> int:
        assert batch_size == 9  # whatever the number of ranks
        return 4


class StopError(Exception):
    """What interrupts training."""


def stop_at(step: int) -> Callable[[TrainingRecord, Progress], None]:
    def on_record(record: TrainingRecord, progress: Progress) -> None:
        assert record.step == progress.step
        if record.step == step:
            raise StopError

    return on_record


def outside(images: Tensor) -> Tensor:
    """A teacher that knows what brightness means."""
    brightness = images.mean((1, 2, 3)).unsqueeze(1)
    return (-4 * (brightness - torch.arange(CLASSES)).abs()).softmax(1)


def hidden(arch: Arch) -> float:
    """What an arch costs, for strategies that draw by it."""
    return float(arch.integer("hidden") * arch.integer("depth"))


def run(
    ranks: Ranks, folder: Path, *, until: int, seed: int = 3, strategy: str = "delayed-shrinking"
) -> None:
    """Trains from where `folder` left off; a step that is stopped at is lost, those before it are kept."""
    torch.manual_seed(7 + ranks.rank)  # weights differ before training: those of the first rank count
    config = TrainConfig(
        epochs=STEPS / 4, lr=0.05, warmup_epochs=0.5, checkpoint_seconds=0.0, joint_norm=True, average=0.9,
        **RECIPES[strategy],
    )  # fmt: skip
    try:
        train(
            Supernet(SPACE, Toy),
            PartOfStream(Stream(), ranks),
            strategy=make_strategy(config, space=SPACE, cost=hidden),
            config=config,
            batch_size=9,
            augment="none",
            seed=seed,
            folder=folder,
            teachers=outside,
            ranks=ranks,
            on_record=stop_at(until + 1),
        )
    except StopError:
        ranks.wait()


def main(folder: Path, orders: list[list[Any]]) -> None:
    torch.set_num_threads(1)
    with joined(ranks_of(os.environ), timeout_seconds=SECONDS) as ranks:
        for name, until, *strategy in orders:
            # of the others' folders nothing is read, and nothing is written there
            place = folder / name if ranks.first else folder / "others" / name
            run(ranks, place, until=until, **({"strategy": strategy[0]} if strategy else {}))


def start(folder: Path, *orders: tuple[str, int] | tuple[str, int, str]) -> None:
    torchrun(__file__, str(folder), json.dumps(orders))


def torchrun(*words: str) -> str:
    """What two processes that run `words` print, which must succeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
        f"--master_port={port}", *words,
    ]  # fmt: skip
    given = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs by name: each trained for `STEPS` steps by other ranks."""
    folder = tmp_path_factory.mktemp("trained")
    run(ALONE, folder / "one", until=STEPS)
    run(ALONE, folder / "another seed", until=STEPS, seed=4)
    start(folder, ("two", STEPS), ("two, stopped", 5), ("two, stopped", STEPS), ("two, one, two", 4))
    run(ALONE, folder / "two, one, two", until=8)
    start(folder, ("two, one, two", STEPS))
    return folder


@pytest.fixture(scope="module")
def trained_otherwise(trained: Path) -> Path:
    """The same folder, with runs by all other strategies."""
    for strategy in OTHERS:
        run(ALONE, trained / f"one, {strategy}", until=STEPS, strategy=strategy)
    start(trained, *((f"two, {name}", STEPS, name) for name in OTHERS))
    return trained


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return dict(checkpoint.tensors)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    apart = torch.cat([(found[name] - wanted[name]).double().flatten() for name in wanted])
    return float(apart.norm() / torch.cat([wanted[name].double().flatten() for name in wanted]).norm())


@pytest.mark.parametrize("name", ["two", "two, one, two"])
def test_two_ranks_train_as_one_does_also_where_their_number_changes(trained: Path, name: str) -> None:
    one = weights(trained / "one")
    assert difference(weights(trained / name), one) < 1e-5
    assert difference(weights(trained / "another seed"), one) > 1e-2
    found, wanted = read_records(trained / name), read_records(trained / "one")
    assert [record.step for record in found] == [record.step for record in wanted] == [4, 8, 12]
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OTHERS)
def test_two_ranks_take_the_same_decisions_as_one_by_every_strategy(
    trained_otherwise: Path, strategy: str
) -> None:
    # who wins a contest, how far each is behind, what a frozen teacher says: all ask the other rank
    one = weights(trained_otherwise / f"one, {strategy}")
    assert difference(weights(trained_otherwise / f"two, {strategy}"), one) < 1e-5
    shared = weights(trained_otherwise / "one")  # by another strategy
    assert difference({name: one[name] for name in shared}, shared) > 1e-2


def test_two_ranks_that_were_stopped_end_with_the_same_weights_to_the_last_bit(trained: Path) -> None:
    stopped, whole = weights(trained / "two, stopped"), weights(trained / "two")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_the_first_rank_alone_writes(trained: Path) -> None:
    assert not (trained / "others").exists()


@pytest.mark.slow
def test_nestling_train_by_two_ranks_is_that_by_one(tmp_path: Path) -> None:
    overrides = ("train.joint_norm=true", "train.epochs=1", "train.switch=0", "train.sort_channels=false")
    config = load_config(TOY, overrides=overrides)
    bench = pipeline.prepare(config, tmp_path / "one", listener=pipeline.Silent())
    pipeline.train_supernet(bench, listener=pipeline.Silent())
    bench.close()
    told = torchrun(
        "-m", "nestling.cli", "train", str(TOY), "--output", str(tmp_path / "two"),
        *(word for override in overrides for word in ("--set", override)),
    )  # fmt: skip
    assert told.count("epoch 1.0") == 1  # one of them reports
    one, two = (read_records(tmp_path / name / "training") for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert two[0].loss == pytest.approx(one[0].loss, rel=1e-4)
    spent = [json.loads((tmp_path / name / "training.json").read_text())["spent"] for name in ("one", "two")]
    for name in ("steps", "images", "macs", "macs_error"):
        assert spent[0][name] == spent[1][name]
    trained = pipeline.open_run(tmp_path / "two")
    assert trained.supernet.space.largest.integer("classes") == 10
    trained.close()


@pytest.mark.slow
def test_nestling_evaluate_by_two_ranks_is_that_by_one(tmp_path: Path) -> None:
    overrides = ("train.epochs=1", "train.strategy='single-path'")
    bench = pipeline.prepare(
        load_config(TOY, overrides=overrides), tmp_path / "one", listener=pipeline.Silent()
    )
    pipeline.train_supernet(bench, listener=pipeline.Silent())
    bench.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    asked: dict[str, Any] = {"subnets": 2, "alone": 1, "epochs": 0.2}
    wanted = pipeline.evaluate_supernet(
        pipeline.open_run(tmp_path / "one"), **asked, listener=pipeline.Silent()
    )
    words = (f"--{name}={value}" for name, value in asked.items())
    told = torchrun("-m", "nestling.cli", "evaluate", str(tmp_path / "two"), *words)
    assert told.count("train alone, 1 of 1") == 1  # one of them reports
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["finished"]
    rows = [*found["subnets"], *found["alone"]["networks"]]
    for row, one in zip(rows, [*wanted["subnets"], *wanted["alone"]["networks"]], strict=True):
        assert row["arch_key"] == one["arch_key"]
        # sums in another order may move an image that lies on the border of two classes
        assert row["top1"] == pytest.approx(one["top1"], abs=2.5 / found["images"])
    assert len({row["top1"] for row in rows}) > 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
