"""A process that keeps the memory its tensors free trains faster on a CPU.

Each process takes sandwich steps (largest, smallest, two random networks, SGD) of the small CIFAR space, 128
images of 32 px, as `configs/cifar10_cpu.toml` does; fresh processes with and without `keep_freed_memory` take
turns, in random order within a pair. Told are the ratios, kept against not, of seconds and of processor
seconds a step, by the median of the pairs with its quartiles, and page faults a step.

Claim: at the median a step takes at most 1.0 of the processor seconds.

    python benchmarks/kept_memory.py [--check] [--pairs 8] [--steps 12] [--threads 2]

Takes 5 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from lending_overhead import sandwich, sgd, update
from record import Benchmark, Figures, quartiles

from nestling.memory import keep_freed_memory
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.space.files import load_space

SPACE = Path(__file__).parents[1] / "search_spaces" / "mobilenet_cifar_small.toml"
IMAGES, PIXELS, CLASSES = 128, 32, 10
WARM_UP = 3
MOST = 1.0
WAYS = ("kept", "given back")


def measured_here(way: str, *, steps: int, threads: int) -> dict[str, float]:
    """Seconds, processor seconds and page faults of a step in this process."""
    if way == "kept" and not keep_freed_memory():
        raise SystemExit("memory cannot be kept here: not Linux with glibc, or the environment forbids it")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    space = load_space(SPACE).with_constants({"classes": CLASSES})
    supernet = Supernet(space, family(space.family).build).train()
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS)
    labels = torch.randint(CLASSES, (IMAGES,))
    optimizer = sgd(supernet.largest)
    rng = random.Random(0)

    def step() -> None:
        archs = (space.largest, space.smallest, space.sample(rng), space.sample(rng))
        sandwich([lambda batch, arch=arch: supernet(batch, arch) for arch in archs], images, labels)
        update(optimizer)

    for _ in range(WARM_UP):
        step()
    began, spent = time.perf_counter(), time.process_time()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return {
        "seconds": (time.perf_counter() - began) / steps,
        "processor_seconds": (time.process_time() - spent) / steps,
        "faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / steps,
    }


def measure(options: argparse.Namespace) -> Figures:
    """What every process measured, in pairs."""
    rng = random.Random(0)
    pairs = []
    for _ in range(options.pairs):
        pair = {}
        for way in rng.sample(WAYS, 2):
            words = ["--way", way, "--steps", str(options.steps), "--threads", str(options.threads)]
            told = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True)
            pair[way] = json.loads(told.stdout)
        pairs.append(pair)
        print("  ".join(f"{way}: {1e3 * pair[way]['seconds']:.0f} ms" for way in WAYS), flush=True)
    return {"steps": options.steps, "threads": options.threads, "pairs": pairs}


def ratios(figures: Figures, what: str) -> tuple[float, float, float]:
    """The quartiles of `what`, kept against given back."""
    return quartiles([pair["kept"][what] / pair["given back"][what] for pair in figures["pairs"]])


def misses(figures: Figures) -> list[str]:
    """Whether keeping memory costs time."""
    got = ratios(figures, "processor_seconds")[1]
    return [] if got <= MOST else [f"a step takes {got:.3f} of the processor seconds, at most {MOST}"]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    low, middle, high = ratios(figures, "seconds")
    least, half, most = ratios(figures, "processor_seconds")
    faults = [quartiles([pair[way]["faults"] for pair in figures["pairs"]])[1] for way in WAYS]
    return (
        f"with freed memory kept, a sandwich step takes {middle:.3f} of the time ({low:.3f} to {high:.3f}) "
        f"and {half:.3f} of the processor seconds ({least:.3f} to {most:.3f}); "
        f"{faults[0]:.0f} page faults a step instead of {faults[1]:.0f}; {len(figures['pairs'])} pairs of "
        "processes"
    )


BENCHMARK = Benchmark("kept_memory", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="of processes [default: 8]")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="in each process [default: 12]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.way is not None:
        print(json.dumps(measured_here(options.way, steps=options.steps, threads=options.threads)))
        return 0
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
