"""What a sandwich step of Nestling takes, against one of the published code.

Two spaces of `search_spaces/`, 1,000 classes, random images (64 of 32 px, and 16 of 128 px): once-for-all's
MobileNetV3 of width 1.0, and AttentiveNAS's. A step is what the training loop does for a batch with the
strategy `sandwich`: it draws two random networks, which were never met before, teaches the largest from the
labels and the smallest and the two from the largest, then takes one step of SGD. Ours builds the shapes of
the random networks in the step. All sides have the same weights, see the same batch, visit the same networks
and have the same losses; that their losses agree is looked at in every step.

Claims:

1. Once-for-all's space: at most 0.5 times the step of its own elastic network, of the package `ofa`, trained
   as its own code trains: at 32 px, and at most 0.8 times at 128 px.
2. AttentiveNAS's space: the same limits, against an elastic network that works as the published code does
   (`train_step_elastic.py`), as that is not to be had as a package.

Shown beside them: that elastic network in once-for-all's space, against the package; and in both spaces
against the same four networks without elasticity. Published (the reference measurements: forward, backward
and SGD at 128 px), of one network: OFA 1.06-1.07 for the largest, 1.06-1.12 for random ones and 1.16-1.27
for the smallest, AttentiveNAS 1.08, 1.06-1.09 and 1.26; of OFA's sandwich step 1.05 at 128 px and 1.17 at
32 px.

    python benchmarks/train_step.py [--check] [--repeats 11] [--threads 2] [--peers build/peers]

Takes about 10 minutes on 2 cores. At first use the package is installed in a virtual environment of its own
in the folder `--peers`, which needs the network; it runs there in a process of its own. Where it cannot be
had, claim 1 is not looked at, and the last line says so. Every repeat runs each of the compared steps once,
in random order and never two at a time; a ratio is taken within a repeat, and the median of the ratios
counts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lending_overhead import plain_network, sandwich
from record import Benchmark, Figures, quartiles
from torch import Tensor, nn
from train_step_elastic import ElasticNetwork, Shapes
from train_step_peer import PACKAGE, VERSION, Peer, PeerError, interpreter_with_package

from nestling.config import TrainConfig
from nestling.data import Batch
from nestling.models.building import build_shapes
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace, Value, load_space
from nestling.train.lessons import teach
from nestling.train.optimization import Precision, make_optimizer
from nestling.train.strategies import Progress, Sandwich, Visit

CLASSES = 1000
SIZES = ((32, 64), (128, 16))
"""Pixels, and images a batch."""
LIMITS = {32: 0.5, 128: 0.8}
OURS, OFA, ELASTIC, PLAIN = "nestling", "ofa", "elastic", "plain"
FOLDER = Path(__file__).parents[1] / "search_spaces"
PEERS = Path(__file__).parents[1] / "build" / "peers"
PAUSE_SECONDS = 0.02
"""Between two steps: the threads of the process that was last have stopped waiting for work by then."""
# a rate so small that all sides' weights stay as good as they are, and so their losses alike
CONFIG = TrainConfig(strategy="sandwich", lr=1e-6, momentum=0.9, weight_decay=3e-5, label_smoothing=0.1)


@dataclass(frozen=True, slots=True)
class Compared:
    """A space, and whose step ours is judged against in it."""

    title: str
    file: str
    judged: str


SPACES = (
    Compared("once-for-all", "ofa_mobilenetv3_w10", OFA),
    Compared("AttentiveNAS", "attentivenas", ELASTIC),
)
RATIOS = {
    "nestling / ofa": (OURS, OFA),
    "nestling / elastic": (OURS, ELASTIC),
    "elastic / ofa": (ELASTIC, OFA),
    "elastic / plain": (ELASTIC, PLAIN),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What a step took, and the losses that its four networks had."""

    seconds: float
    losses: Sequence[float]


class Sides:
    """The sides that are compared, on one batch.

    Args:
        space: of the networks.
        pixels: side of the images.
        images: how many.
        threads: of torch, on every side.
        peer: once-for-all's package; None: it is not among the sides.
        cropped: whether it has small kernels cut out of large ones and nothing more, as ours.
    """

    def __init__(
        self, space: SearchSpace, *, pixels: int, images: int, threads: int, peer: Peer | None, cropped: bool
    ) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.space, self.pixels, self.peer = space, pixels, peer
        self.rng = random.Random(0)
        self.strategy, self.precision = Sandwich(), Precision("off", torch.device("cpu"))
        self.supernet = Supernet(space, family(space.family).build).train()
        bias = self.supernet.largest.get_parameter("conv_head.bias")
        with torch.no_grad():
            bias.zero_()  # once-for-all's network has none there
        self.parameters = list(self.supernet.largest.parameters())
        self.optimizer = make_optimizer(self.supernet.largest, CONFIG)
        self.elastic = ElasticNetwork(copy.deepcopy(self.supernet.largest), self._optimizer_of)
        self.batch = Batch(torch.randn(images, 3, pixels, pixels), torch.randint(CLASSES, (images,)))
        if peer is not None:
            self._load(peer, [p.detach() for p in self.parameters if p is not bias], cropped=cropped)

    def check_equal(self) -> float:
        """The largest difference between logits of ours and of any other side, over the largest logit.

        Raises:
            SystemExit: they do not compute the same.
        """
        worst = 0.0
        for arch in (self.space.largest, self.space.smallest, self.space.sample(self.rng)):
            with torch.no_grad():
                expected = self.supernet(self.batch.images, arch, at_most=self.pixels)
                found = [self.elastic.logits(self.batch.images, self._shapes(arch))]
            if self.peer is not None:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "logits.pt"
                    self.peer.ask({"logits": ofa_setting(arch), "to": str(file)})
                    found.append(torch.load(file, weights_only=True))
            worst = max(worst, *(apart(logits, expected) for logits in found))
        if not worst < 1e-3:
            raise SystemExit(f"the compared networks differ by {worst:.1e} of their logits' scale")
        return worst

    def warm_up(self) -> None:
        """Lets layers of every kernel and expansion run once, so that few are new to the runtime later."""
        for turn, (kernel, expand) in enumerate(product(range(3), range(3))):
            arch = alike(self.space, kernel=kernel, expand=expand, width=turn).largest
            self._teach([Visit(arch)])
            self._elastic_step([self._shapes(arch)])
            if self.peer is not None:
                self.peer.ask({"step": [ofa_setting(arch)]})
        self.repeat(-1)

    def repeat(self, step: int) -> dict[str, Step]:
        """What each side's step took, run once, in random order; `step` decides the random networks."""
        archs = [visit.arch for visit in self._visits(step)]
        shapes = [self._shapes(arch) for arch in archs]
        sides: dict[str, Callable[[], Step]] = {
            OURS: lambda: timed(lambda: self._teach(self._visits(step))),
            ELASTIC: lambda: timed(lambda: self._elastic_step(shapes)),
            PLAIN: self._plain_step(archs),
        }
        if (peer := self.peer) is not None:
            settings = [ofa_setting(arch) for arch in archs]
            sides[OFA] = lambda: Step(**peer.ask({"step": settings}))
        order = list(sides)
        self.rng.shuffle(order)
        taken = {}
        for name in order:
            gc.collect()  # or one step would pay for what another has left
            time.sleep(PAUSE_SECONDS)
            taken[name] = sides[name]()
        return taken

    def _load(self, peer: Peer, weights: Sequence[Tensor], *, cropped: bool) -> None:
        """Gives the package's network our weights and our batch."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "begin.pt"
            batch = {"images": self.batch.images, "labels": self.batch.labels}
            torch.save(batch | {"weights": [weight.contiguous() for weight in weights]}, file)
            optimizer = {
                "lr": CONFIG.lr, "momentum": CONFIG.momentum, "weight_decay": CONFIG.weight_decay,
            }  # fmt: skip
            message = {"load": str(file), "optimizer": optimizer, "smoothing": CONFIG.label_smoothing}
            peer.ask(message | {"threads": torch.get_num_threads(), "classes": CLASSES, "cropped": cropped})

    def _visits(self, step: int) -> list[Visit]:
        return self.strategy.visits(self.space, Progress(step, 1, 1), random.Random(f"visits/{step}"))

    def _teach(self, visits: Sequence[Visit]) -> Sequence[float]:
        taught = teach(
            self.supernet, self.batch, visits, smoothing=CONFIG.label_smoothing, precision=self.precision,
            at_most=self.pixels,
        )  # fmt: skip
        self.precision.step(self.optimizer, self.parameters)
        return taught.losses

    def _elastic_step(self, shapes: Sequence[Shapes]) -> Sequence[float]:
        return self.elastic.step(
            self.batch.images, self.batch.labels, shapes, smoothing=CONFIG.label_smoothing
        )

    def _plain_step(self, archs: Sequence[Arch]) -> Callable[[], Step]:
        """The step of four plain networks that are there; the largest's optimizer alone takes a step."""
        found = [plain_network(self.supernet, arch, touching=False) for arch in archs]
        networks = [network.to(memory_format=torch.contiguous_format) for network in found]
        optimizer = self._optimizer_of(networks[0])

        def run() -> Sequence[float]:
            sandwich(networks, self.batch.images, self.batch.labels)
            optimizer.step()
            return ()

        return lambda: timed(run)

    def _optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        """One with momenta as if it had stepped before."""
        optimizer = make_optimizer(network, CONFIG)
        for parameter in network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _shapes(self, arch: Arch) -> Shapes:
        network = build_shapes(self.supernet.build, arch)
        return {name: parameter.shape for name, parameter in network.named_parameters()}


def timed(run: Callable[[], Sequence[float]]) -> Step:
    """What `run` took, and the losses that it gives."""
    began = time.perf_counter()
    losses = run()
    return Step(time.perf_counter() - began, losses)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest number that is wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def alike(space: SearchSpace, *, kernel: int, expand: int, width: int) -> SearchSpace:
    """`space` with the kernel, expansion and width of these ranks alone; the last where there are fewer."""
    ranks = {"kernel": kernel, "expand": expand, "width": width}
    values: dict[str, Sequence[Value]] = {
        choice.name: [choice.values[min(ranks[kind], len(choice.values) - 1)]]
        for choice in space.open_choices
        if (kind := choice.name.rpartition(".")[2]) in ranks
    }
    return space.only(values)


def ofa_setting(arch: Arch) -> dict[str, list[int]]:
    """`arch` of once-for-all's space as its package takes it: kernel and expansion of 20 blocks, 5 depths."""
    blocks = [f"s{stage}.b{block}" for stage in range(2, 7) for block in range(1, 5)]
    return {
        "ks": [arch.integer(f"{block}.kernel") for block in blocks],
        "e": [arch.integer(f"{block}.expand") for block in blocks],
        "d": [arch.integer(f"s{stage}.depth") for stage in range(2, 7)],
    }


def loss_difference(taken: Mapping[str, Step]) -> float:
    """The largest relative difference between the losses of ours and of the other sides that tell theirs.

    Raises:
        SystemExit: they did not do the same.
    """
    ours = taken[OURS].losses
    others = [step.losses for name, step in taken.items() if name not in (OURS, PLAIN)]
    worst = max(abs(a / b - 1) for each in others for a, b in zip(each, ours, strict=True))
    if not worst < 1e-3:
        raise SystemExit(f"losses of the compared steps differ by {worst:.1e}: {[list(ours), *others]}")
    return worst


def measure(options: argparse.Namespace) -> Figures:
    """Seconds and ratios for both spaces and sizes; prints a table of each."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        peer = None
        try:
            peer = stack.enter_context(Peer(interpreter_with_package(options.peers)))
            peer.ask({})
        except PeerError as error:
            peer = None
            print(f"{PACKAGE} {VERSION} is left out: {error}", file=sys.stderr)
        for compared in SPACES:
            space = load_space(FOLDER / f"{compared.file}.toml").with_constants({"classes": CLASSES})
            sizes: dict[str, Any] = {}
            for pixels, images in SIZES:
                sides = Sides(
                    space,
                    pixels=pixels,
                    images=images,
                    threads=options.threads,
                    peer=peer if compared.judged == OFA else None,
                    cropped=options.cropped_kernels,
                )
                sizes[str(pixels)] = {"images": images, **compare(sides, repeats=options.repeats)}
                print(table(compared.title, pixels, sizes[str(pixels)]), flush=True)
            found[compared.title] = {"space": compared.file, "sizes": sizes}
    return {
        "threads": options.threads,
        "repeats": options.repeats,
        "peer": f"{PACKAGE} {VERSION}" if peer is not None else None,
        "cropped_kernels": options.cropped_kernels,
        "spaces": found,
    }


def compare(sides: Sides, *, repeats: int) -> dict[str, Any]:
    """The figures of one space and size."""
    difference = sides.check_equal()
    sides.warm_up()
    taken = [sides.repeat(step) for step in range(repeats)]
    seconds = {name: [each[name].seconds for each in taken] for name in sorted(taken[0])}
    ratios = {}
    for name, (over, under) in RATIOS.items():
        if over in seconds and under in seconds:
            low, median, high = quartiles([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
            ratios[name] = {"lower_quartile": low, "median": median, "upper_quartile": high}
    return {
        "largest_difference": difference,
        "loss_difference": max(loss_difference(each) for each in taken),
        "seconds": {name: [round(each, 5) for each in column] for name, column in seconds.items()},
        "ratios": ratios,
    }


def table(title: str, pixels: int, found: Figures) -> str:
    """The figures of one space and size, for reading."""
    lines = [
        f"{title}, {found['images']} images of {pixels} px; logits differ by "
        f"{found['largest_difference']:.0e} of their scale, losses by {found['loss_difference']:.0e}"
    ]
    for name, seconds in found["seconds"].items():
        low, median, high = (1e3 * value for value in quartiles(seconds))
        lines.append(f"  {name:20} {median:8.1f} ms   ({low:.1f} to {high:.1f})")
    for name, ratio in found["ratios"].items():
        spread = f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
        lines.append(f"  {name:20} {ratio['median']:8.3f}      {spread}")
    return "\n".join(lines)


def judged(figures: Figures) -> dict[tuple[str, int], float]:
    """The ratios that have a limit, by the space's title and pixels; without those of a side left out."""
    found = {}
    for compared in SPACES:
        for pixels, _ in SIZES:
            ratios = figures["spaces"][compared.title]["sizes"][str(pixels)]["ratios"]
            name = f"{OURS} / {compared.judged}"
            if name in ratios:
                found[compared.title, pixels] = ratios[name]["median"]
    return found


def misses(figures: Figures) -> list[str]:
    """Which of the limits are missed."""
    return [
        f"a sandwich step of {title} at {pixels} px: {ratio:.3f} of the published way's, "
        f"at most {LIMITS[pixels]}"
        for (title, pixels), ratio in judged(figures).items()
        if not ratio <= LIMITS[pixels]
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    against = {OFA: "its package's", ELASTIC: "an elastic network's that works as the published code does"}
    ratios = judged(figures)
    parts = []
    for compared in SPACES:
        told = [
            f"{ratios[compared.title, pixels]:.3f}x at {pixels} px (at most {LIMITS[pixels]})"
            for pixels, _ in SIZES
            if (compared.title, pixels) in ratios
        ]
        of = f"of {compared.title}, against {against[compared.judged]}"
        parts.append(f"{of}: {' and '.join(told) or 'not compared, the package could not be had'}")
    return f"a sandwich step {'; '.join(parts)}"


BENCHMARK = Benchmark("train_step", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--repeats", type=int, default=11, help="of each step [default: 11]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument(
        "--peers",
        type=Path,
        default=PEERS,
        metavar="DIR",
        help="where the package's virtual environment is, or is made [default: build/peers]",
    )
    parser.add_argument(
        "--cropped-kernels",
        action="store_true",
        help="once-for-all's network without the matrices that turn large kernels into small ones",
    )
    options = parser.parse_args(words)
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; a median with its spread takes at least 2")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
