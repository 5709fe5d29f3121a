"""Two ranks train as one does: the same gradients, by one exchange a step, and their number may change.

Two processes joined by gloo on this machine, against one process. A step is a sandwich (the largest network,
the smallest, two random ones that learn from it) on 64 random images of 32 px, 32 for each of two ranks.

Claims:

1. The gradients of 2 ranks differ from those of 1 with the whole batch by at most 1e-6 of their size: those
   of a ViT, which does not normalize over the batch, in float32; those of a MobileNet with joint statistics
   in float64, exchanged in float32. In float32 that one's gradients depend on the order in which the images
   are added up, on one rank too; how much is shown beside it.
2. A step is one exchange; with joint statistics two more a layer and visit.
3. Trained for 4 steps by 2 ranks, 4 by 1 and 4 by 2 again, the weights are those of 12 steps by 1 rank, to
   1e-4 of how far the training moved them (the ViT space).

Shown beside them: the share of a step that averaging takes, with two processes on the cores there are.

    python benchmarks/ddp.py [--check]

Takes about 2 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import Benchmark, Figures
from torch import Tensor

from nestling.config import TrainConfig
from nestling.data import Batch
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.space import load_space
from nestling.train.checkpoint import load_checkpoint
from nestling.train.distributed import ALONE, Ranks, joined, ranks_of
from nestling.train.gradients import average_gradients
from nestling.train.joint_norm import joint_statistics
from nestling.train.lessons import teach
from nestling.train.loop import train
from nestling.train.optimization import Precision
from nestling.train.sharing import PartOfStream, rows_of
from nestling.train.strategies import Progress, Sandwich, Visit

SPACES = {"vit_cifar": False, "mobilenet_cifar_small": True}
"""Space -> whether its networks normalize over the batch."""
CLASSES, IMAGES, PIXELS, STEPS, REPEATS = 10, 64, 32, 12, 3
GRADIENTS, RESUMED = 1e-6, 1e-4
FOLDER = Path(__file__).parents[1] / "search_spaces"


def supernet(name: str) -> Supernet:
    space = load_space(FOLDER / f"{name}.toml")
    constants: dict[str, Any] = {"classes": CLASSES}
    if "resolution" not in space.by_name:
        constants["resolution"] = PIXELS
    torch.manual_seed(0)
    return Supernet(space.with_constants(constants), family(space.family).build).train()


class Stream:
    """Random images that depend on the step alone."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        """Batches without end, from that of `start_step` on."""
        del augment
        for step in count(start_step):
            generator = torch.Generator().manual_seed(step)
            labels = torch.randint(CLASSES, (batch_size,), generator=generator)
            images = torch.randn(batch_size, 3, PIXELS, PIXELS, generator=generator)
            yield Batch(images.to(device), labels.to(device))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Four, whatever the size."""
        del batch_size
        return 4


def whole_batch() -> Batch:
    return next(Stream().batches(start_step=0, batch_size=IMAGES, augment="none", device="cpu"))


def gradients(name: str, ranks: Ranks, batch: Batch, *, exact: bool) -> dict[str, Tensor]:
    """The gradients of a sandwich step; in float64 where they are to be `exact`."""
    network = supernet(name)
    visits = Sandwich().visits(network.space, Progress(0, 1, 1), random.Random(0))
    mine = rows_of(len(batch.labels), ranks)
    part = Batch(batch.images[mine], batch.labels[mine])
    if exact:
        network, part = network.double(), Batch(part.images.double(), part.labels)
    with joint_statistics(ranks if SPACES[name] else ALONE):
        step(network, part, visits, ranks)
    return {n: p.grad for n, p in network.largest.named_parameters() if p.grad is not None}


def step(network: Supernet, part: Batch, visits: Sequence[Visit], ranks: Ranks) -> None:
    """The gradients of a step, averaged over ranks, as the loop takes it."""
    parameters, images = list(network.largest.parameters()), len(part.labels)
    teach(
        network, part, visits, smoothing=0.1, precision=Precision("off", torch.device("cpu")),
        finish=partial(average_gradients, ranks, parameters, images=images),
    )  # fmt: skip


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of all tensors together, relative to their size."""
    assert found.keys() == wanted.keys()
    apart = torch.cat([(found[name] - wanted[name]).double().flatten() for name in wanted])
    return float(apart.norm() / torch.cat([wanted[name].double().flatten() for name in wanted]).norm())


def train_until(ranks: Ranks, folder: Path, last: int) -> None:
    """Goes on with the training in `folder` until `last` steps are done."""

    class Stopped(Exception):  # noqa: N818 - it stops, nothing is wrong
        pass

    def stop(_: object, progress: Progress) -> None:
        if progress.step == last + 1:
            raise Stopped

    config = TrainConfig(strategy="sandwich", epochs=STEPS / 4, lr=0.02, checkpoint_seconds=0.0)
    try:
        train(
            supernet("vit_cifar"), PartOfStream(Stream(), ranks), strategy=Sandwich(), config=config,
            batch_size=IMAGES, augment="none", seed=0, folder=folder, ranks=ranks, on_record=stop,
        )  # fmt: skip
    except Stopped:
        ranks.wait()


def one_of_two(folder: Path, job: str) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    with joined(ranks_of(os.environ), timeout_seconds=300) as ranks:
        if job != "measure":
            return train_until(ranks, folder / "parts", int(job))
        exchanges: list[int] = []
        told: dict[str, Any] = {}
        kept = {name: vars(dist)[name] for name in ("all_reduce", "all_gather", "broadcast")}
        for name, call in kept.items():
            setattr(dist, name, counting(call, exchanges))
        for name in SPACES:
            exchanges.clear()
            told[name] = gradients(name, ranks, whole_batch(), exact=SPACES[name])
            told[f"{name} exchanges"] = len(exchanges)
        told["seconds"] = [timed(ranks) for _ in range(REPEATS + 1)][1:]
        if ranks.first:
            torch.save(told, folder / "told.pt")
    return None


def counting(call: Callable[..., Any], counted: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return call(*args, **kwargs)

    return wrapped


def timed(ranks: Ranks) -> tuple[float, float]:
    """Seconds of a whole sandwich step of MobileNet, and of averaging the same gradients once more."""
    network, batch = supernet("mobilenet_cifar_small"), whole_batch()
    visits = Sandwich().visits(network.space, Progress(0, 1, 1), random.Random(0))
    mine, parameters = rows_of(IMAGES, ranks), list(network.largest.parameters())
    part = Batch(batch.images[mine], batch.labels[mine])
    step(network, part, visits, ranks)  # builds the shapes
    ranks.wait()
    began = time.perf_counter()
    step(network, part, visits, ranks)
    ranks.wait()
    middle = time.perf_counter()
    average_gradients(ranks, parameters, torch.zeros(4), images=len(part.labels))
    return middle - began, time.perf_counter() - middle


def launch(folder: Path, job: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
        f"--master_port={port}", __file__, "--rank", str(folder), job,
    ]  # fmt: skip
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def measure(options: argparse.Namespace) -> Figures:
    del options
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"spaces": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(folder, "measure")
        told = torch.load(folder / "told.pt", weights_only=False)
        batch = whole_batch()
        for space in SPACES:
            alone = gradients(space, ALONE, batch, exact=False)
            turned = Batch(batch.images.flip(0), batch.labels.flip(0))
            wanted = gradients(space, ALONE, batch, exact=SPACES[space])
            figures["spaces"][space] = {
                "difference": difference(told[space], wanted),
                "float32": difference(gradients(space, ALONE, turned, exact=False), alone),
                "exchanges": told[f"{space} exchanges"],
                "exchanges_wanted": 1 + 2 * visited_norms(space),
            }
        figures["step_seconds"], figures["averaging_seconds"] = (
            statistics.median(column) for column in zip(*told["seconds"], strict=True)
        )
        train_until(ALONE, folder / "one", STEPS)
        launch(folder, "4")
        train_until(ALONE, folder / "parts", 8)
        launch(folder, str(STEPS))
        figures["resumed_difference"] = moved_apart(folder)
    return figures


def visited_norms(name: str) -> int:
    """How many layers the visits of a step normalize over the batch, each visit's counted."""
    network = supernet(name)
    visits = Sandwich().visits(network.space, Progress(0, 1, 1), random.Random(0))
    return sum(
        isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        for visit in visits
        for module in network.materialize(visit.arch).modules()
    )


def moved_apart(folder: Path) -> float:
    """How far the two trainings ended apart, relative to how far they went."""
    begun = {f"largest/{name}": t for name, t in supernet("vit_cifar").largest.state_dict().items()}
    ends = [load_checkpoint(folder / name) for name in ("parts", "one")]
    parts, one = ({n: end.tensors[n] - begun[n] for n in begun} for end in ends if end is not None)
    return difference(parts, one)


def misses(figures: Figures) -> list[str]:
    found = []
    for space in SPACES:
        told = figures["spaces"][space]
        if not told["difference"] <= GRADIENTS:
            found.append(f"gradients of {space}: {told['difference']:.1e} apart, at most {GRADIENTS}")
        if told["exchanges"] != told["exchanges_wanted"]:
            found.append(f"{told['exchanges']} exchanges a step of {space}, not {told['exchanges_wanted']}")
    if not figures["resumed_difference"] <= RESUMED:
        found.append(f"2, 1, 2 ranks: {figures['resumed_difference']:.1e} apart, at most {RESUMED}")
    return found


def sentence(figures: Figures) -> str:
    vit, mobilenet = (figures["spaces"][space] for space in SPACES)
    return (
        f"the gradients of 2 ranks are within {vit['difference']:.1e} of 1 rank's (at most {GRADIENTS:.0e}), "
        f"with joint batch normalization {mobilenet['difference']:.1e} (in float64; float32 leaves "
        f"{mobilenet['float32']:.1e} open); {vit['exchanges']} exchange a step, "
        f"{figures['averaging_seconds'] / figures['step_seconds']:.1%} of its time; trained by 2, 1 and 2 "
        f"ranks the weights are within {figures['resumed_difference']:.1e} of 1 rank's"
    )


BENCHMARK = Benchmark("ddp", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--rank"]:
        one_of_two(Path(words[1]), words[2])
        return 0
    return BENCHMARK.run(BENCHMARK.parser().parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
