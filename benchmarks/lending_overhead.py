"""Lending costs next to nothing, and a supernet's step is much faster than the published way.

The space is that of once-for-all's MobileNetV3 (width 1.0; depth 2-4 a stage, kernel 3-7 and expansion 3-6
a block), 1,000 classes, random images: 64 of 32 px, and 16 of 128 px. A step is forward, backward and SGD,
in training mode.

Claims:

1. The largest network's step through the supernet takes at most 1.05 times that of the plain timm network
   alone.
2. A sandwich step (the largest, which learns from labels, then the smallest and two random networks, which
   learn from the largest's logits) takes at most 1.10 times the four plain networks alone. The random
   networks are new at every step: for ours it counts that they are built, the plain ones are there. Ours
   ends in one SGD step; each of the plain networks takes its own, as it would alone. The ratio to the same
   four with a single SGD step between them, which leaves lending and building bare, is shown beside it.
3. It takes at most 0.6 times the same step with tensors in channels-first order and whole depthwise
   kernels, at 32 px.

For 1 and 2 the plain networks have the supernet's levers as well (channels-last order; depthwise kernels
cropped to the part that can touch the map; the products and strips of `nestling.models.convolutions`), so
that what is left is the cost of lending; with the first alone is shown beside it.

    python benchmarks/lending_overhead.py [--check] [--repeats 21] [--threads 2]

Takes 5 to 8 minutes on 2 cores. Every repeat runs each of the compared steps once, in random order; a ratio
is taken within a repeat, and the median of the ratios counts. It is made sure first that both sides compute
the same.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from record import Benchmark, Figures, quartiles
from torch import Tensor, nn
from torch.func import functional_call

from nestling.models.building import build_shapes
from nestling.models.convolutions import compute_by_products
from nestling.models.kernels import compute_touching_part
from nestling.models.lending import lend
from nestling.models.mobilenet import build
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, Need, SearchSpace, Value
from nestling.train.losses import label_loss, soft_label_loss

CLASSES = 1000
SIZES = ((32, 64), (128, 16))
"""Pixels, and images a batch."""
LARGEST, SANDWICH, FASTER = 1.05, 1.10, 0.6
STAGES: tuple[tuple[int, int, float, str], ...] = (
    (24, 2, 0.0, "relu"),
    (40, 2, 0.25, "relu"),
    (80, 2, 0.0, "hard_swish"),
    (112, 1, 0.25, "hard_swish"),
    (160, 2, 0.25, "hard_swish"),
)
"""Width, stride, squeeze-and-excitation and activation of once-for-all's five stages."""


def ofa_space() -> SearchSpace:
    """Once-for-all's MobileNetV3 of width 1.0: 45 choices, about 2 x 10^19 networks."""
    constants: dict[str, Value] = {
        "classes": CLASSES,
        "act": "hard_swish",
        "stem.width": 16,
        "head.kind": "mobilenetv3",
        "head.width": 1280,
        "s1.block": "ds",
        "s1.width": 16,
        "s1.act": "relu",
        "s7.block": "conv",
        "s7.kernel": 1,
        "s7.width": 960,
    }
    choices = [Choice(name, (value,)) for name, value in constants.items()]
    for stage, (width, stride, squeeze, act) in enumerate(STAGES, start=2):
        for name, value in (("width", width), ("stride", stride), ("se", squeeze), ("act", act)):
            choices.append(Choice(f"s{stage}.{name}", (value,)))
        choices.append(Choice(f"s{stage}.depth", (2, 3, 4)))
        for block in range(1, 5):
            needs = (Need(f"s{stage}.depth", block),)
            choices.append(Choice(f"s{stage}.b{block}.kernel", (3, 5, 7), needs))
            choices.append(Choice(f"s{stage}.b{block}.expand", (3, 4, 6), needs))
    return SearchSpace("mobilenet", tuple(choices))


class ChannelsFirstSupernet(nn.Module):
    """A supernet without the levers: tensors in channels-first order, whole depthwise kernels."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.largest = build(space.largest)
        self._kept = {arch: self._borrower(arch) for arch in (space.largest, space.smallest)}

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        """Logits (N, classes) of the subnet `arch` for `images` (N, 3, H, W) in channels-first order."""
        network, parameters = self._kept.get(arch) or self._borrower(arch)
        lent = lend(dict(self.largest.named_parameters()), parameters)
        return functional_call(network, lent, (images,), tie_weights=False)  # type: ignore[no-any-return]

    def _borrower(self, arch: Arch) -> tuple[nn.Module, dict[str, Tensor]]:
        network = build_shapes(build, arch)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.track_running_stats = False  # a batch's own statistics, as in the supernet
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return network, dict(network.named_parameters())


@dataclass(frozen=True, slots=True)
class Learner:
    """Something that gives logits, and what updates its weights."""

    logits: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def learner(network: nn.Module) -> Learner:
    """The plain `network` and an optimizer of its own, with momenta as if it had stepped before."""
    optimizer = sgd(network)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return Learner(network, optimizer)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every step here; its rate is so small that the weights stay as good as they are."""
    return torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=3e-5)


def plain_network(supernet: Supernet, arch: Arch, *, touching: bool) -> nn.Module:
    """The timm network of `arch` with the supernet's weights, in training mode and channels-last order."""
    network = supernet.materialize(arch)
    if touching:
        compute_touching_part(network)
        compute_by_products(network)
    return network.train()


def label_step(member: Learner, images: Tensor, labels: Tensor) -> None:
    """One training step on labels."""
    label_loss(member.logits(images), labels, smoothing=0.1).backward()  # type: ignore[no-untyped-call]
    update(member.optimizer)


def update(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sandwich(members: Sequence[Callable[[Tensor], Tensor]], images: Tensor, labels: Tensor) -> None:
    """Forward and backward of a sandwich; the first of `members` learns from labels, the others from it."""
    first, *others = members
    logits = first(images)
    soft_labels = logits.detach()
    label_loss(logits, labels, smoothing=0.1).backward()  # type: ignore[no-untyped-call]
    for member in others:
        soft_label_loss(member(images), soft_labels).backward()  # type: ignore[no-untyped-call]


class Steps:
    """The steps that are compared, on one batch of `images` of `pixels` px.

    Args:
        space: of the networks.
        pixels: side of the images.
        images: how many.
        rng: draws the random networks.
    """

    def __init__(self, space: SearchSpace, *, pixels: int, images: int, rng: random.Random) -> None:
        torch.manual_seed(0)
        self.space, self.rng = space, rng
        self.supernet = Supernet(space, build).train()
        self.old = ChannelsFirstSupernet(space).train()
        self.old.load_state_dict(self.supernet.state_dict())
        self.optimizer, self.old_optimizer = sgd(self.supernet), sgd(self.old)
        self.plain = learner(plain_network(self.supernet, space.largest, touching=False))
        self.cropped = learner(plain_network(self.supernet, space.largest, touching=True))
        self.channels_first = torch.randn(images, 3, pixels, pixels)
        self.images = self.channels_first.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (images,))

    def check_equal(self) -> float:
        """The largest difference between logits of the two sides, over the largest logit.

        Raises:
            SystemExit: they do not compute the same.
        """
        worst = 0.0
        with torch.no_grad():
            for arch in (self.space.largest, self.space.smallest, self.space.sample(self.rng)):
                expected = plain_network(self.supernet, arch, touching=False)(self.images)
                for got in (self.supernet(self.images, arch), self.old(self.channels_first, arch)):
                    worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        if not worst < 1e-3:
            raise SystemExit(f"the compared networks differ by {worst:.1e} of their logits' scale")
        return worst

    def warm_up(self) -> None:
        """Lets every layer that can be drawn run once: later, as in training, none is new to the runtime."""
        choices = [choice.name for choice in self.space.open_choices]
        for kernel, expand in product((3, 5, 7), (3, 4, 6)):
            alike = {name: [kernel] for name in choices if name.endswith(".kernel")}
            alike |= {name: [expand] for name in choices if name.endswith(".expand")}
            arch = self.space.only(alike).largest
            plain = plain_network(self.supernet, arch, touching=True)
            for logits in (
                self.supernet(self.images, arch),
                plain(self.images),
                self.old(self.channels_first, arch),
            ):
                label_loss(logits, self.labels, smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        for optimizer in (self.optimizer, self.old_optimizer):
            optimizer.zero_grad(set_to_none=True)
        self.repeat()

    def repeat(self) -> dict[str, float]:
        """The seconds of each step, run once, in random order; with two random networks that are new."""
        steps = self._sandwiches([self.space.sample(self.rng) for _ in range(2)]) | {
            "largest: supernet": lambda: label_step(
                Learner(lambda x: self.supernet(x, self.space.largest), self.optimizer),
                self.images,
                self.labels,
            ),
            "largest: plain, cropped": lambda: label_step(self.cropped, self.images, self.labels),
            "largest: plain": lambda: label_step(self.plain, self.images, self.labels),
        }
        order = list(steps)
        self.rng.shuffle(order)
        seconds = {}
        for name in order:
            gc.collect()  # or one step would pay for what another has left
            began = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - began
        return seconds

    def _sandwiches(self, drawn: Sequence[Arch]) -> dict[str, Callable[[], None]]:
        archs = [self.space.largest, self.space.smallest, *drawn]
        members = [self.cropped] + [
            learner(plain_network(self.supernet, arch, touching=True)) for arch in archs[1:]
        ]
        plain = [member.logits for member in members]

        def lent(supernet: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
            sandwich([lambda x, a=arch: supernet(x, a) for arch in archs], images, self.labels)  # type: ignore[misc]
            update(optimizer)

        def four_updates() -> None:
            sandwich(plain, self.images, self.labels)
            for member in members:
                update(member.optimizer)

        def one_update() -> None:
            sandwich(plain, self.images, self.labels)
            update(members[0].optimizer)
            for member in members[1:]:
                member.optimizer.zero_grad(set_to_none=True)

        return {
            "sandwich: supernet": lambda: lent(self.supernet, self.optimizer, self.images),
            "sandwich: plain, one update": one_update,
            "sandwich: plain, four updates": four_updates,
            "sandwich: channels-first": lambda: lent(self.old, self.old_optimizer, self.channels_first),
        }


RATIOS = {
    "largest": ("largest: supernet", "largest: plain, cropped"),
    "largest / plain without cropping": ("largest: supernet", "largest: plain"),
    "sandwich": ("sandwich: supernet", "sandwich: plain, four updates"),
    "sandwich / one update": ("sandwich: supernet", "sandwich: plain, one update"),
    "sandwich / channels-first": ("sandwich: supernet", "sandwich: channels-first"),
}


def measure(options: argparse.Namespace) -> Figures:
    """Seconds and ratios for both sizes; prints a table of each."""
    torch.set_num_threads(options.threads)
    space = ofa_space()
    found = {}
    for pixels, images in SIZES:
        steps = Steps(space, pixels=pixels, images=images, rng=random.Random(0))
        difference = steps.check_equal()
        steps.warm_up()
        seconds = [steps.repeat() for _ in range(options.repeats)]
        ratios = {
            name: quartiles([each[over] / each[under] for each in seconds])
            for name, (over, under) in RATIOS.items()
        }
        found[str(pixels)] = {
            "images": images,
            "largest_difference": difference,
            "seconds": {name: [round(each[name], 5) for each in seconds] for name in sorted(seconds[0])},
            "ratios": {
                name: {"lower_quartile": low, "median": median, "upper_quartile": high}
                for name, (low, median, high) in ratios.items()
            },
        }
        print(table(pixels, images, found[str(pixels)]), flush=True)
    return {
        "threads": options.threads,
        "repeats": options.repeats,
        "choices": len(space.open_choices),
        "sizes": found,
    }


def table(pixels: int, images: int, found: Figures) -> str:
    """The figures of one size, for reading."""
    lines = [
        f"{images} images of {pixels} px; logits differ by {found['largest_difference']:.0e} of their scale"
    ]
    for name, seconds in found["seconds"].items():
        low, median, high = (1e3 * value for value in quartiles(seconds))
        lines.append(f"  {name:34} {median:8.1f} ms   ({low:.1f} to {high:.1f})")
    for name, ratio in found["ratios"].items():
        spread = f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
        lines.append(f"  ratio, {name:34} {ratio['median']:6.3f}   {spread}")
    return "\n".join(lines)


def median_ratio(figures: Figures, name: str, *, pixels: int | None = None) -> float:
    """The ratio called `name` at `pixels` px; where that is not given, the largest of all sizes."""
    sizes = figures["sizes"]
    chosen = sizes.values() if pixels is None else [sizes[str(pixels)]]
    medians: list[float] = [size["ratios"][name]["median"] for size in chosen]
    return max(medians)


def misses(figures: Figures) -> list[str]:
    """Which of the three limits are missed."""
    judged = (
        ("the largest's step / plain", median_ratio(figures, "largest"), LARGEST),
        ("a sandwich step / its four plain networks", median_ratio(figures, "sandwich"), SANDWICH),
        (
            "a sandwich step / channels-first",
            median_ratio(figures, "sandwich / channels-first", pixels=SIZES[0][0]),
            FASTER,
        ),
    )
    return [f"{name}: {ratio:.3f}, at most {limit}" for name, ratio, limit in judged if not ratio <= limit]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    largest, plain, strict = (
        median_ratio(figures, name) for name in ("largest", "sandwich", "sandwich / one update")
    )
    faster = median_ratio(figures, "sandwich / channels-first", pixels=SIZES[0][0])
    return (
        f"the largest's step takes {largest:.3f}x the plain network's (at most {LARGEST}); a sandwich step "
        f"{plain:.3f}x its four plain networks' (at most {SANDWICH:.2f}; {strict:.3f}x with one SGD step on "
        f"either side), and {faster:.3f}x the channels-first, uncropped one at {SIZES[0][0]} px "
        f"(at most {FASTER})"
    )


BENCHMARK = Benchmark("lending_overhead", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--repeats", type=int, default=21, help="of each step [default: 21]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    options = parser.parse_args(words)
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; a median with its spread takes at least 2")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
