"""Two ranks against one. This file is also the program that torchrun starts: one launch for all claims."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from nestling.data import Batch
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, SearchSpace
from nestling.train.distributed import (
    ALONE,
    Ranks,
    RanksError,
    check_agreement,
    joined,
    ranks_of,
)
from nestling.train.evaluate import recalibrate
from nestling.train.gradients import average_gradients
from nestling.train.joint_norm import joint_statistics
from nestling.train.losses import label_loss, soft_label_loss
from nestling.train.sharing import recalibrate_together, rows_of

Found = dict[str, Any]
SPACE = SearchSpace("mobilenet", (Choice("hidden", (4, 6, 8)), Choice("depth", (1, 2))))
CLASSES = 3
SECONDS = 60


class Block(nn.Module):
    def __init__(self, hidden: int, *, norm: bool) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, hidden, 3, padding=1)
        self.norm: nn.Module = BatchNormAct2d(hidden) if norm else nn.ReLU()
        self.project = nn.Conv2d(hidden, 4, 1)

    def forward(self, maps: Tensor) -> Tensor:
        branch: Tensor = self.project(self.norm(self.expand(maps)))
        return maps + branch


class Toy(nn.Module):
    def __init__(self, arch: Arch, *, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
        blocks = (Block(arch.integer("hidden"), norm=norm) for _ in range(arch.integer("depth")))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.norm(self.stem(images)))
        logits: Tensor = self.classifier(maps.mean((2, 3)))
        return logits


def supernet(*, norm: bool) -> Supernet:
    torch.manual_seed(3)
    return Supernet(SPACE, lambda arch: Toy(arch, norm=norm)).train()


def batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    # far from zero, where a variance from sums of squares would lose its digits
    images = 20 + torch.randn(count, 3, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return Batch(images, labels)


def sandwich(
    ranks: Ranks, whole: Batch, *, norm: bool, joint: bool = False, exact: bool = False
) -> dict[str, Tensor]:
    """The losses and gradients of a step that visits the largest, the smallest and a middle subnet."""
    network, mine = supernet(norm=norm), rows_of(len(whole.labels), ranks)
    images, labels = whole.images[mine], whole.labels[mine]
    if exact:
        network, images = network.double(), images.double()
    middle = SPACE.canonical({"hidden": 6, "depth": 2})
    with joint_statistics(ranks if joint else ALONE):
        logits = network(images, SPACE.largest)
        losses = [label_loss(logits, labels, smoothing=0.1)]
        losses += [
            soft_label_loss(network(images, arch), logits.detach()) for arch in (SPACE.smallest, middle)
        ]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = dict(network.largest.named_parameters())
    told = torch.stack([loss.detach() for loss in losses])
    averaged = average_gradients(ranks, list(parameters.values()), told, images=len(labels))
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert gradients.keys() == parameters.keys()
    return gradients | {"losses": averaged}


def images_to_recalibrate(count: int) -> list[Tensor]:
    return [batch(size).images for size in (5, 8, 3, 8, 6)[:count]]


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.named_buffers()}


# What the ranks do ------------------------------------------------------------------------------------------


def lacking(ranks: Ranks) -> Found:
    """The gradients of three weights: one of both ranks, one of the second alone, one of none."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    weights[0].grad = torch.full((2,), 1.0 + ranks.rank)
    if not ranks.first:
        weights[1].grad = torch.tensor([6.0, 8.0])
    loss = torch.tensor([torch.nan if ranks.first else 1.0, 2.0 + ranks.rank])
    averaged = average_gradients(ranks, weights, loss, images=1)
    return {"gradients": [weight.grad for weight in weights], "losses": averaged}


def disagreement(ranks: Ranks) -> Found:
    network = supernet(norm=True).largest
    check_agreement(ranks, [SPACE.largest, SPACE.smallest], network, step=7)
    found = {}
    try:
        check_agreement(ranks, [SPACE.largest if ranks.first else SPACE.smallest], network, step=7)
    except RanksError as error:
        found["archs"] = str(error)
    if not ranks.first:  # two channels change places
        with torch.no_grad():
            network.get_parameter("stem.weight").copy_(network.get_parameter("stem.weight").flip(0))
    try:
        check_agreement(ranks, [SPACE.largest], network, step=8)
    except RanksError as error:
        found["weights"] = str(error)
    ranks.share(network)
    check_agreement(ranks, [SPACE.largest], network, step=9)
    return found


def from_first(ranks: Ranks) -> Found:
    found: Found = {"told": ranks.from_first(lambda: {"rank": ranks.rank, "tensor": torch.arange(3)})}

    def fail() -> None:
        raise FileNotFoundError("no checkpoint")

    try:
        ranks.from_first(fail)
    except (FileNotFoundError, RanksError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    ranks.wait()
    return found


def recalibrated(ranks: Ranks, *, batches: int) -> dict[str, Tensor]:
    network = supernet(norm=True).materialize(SPACE.largest)
    return statistics(recalibrate_together(network, images_to_recalibrate(batches), ranks=ranks))


def without_images(ranks: Ranks) -> str:
    try:
        recalibrate_together(supernet(norm=True).materialize(SPACE.largest), [], ranks=ranks)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def exchanges(ranks: Ranks) -> Found:
    """How often the ranks talk in a step."""
    counted: list[str] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return call(*args, **kwargs)

        return wrapped

    names = ("all_reduce", "all_gather", "broadcast", "barrier")
    kept = {name: vars(dist)[name] for name in names}
    try:
        for name in names:
            setattr(dist, name, counting(name, kept[name]))
        sandwich(ranks, batch(8), norm=True)
    finally:
        for name in names:
            setattr(dist, name, kept[name])
    return {"counted": counted}


def running(ranks: Ranks) -> Found:
    """What a layer with statistics of its own makes of two ranks' images, and of images in evaluation."""
    layer, maps = nn.BatchNorm2d(3), batch(7).images[rows_of(7, ranks)]
    with joint_statistics(ranks):
        out = layer(maps)
        evaluated = layer.eval()(maps)
    return {"out": out.detach(), "evaluated": evaluated.detach(), "statistics": statistics(layer)}


SCENES: Mapping[str, Callable[[Ranks], Any]] = {
    "plain": lambda ranks: sandwich(ranks, batch(8), norm=False),
    "plain, odd": lambda ranks: sandwich(ranks, batch(7), norm=False),
    "local": lambda ranks: sandwich(ranks, batch(8), norm=True),
    "joint": lambda ranks: sandwich(ranks, batch(8), norm=True, joint=True),
    "joint, odd": lambda ranks: sandwich(ranks, batch(7), norm=True, joint=True),
    "exact": lambda ranks: sandwich(ranks, batch(7), norm=True, joint=True, exact=True),
    "running": running,
    "lacking": lacking,
    "disagreement": disagreement,
    "from first": from_first,
    "recalibrated": lambda ranks: recalibrated(ranks, batches=5),
    "recalibrated by one": lambda ranks: recalibrated(ranks, batches=1),
    "without images": without_images,
    "exchanges": exchanges,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(ranks_of(os.environ), timeout_seconds=SECONDS) as ranks:
        if "ABANDON" in os.environ:
            if not ranks.first:
                return
            try:
                ranks.sum(torch.zeros(1))
            except RanksError as error:
                (folder / "abandoned").write_text(str(error))
            return
        found = {name: scene(ranks) for name, scene in SCENES.items()}
        torch.save(found, folder / f"{ranks.rank}.pt")


# What is claimed of it --------------------------------------------------------------------------------------


def start(folder: Path, **environment: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
        f"--master_port={port}", __file__, str(folder),
    ]  # fmt: skip
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """By rank, what its scenes came to."""
    folder = tmp_path_factory.mktemp("ranks")
    start(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The difference of all tensors together, relative to their size."""
    assert found.keys() == wanted.keys()
    apart = torch.cat([(found[name] - wanted[name]).double().flatten() for name in wanted])
    return float(apart.norm() / torch.cat([wanted[name].double().flatten() for name in wanted]).norm())


@pytest.mark.parametrize(
    ("scene", "count", "norm"),
    [("plain", 8, False), ("plain, odd", 7, False), ("joint", 8, True), ("joint, odd", 7, True)],
)
def test_two_ranks_have_the_gradients_of_one_with_the_whole_batch(
    told: list[Found], scene: str, count: int, norm: bool
) -> None:
    whole = sandwich(ALONE, batch(count), norm=norm)
    for rank in told:
        assert difference(rank[scene], whole) < (5e-6 if norm else 1e-6)


def test_joint_statistics_are_exact_where_rounding_is_not_in_the_way(told: list[Found]) -> None:
    wanted = sandwich(ALONE, batch(7), norm=True, exact=True)
    assert difference(told[0]["exact"], wanted) < 3e-7  # gradients are exchanged in float32


def test_ranks_that_normalize_apart_have_the_mean_of_their_parts_gradients(told: list[Found]) -> None:
    whole = batch(8)
    halves = [Batch(whole.images[part], whole.labels[part]) for part in (slice(0, 4), slice(4, 8))]
    apart = [sandwich(ALONE, half, norm=True) for half in halves]
    mean = {name: (apart[0][name] + apart[1][name]) / 2 for name in apart[0]}
    assert difference(told[0]["local"], mean) < 1e-6
    assert difference(told[0]["local"], sandwich(ALONE, whole, norm=True)) > 1e-3


@pytest.mark.parametrize("scene", ["plain", "local", "joint, odd"])
def test_both_ranks_have_the_same_gradients_to_the_last_bit(told: list[Found], scene: str) -> None:
    assert all(torch.equal(told[0][scene][name], told[1][scene][name]) for name in told[0][scene])


def test_a_layers_running_statistics_are_those_of_all_ranks_images(told: list[Found]) -> None:
    layer, maps = nn.BatchNorm2d(3), batch(7).images
    out = layer(maps).detach()
    evaluated = layer.eval()(maps).detach()
    found = [rank["running"] for rank in told]
    torch.testing.assert_close(torch.cat([f["out"] for f in found]), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([f["evaluated"] for f in found]), evaluated, rtol=1e-5, atol=1e-5)
    for rank in found:
        torch.testing.assert_close(rank["statistics"], statistics(layer), rtol=1e-6, atol=1e-6)


def test_a_step_is_one_exchange_whatever_the_visits(told: list[Found]) -> None:
    assert [rank["exchanges"]["counted"] for rank in told] == [["all_reduce"], ["all_reduce"]]


def test_a_gradient_that_some_ranks_lack_counts_as_zero_and_one_that_all_lack_stays_none(
    told: list[Found],
) -> None:
    for rank in told:
        both, one, none = rank["lacking"]["gradients"]
        assert both.tolist() == [1.5, 1.5]
        assert one.tolist() == [3.0, 4.0]
        assert none is None


def test_a_loss_that_is_not_a_number_on_one_rank_is_so_on_all(told: list[Found]) -> None:
    for rank in told:
        losses = rank["lacking"]["losses"]
        assert losses.isnan().tolist() == [True, False]
        assert losses[1] == 2.5


def test_ranks_that_disagree_are_told_in_what(told: list[Found]) -> None:
    for rank in told:
        found = rank["disagreement"]
        assert "at step 7 ranks 1 visit other subnets than rank 0" in found["archs"]
        assert "at step 8 ranks 1 have other weights than rank 0" in found["weights"]


def test_what_the_first_rank_reads_all_have_and_where_it_fails_all_stop(told: list[Found]) -> None:
    for rank in told:
        assert rank["from first"]["told"]["rank"] == 0
        assert rank["from first"]["told"]["tensor"].tolist() == [0, 1, 2]
    assert told[0]["from first"]["failure"] == "FileNotFoundError: no checkpoint"
    assert told[1]["from first"]["failure"] == (
        "RanksError: rank 1 stops because rank 0 did: FileNotFoundError: no checkpoint"
    )


@pytest.mark.parametrize(("scene", "batches"), [("recalibrated", 5), ("recalibrated by one", 1)])
def test_statistics_recalibrated_by_two_ranks_are_those_of_all_images(
    told: list[Found], scene: str, batches: int
) -> None:
    network = supernet(norm=True).materialize(SPACE.largest)
    wanted = statistics(recalibrate(network, images_to_recalibrate(batches)))
    for rank in told:
        assert difference(rank[scene], wanted) < 1e-6


def test_ranks_without_any_image_say_so_together(told: list[Found]) -> None:
    for rank in told:
        assert rank["without images"] == "recalibration needs at least one batch of images"


def test_a_rank_that_the_others_left_stops_and_says_so(tmp_path: Path) -> None:
    start(tmp_path, ABANDON="1")
    assert "rank 0 of 2 lost the others" in (tmp_path / "abandoned").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
