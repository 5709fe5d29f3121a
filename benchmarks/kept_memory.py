"""A command that keeps the memory its tensors free trains faster on a CPU.

Each process is `nestling train configs/cifar10_cpu.toml`, shortened and with the built-in digits, enlarged to
the same 32 px; from the first step to the last are measured: seconds, processor seconds, page faults, and the
most memory that the process ever held. Some processes are the command as it is, the others the same with its
switch, an empty GLIBC_TUNABLES in the environment; pairs of fresh ones take turns, in random order within a
pair. Told are the ratios, kept against given back, by the median of the pairs with its quartiles.

Claim: at the median a training takes at most 1.0 of the processor seconds.

    python benchmarks/kept_memory.py [--check] [--pairs 8] [--epochs 2] [--threads 2]

Takes 10 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Benchmark, Figures, quartiles

from nestling import cli, memory
from nestling.config import load_config
from nestling.pipeline import training

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_cpu.toml"
PIXELS, IMAGES = 32, 1024
MOST = 1.0
WAYS = ("kept", "given back")


def environment(way: str, *, threads: int) -> dict[str, str]:
    """Of a process that does `way`: nothing of the user's says how to allocate."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(memory.OWN)}
    switch = {} if way == "kept" else {"GLIBC_TUNABLES": ""}
    return {**ours, **switch, "OMP_NUM_THREADS": str(threads)}


def words(folder: Path, *, epochs: float) -> list[str]:
    """Of the command that trains in `folder`."""
    train = load_config(CONFIG).train
    shorter = epochs / train.epochs
    laid = {
        "torch_device": '"cpu"', "data.source": '"digits"', "data.size": PIXELS, "data.train_images": IMAGES,
        "data.search_images": 200, "train.epochs": epochs, "train.ramp_epochs": train.ramp_epochs * shorter,
        "train.warmup_epochs": train.warmup_epochs * shorter,
    }  # fmt: skip
    sets = [word for key, value in laid.items() for word in ("--set", f"{key}={value}")]
    return ["train", str(CONFIG), "--output", str(folder), *sets]


def measure_here(told: Path, command: list[str]) -> None:
    """Runs `command` in this process, and writes to `told` what its training took.

    Raises:
        SystemExit: always, as the command does.
    """
    taken: dict[str, Any] = {}
    real_keep, real_train = memory.keep_freed_memory, training.train

    def keep() -> bool:
        taken["kept"] = real_keep()
        return bool(taken["kept"])

    def train(*arguments: Any, **named: Any) -> None:
        began, spent = time.perf_counter(), time.process_time()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        real_train(*arguments, **named)
        used = resource.getrusage(resource.RUSAGE_SELF)
        taken["seconds"] = time.perf_counter() - began
        taken["processor_seconds"] = time.process_time() - spent
        taken["faults"] = used.ru_minflt - faults
        taken["most_bytes"] = 1024 * used.ru_maxrss

    vars(memory)["keep_freed_memory"], vars(training)["train"] = keep, train
    sys.argv = ["nestling", *command]
    try:
        cli.main()
    finally:
        told.write_text(json.dumps(taken))


def measured(way: str, options: argparse.Namespace) -> dict[str, float]:
    """What a training takes in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = words(Path(folder) / "run", epochs=options.epochs)
        ran = subprocess.run(
            [sys.executable, __file__, "--told", str(told), *command],
            env=environment(way, threads=options.threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode != 0:
            raise SystemExit(f"nestling train ended with {ran.returncode}: {ran.stderr[-2000:]}")
        taken: dict[str, float] = json.loads(told.read_text())
    if taken.pop("kept") is not (way == "kept"):
        raise SystemExit(f"memory was to be {way}, and nestling train did not do so")
    return taken


def measure(options: argparse.Namespace) -> Figures:
    """What every process measured, in pairs."""
    if platform.libc_ver()[0] != "glibc":
        raise SystemExit(f"memory is kept with glibc alone; this is {platform.libc_ver()[0] or 'another'}")
    rng = random.Random(0)
    pairs = []
    for _ in range(options.pairs):
        pair = {way: measured(way, options) for way in rng.sample(WAYS, 2)}
        pairs.append(pair)
        print("  ".join(f"{way}: {pair[way]['processor_seconds']:.1f} s" for way in WAYS), flush=True)
    return {"epochs": options.epochs, "images": IMAGES, "threads": options.threads, "pairs": pairs}


def ratios(figures: Figures, what: str) -> tuple[float, float, float]:
    """The quartiles of `what`, kept against given back."""
    return quartiles([pair["kept"][what] / pair["given back"][what] for pair in figures["pairs"]])


def misses(figures: Figures) -> list[str]:
    """Whether keeping memory costs time."""
    got = ratios(figures, "processor_seconds")[1]
    return [] if got <= MOST else [f"a training takes {got:.3f} of the processor seconds, at most {MOST}"]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    low, middle, high = ratios(figures, "seconds")
    least, half, most = ratios(figures, "processor_seconds")

    def median(what: str) -> list[float]:
        return [quartiles([pair[way][what] for pair in figures["pairs"]])[1] for way in WAYS]

    faults, held = median("faults"), [size / 1e9 for size in median("most_bytes")]
    return (
        f"with freed memory kept, nestling train takes {middle:.3f} of the time ({low:.3f} to {high:.3f}) "
        f"and {half:.3f} of the processor seconds ({least:.3f} to {most:.3f}), with {faults[0]:.0f} page "
        f"faults instead of {faults[1]:.0f}, and holds {held[0]:.2f} GB instead of {held[1]:.2f}; "
        f"{len(figures['pairs'])} pairs of processes"
    )


BENCHMARK = Benchmark("kept_memory", __doc__, measure, sentence, misses)


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["--told"]:
        measure_here(Path(given[1]), given[2:])
    parser = BENCHMARK.parser()
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="of processes [default: 8]")
    parser.add_argument("--epochs", type=float, default=2, metavar="N", help="in each process [default: 2]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    options = parser.parse_args(given)
    if options.pairs < 2:
        parser.error(f"--pairs is {options.pairs}; a median with its quartiles takes at least 2")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
