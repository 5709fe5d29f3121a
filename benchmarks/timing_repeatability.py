"""A latency ratio that was measured once is the one that is measured again, also on a busy machine.

Five timm networks at 128 px, one thread of ONNX Runtime; each is measured again and again, every time in a
fresh process, while the machine is quiet and while a busy loop has the other core. Side by side:

- ours: `Device.measure`, and of it the ratio to the reference model; measurements that it flags as unstable
  are counted, and left out, as a search does not use them;
- plain: the median of 50 calls, in milliseconds;
- loop: the median of all calls of 1.5 s, as onnxruntime_perf_test takes them, divided by that of the
  reference model, which the next process times in the same way.

Then two copies of one file are compared with each other, as `nestling profile --compare` does it, 100 times.

Claims, of the coefficient of variation of ours in each file:

1. Quiet: at most 2 %, and at most 5 % of all measurements are flagged.
2. Loaded: at most 4 %, of the measurements that are not flagged (where fewer than 3 are left, none is used).
3. At most 5 of 100 comparisons of a file with its copy claim a difference.

    python benchmarks/timing_repeatability.py [--check] [--measurements 20] [--comparisons 100] [--quick]

Takes 40 minutes on two idle cores; with --quick 3, and proves nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from record import Benchmark, Figures
from timm_files import NETWORKS, write_networks

from nestling.profile import compare_files, connect
from nestling.profile.reference import reference_model

PIXELS = 128
SECONDS = 1.5
MOST_QUIET, MOST_LOADED = 0.02, 0.04
MOST_FLAGGED = 0.05
LEAST_LEFT = 3
MOST_CLAIMS = 0.05
PLAIN = Path(__file__).with_name("plain_timing.py")


@contextmanager
def busy_core(core: int | None) -> Iterator[None]:
    """A process that does nothing but keep `core` busy, for the time of the block; none where it is None."""
    if core is None:
        yield
        return
    program = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield
        finally:
            process.kill()


def plain(path: Path, *words: str) -> float:
    """The median milliseconds that the plain loop finds, in a process of its own."""
    command = [sys.executable, str(PLAIN), str(path), *words]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one_round(path: Path, reference: Path) -> dict[str, Any]:
    """Each way of measuring, once."""
    with connect("ort:cpu", seconds=SECONDS) as device:
        taken = device.measure(path)
    loop = ("--seconds", str(SECONDS))
    return {
        "ours": taken.ratio,
        "because": list(taken.unstable_because),
        "plain": plain(path, "--calls", "50"),
        "loop": plain(path, *loop) / plain(reference, *loop),
    }


def measure(options: argparse.Namespace) -> Figures:
    """All measurements; prints a line for each file and state of the machine."""
    names = NETWORKS[:2] if options.quick else NETWORKS
    count = 3 if options.quick else options.measurements
    core = max(os.sched_getaffinity(0))
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        reference.write_bytes(reference_model())
        paths = write_networks(Path(folder), names, pixels=PIXELS)
        for name, path in paths.items():
            files[name] = {}
            for state, busy in (("quiet", None), ("loaded", core)):
                with busy_core(busy):
                    rounds = [one_round(path, reference) for _ in range(count)]
                found = {
                    "ours": [one["ours"] for one in rounds],
                    "flagged": [one["because"] for one in rounds],
                    "plain": [one["plain"] for one in rounds],
                    "loop": [one["loop"] for one in rounds],
                }
                files[name][state] = found
                print(line(name, state, found), flush=True)
        compared = compare_copies(list(paths.values()), 5 if options.quick else options.comparisons)
    return {"files": files, "copies": compared}


def compare_copies(paths: Sequence[Path], count: int) -> dict[str, Any]:
    """How often two copies of one file are called different; every file has its turn."""
    speedups, claims, unstable = [], 0, 0
    with connect("ort:cpu") as device:
        for number in range(count):
            path = paths[number % len(paths)]
            copy = path.with_name("copy.onnx")
            shutil.copyfile(path, copy)
            told = compare_files(device, path, copy, seconds=3.0)
            speedups.append(round(told.speedup, 5))
            unstable += told.unstable
            claims += told.differs and not told.unstable
            print(f"comparison {number + 1}: {told.speedup:.4f} +- {told.half_width:.4f}", flush=True)
    return {"speedups": speedups, "claims": claims, "unstable": unstable}


def used(found: Figures) -> list[float]:
    """Our ratios without those that were flagged."""
    return [ratio for ratio, because in zip(found["ours"], found["flagged"], strict=True) if not because]


def variation(values: Sequence[float]) -> float:
    """The standard deviation as a part of the mean; nan of fewer than two values."""
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else float("nan")


def line(name: str, state: str, found: Figures) -> str:
    """One file's line in one state of the machine."""
    left, several = used(found), len(found["ours"])
    ours = f"ours {variation(left):6.2%} ({several - len(left)} of {several} flagged)"
    plain_part, loop = (f"{key} {variation(found[key]):6.2%}" for key in ("plain", "loop"))
    return f"{name:24} {state:7} {ours}  {plain_part}  {loop}"


def worst(figures: Figures, state: str, key: str) -> float:
    """The largest variation over the files; of ours where enough are left."""
    kept = [used(found[state]) if key == "ours" else found[state][key] for found in figures["files"].values()]
    return max((variation(values) for values in kept if len(values) >= LEAST_LEFT), default=float("nan"))


def misses(figures: Figures) -> list[str]:
    """What is not as claimed."""
    told = []
    flagged = total = 0
    for name, states in figures["files"].items():
        left = used(states["quiet"])
        total += len(states["quiet"]["ours"])
        flagged += len(states["quiet"]["ours"]) - len(left)
        if not variation(left) <= MOST_QUIET:
            told.append(f"{name}, quiet: {variation(left):.2%} of variation (at most {MOST_QUIET:.0%})")
        left = used(states["loaded"])
        if len(left) >= LEAST_LEFT and not variation(left) <= MOST_LOADED:
            told.append(f"{name}, loaded: {variation(left):.2%} of variation (at most {MOST_LOADED:.0%})")
    if flagged > MOST_FLAGGED * total:
        told.append(f"{flagged} of {total} measurements of a quiet machine were flagged")
    copies = figures["copies"]
    if copies["claims"] > MOST_CLAIMS * len(copies["speedups"]):
        told.append(
            f"{copies['claims']} of {len(copies['speedups'])} comparisons of copies claim a difference"
        )
    return told


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    parts = []
    for state in ("quiet", "loaded"):
        ours, medians, loops = (worst(figures, state, key) for key in ("ours", "plain", "loop"))
        others = f"plain medians {medians:.1%}, ratios of loops {loops:.1%}"
        parts.append(f"{state}: at most {ours:.2%} ({others})")
    lost = sum(len(f["loaded"]["ours"]) - len(used(f["loaded"])) for f in figures["files"].values())
    total = sum(len(f["loaded"]["ours"]) for f in figures["files"].values())
    copies = figures["copies"]
    return (
        f"the variation of our ratio over fresh processes, {len(figures['files'])} files; "
        f"{'; '.join(parts)}, {lost} of {total} flagged there; {copies['claims']} of "
        f"{len(copies['speedups'])} comparisons of a file with its copy claim a difference"
    )


BENCHMARK = Benchmark("timing_repeatability", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument(
        "--measurements", type=int, default=20, metavar="N", help="of each file [default: 20]"
    )
    parser.add_argument("--comparisons", type=int, default=100, metavar="N", help="of copies [default: 100]")
    parser.add_argument("--quick", action="store_true", help="two files, 3 measurements, 5 comparisons")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
