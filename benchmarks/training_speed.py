"""What the options of training cost or save, each against the same step without it.

The space is once-for-all's MobileNetV3 of `lending_overhead.py`, with random images. A step is a sandwich:
forward and backward of the largest network, the smallest and two random ones, then SGD, in training mode.

Claims:

1. Averaging the weights adds at most 5 % to that step (16 images of 32 px).
2. EfficientTrain's curriculum, from 128 px, takes at most 0.75 of the time of the run without it (0.65 of its
   pixels; 16 images): the time of a step at each of its sides, the crop of the spectrum included, weighed by
   how many steps have it.
3. With `--compile`: what torch.compile makes of the largest and the smallest network's forward and backward
   pass at 32 px. Told, not judged; compiling takes minutes.

Beside them: how much longer a step takes that builds its two random networks.

    python benchmarks/training_speed.py [--check] [--repeats 15] [--threads 2] [--compile]

Takes 3 minutes on 2 cores, and 5 to 10 more with `--compile`. Every repeat runs each of the compared steps
once, in random order; a ratio is taken within a repeat, and the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from lending_overhead import CLASSES, ofa_space, sandwich, sgd, update
from record import Benchmark, Figures, quartiles
from torch import Tensor

from nestling.data.curriculum import EFFICIENTTRAIN, low_frequencies
from nestling.models.building import build_shapes
from nestling.models.compiling import Call, CompiledCall, call_lent
from nestling.models.convolutions import compute_by_products
from nestling.models.kernels import compute_touching_part
from nestling.models.lending import lend
from nestling.models.mobilenet import build
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace
from nestling.train.averaging import WeightAverage

AVERAGING, CURRICULUM = 1.05, 0.75
SMALL, LARGE = (32, 16), (128, 16)
"""Pixels, and images a batch."""
RANDOM_SUBNETS = 2

Step = Callable[[], object]


class Bench:
    """A supernet in training, and steps of it on random images.

    Args:
        space: of the networks.
        rng: draws them.
    """

    def __init__(self, space: SearchSpace, *, rng: random.Random) -> None:
        torch.manual_seed(0)
        self.space, self.rng = space, rng
        self.supernet = Supernet(space, build).train()
        self.optimizer = sgd(self.supernet)
        self.average = WeightAverage(dict(self.supernet.largest.named_parameters()), decay=0.9999)

    def draw(self) -> list[Arch]:
        """Random networks for one step, which were hardly ever met before."""
        return [self.space.sample(self.rng) for _ in range(RANDOM_SUBNETS)]

    def step(self, images: Tensor, labels: Tensor, drawn: Sequence[Arch]) -> None:
        """One sandwich step."""
        archs = [self.space.largest, self.space.smallest, *drawn]
        sandwich([partial(self._logits, arch) for arch in archs], images, labels)
        update(self.optimizer)

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Lets every layer that can be drawn run once: later, as in training, none is new to the runtime."""
        choices = [choice.name for choice in self.space.open_choices]
        for kernel, expand in product((3, 5, 7), (3, 4, 6)):
            alike = {name: [kernel] for name in choices if name.endswith(".kernel")}
            alike |= {name: [expand] for name in choices if name.endswith(".expand")}
            self.step(images, labels, [self.space.only(alike).largest])

    def _logits(self, arch: Arch, images: Tensor) -> Tensor:
        logits: Tensor = self.supernet(images, arch)
        return logits


def batch(pixels: int, images: int) -> tuple[Tensor, Tensor]:
    """Random images in channels-last order, and labels."""
    noise = torch.randn(images, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return noise, torch.randint(CLASSES, (images,))


def timed(steps: dict[str, Step], *, rng: random.Random) -> dict[str, float]:
    """The seconds of each of `steps`, run once, in random order."""
    names = list(steps)
    rng.shuffle(names)
    seconds = {}
    for name in names:
        gc.collect()  # or one step would pay for what another has left
        began = time.perf_counter()
        steps[name]()
        seconds[name] = time.perf_counter() - began
    return seconds


def measure_averaging(bench: Bench, *, repeats: int) -> list[dict[str, float]]:
    """Seconds of a step that builds its networks, of one that finds them, and of one that averages too."""
    images, labels = batch(*SMALL)
    bench.warm_up(images, labels)
    ready = bench.draw()

    def averaged() -> None:
        bench.step(images, labels, ready)
        bench.average.update()

    averaged()
    return [
        timed(
            {
                "built in the step": partial(bench.step, images, labels, bench.draw()),
                "all there": partial(bench.step, images, labels, ready),
                "all there, averaged": averaged,
            },
            rng=bench.rng,
        )
        for _ in range(repeats)
    ]


def measure_curriculum(bench: Bench, *, repeats: int) -> list[dict[str, float]]:
    """Seconds of a step at each side of the curriculum, the crop included, and of one without."""
    images, labels = batch(*LARGE)
    drawn = bench.draw()
    sides = sorted({EFFICIENTTRAIN.side(period, full=LARGE[0]) for period in EFFICIENTTRAIN.periods})

    def cropped(side: int) -> None:
        bench.step(low_frequencies(images, side), labels, drawn)

    steps: dict[str, Step] = {f"{side} px": partial(cropped, side) for side in sides}
    steps["without"] = partial(bench.step, images, labels, drawn)
    steps["crop alone"] = partial(low_frequencies, images, sides[0])
    timed(steps, rng=bench.rng)  # warms up
    return [timed(steps, rng=bench.rng) for _ in range(repeats)]


def curriculum_ratio(seconds: dict[str, float]) -> float:
    """The time of a run under the curriculum, over that of one without."""
    total = sum(period.share for period in EFFICIENTTRAIN.periods)
    taken = sum(
        period.share * seconds[f"{EFFICIENTTRAIN.side(period, full=LARGE[0])} px"]
        for period in EFFICIENTTRAIN.periods
    )
    return taken / total / seconds["without"]


def measure_compiled(bench: Bench, *, repeats: int) -> dict[str, Figures]:
    """For the largest and the smallest: the minute of compiling, and the ratio to the call as it is."""
    images, _ = batch(*SMALL)
    large = dict(bench.supernet.largest.named_parameters())
    found = {}
    for name, arch in (("largest", bench.space.largest), ("smallest", bench.space.smallest)):
        network = build_shapes(build, arch).train()
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        compute_touching_part(network)
        compute_by_products(network)
        shapes, compiled = dict(network.named_parameters()), CompiledCall(arch)

        def run(
            call: Call, network: torch.nn.Module = network, shapes: dict[str, torch.nn.Parameter] = shapes
        ) -> None:
            logits = call(network, lend(large, shapes), images)
            logits.square().mean().backward()  # type: ignore[no-untyped-call]
            bench.optimizer.zero_grad(set_to_none=True)

        began = time.perf_counter()
        run(compiled)
        compiling = time.perf_counter() - began
        steps: dict[str, Step] = {"compiled": partial(run, compiled), "plain": partial(run, call_lent)}
        timed(steps, rng=bench.rng)
        each = [timed(steps, rng=bench.rng) for _ in range(repeats)]
        found[name] = {
            "is_compiled": compiled.is_compiled,
            "compiling_seconds": round(compiling, 1),
            "ratio": spread([seconds["compiled"] / seconds["plain"] for seconds in each]),
        }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = quartiles(values)
    return {"lower_quartile": low, "median": median, "upper_quartile": high}


def measure(options: argparse.Namespace) -> Figures:
    """Seconds and ratios; prints a table."""
    torch.set_num_threads(options.threads)
    bench = Bench(ofa_space(), rng=random.Random(0))
    steps = measure_averaging(bench, repeats=options.repeats)
    curriculum = measure_curriculum(bench, repeats=options.repeats)
    ratios = {
        "built in the step": spread([each["built in the step"] / each["all there"] for each in steps]),
        "averaged": spread([each["all there, averaged"] / each["all there"] for each in steps]),
        "curriculum": spread([curriculum_ratio(each) for each in curriculum]),
        "crop": spread([each["crop alone"] / each["without"] for each in curriculum]),
    }
    figures: dict[str, object] = {
        "threads": options.threads,
        "repeats": options.repeats,
        "seconds": {
            name: [round(each[name], 5) for each in group]
            for group in (steps, curriculum)
            for name in sorted(group[0])
        },
        "ratios": ratios,
        "curriculum_pixels": EFFICIENTTRAIN.compute(full=LARGE[0], steps=1000),
    }
    if options.compile:
        figures["compiled"] = measure_compiled(bench, repeats=options.repeats)
    print(table(figures), flush=True)
    return figures


def table(figures: Figures) -> str:
    """The figures, for reading."""
    lines = []
    for name, seconds in figures["seconds"].items():
        low, median, high = (1e3 * value for value in quartiles(seconds))
        lines.append(f"  {name:24} {median:8.1f} ms   ({low:.1f} to {high:.1f})")
    ratios = dict(figures["ratios"])
    for name, found in figures.get("compiled", {}).items():
        failed = "" if found["is_compiled"] else "; it failed"
        lines.append(f"  compiling the {name}: {found['compiling_seconds']:.0f} s{failed}")
        ratios[f"{name}, compiled"] = found["ratio"]
    for name, ratio in ratios.items():
        quarters = f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
        lines.append(f"  ratio, {name:24} {ratio['median']:6.3f}   {quarters}")
    return "\n".join(lines)


def misses(figures: Figures) -> list[str]:
    """Which of the limits are missed."""
    judged = (
        ("a step with averaged weights / without", "averaged", AVERAGING),
        ("a run under the curriculum / without", "curriculum", CURRICULUM),
    )
    medians = {name: ratio["median"] for name, ratio in figures["ratios"].items()}
    return [
        f"{what}: {medians[name]:.3f}, at most {limit}"
        for what, name, limit in judged
        if not medians[name] <= limit
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    medians = {name: ratio["median"] for name, ratio in figures["ratios"].items()}
    compiled = "".join(
        f"; torch.compile: the {name}'s pass {found['ratio']['median']:.3f}x after "
        f"{found['compiling_seconds']:.0f} s"
        for name, found in figures.get("compiled", {}).items()
    )
    return (
        f"building two new networks makes a step {medians['built in the step']:.3f}x as long; averaging the "
        f"weights {medians['averaged']:.3f}x (at most {AVERAGING}); EfficientTrain's curriculum takes "
        f"{medians['curriculum']:.3f}x of a run's time (at most {CURRICULUM}; "
        f"{figures['curriculum_pixels']:.3f}x of its pixels){compiled}"
    )


BENCHMARK = Benchmark("training_speed", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--repeats", type=int, default=15, help="of each step [default: 15]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well: minutes")
    options = parser.parse_args(words)
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; a median with its spread takes at least 2")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
