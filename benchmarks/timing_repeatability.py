"""A latency ratio that was measured once is the one that is measured again, also on a busy machine.

Five timm networks at 128 px, one thread of ONNX Runtime; each is measured again and again, every time in a
fresh process, while the machine is quiet and while a busy loop has the other core. Side by side:

- ours: `Device.measure`, and of it the ratio to the reference model; measurements that it flags as unstable
  are counted, and left out: a search takes them again, at once, later, and once more for its front, and flags
  what is unstable to the last;
- plain: the median of 50 calls, in milliseconds;
- loop: the median of all calls of 0.75 s, as onnxruntime_perf_test takes them, divided by that of the
  reference model, which the same process times next in the same way. (The 50 calls are its first ones.)

The files take turns, so that a machine that changes over minutes changes the measurements of each. Then two
copies of one file are compared with each other, as `nestling profile --compare` does it, 100 times.

Whether the machine is quiet is not ours to say: a loop in plain Python is timed on every core before and
after, and a round in which it took over 1.15 times its fastest time is made again, for all ways of measuring,
after a pause; one that never was quiet is left out. How many were is told. (Other tenants of a host slow its
cores by a third to a half.)

Claims, of the coefficient of variation of ours in each file:

1. Quiet: at most 2 %, and at most 5 % of all measurements are flagged.
2. Loaded: at most 4 %, of the measurements that are not flagged (where fewer than 3 are left, none is used).
3. At most 5 of 100 comparisons of a file with its copy, on a quiet machine, claim a difference in what a user
   reads. Of one that is unstable nothing is claimed there, and at most a quarter are.

    python benchmarks/timing_repeatability.py [--check] [--measurements 20] [--comparisons 100] [--quick]

Takes 25 minutes on two idle cores, longer where they are not; with --quick one, and proves nothing. Every
measurement is kept as soon as it is made: the same command continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import Benchmark, Figures, Parts
from thermometer import Thermometer
from timm_files import NETWORKS, write_networks

from nestling.profile import Device, compare_files, connect
from nestling.profile.quiet import QuietTimes
from nestling.profile.reference import reference_model

PIXELS = 128
SECONDS = 1.5
LOOP_SECONDS = 0.75
PLAIN_CALLS = slice(2, 52)
"""Of the calls that are timed, and that one call came before: three pass untimed."""
COMPARE_SECONDS = 3.0
MOST_QUIET, MOST_LOADED = 0.02, 0.04
MOST_FLAGGED = 0.05
LEAST_LEFT = 3
MOST_CLAIMS = 0.05
MOST_UNSTABLE = 0.25
LEAST_QUIET = 0.5
"""The part of the rounds in which the machine must have been quiet, of each file."""
PLAIN = Path(__file__).with_name("plain_timing.py")


@contextmanager
def busy_core(core: int | None) -> Iterator[None]:
    """A process that does nothing but keep `core` busy, for the time of the block; none where it is None.

    It ends by itself where this one was killed.
    """
    if core is None:
        yield
        return
    program = (
        f"import os\nos.sched_setaffinity(0, [{core}])\n"
        f"while os.getppid() == {os.getpid()}:\n    for _ in range(1_000_000): pass"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield
        finally:
            process.kill()


def plain(*paths: Path, seconds: float, calls: int = 1) -> list[list[float]]:
    """The milliseconds of each call of each file in a plain loop, in a process of its own."""
    command = [sys.executable, str(PLAIN), *map(str, paths), "--seconds", str(seconds), "--calls", str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def calibrated(known: QuietTimes) -> dict[str, Any]:
    """What the reference model takes, in seconds: so that the first measurement has something to go by."""
    with connect("ort:cpu", quiet=known) as device:
        return {"seconds": statistics.median(device.calibrate(seconds=SECONDS).reference_seconds)}


def one_round(path: Path, reference: Path, known: QuietTimes) -> dict[str, Any]:
    """Each way of measuring, once."""
    with connect("ort:cpu", seconds=SECONDS, quiet=known) as device:
        taken = device.measure(path)
    own, others = plain(path, reference, seconds=LOOP_SECONDS, calls=PLAIN_CALLS.stop)
    return {
        "ours": taken.ratio,
        "flagged": list(taken.unstable_because),
        "plain": statistics.median(own[PLAIN_CALLS]),
        "loop": statistics.median(own) / statistics.median(others),
    }


def measure(options: argparse.Namespace) -> Figures:
    """All measurements; prints a line for each file and state of the machine."""
    names = NETWORKS[:2] if options.quick else NETWORKS
    count = 3 if options.quick else options.measurements
    comparisons = 5 if options.quick else options.comparisons
    settings = {"names": names, "seconds": (SECONDS, LOOP_SECONDS, COMPARE_SECONDS), "claims": "as told"}
    parts = Parts(BENCHMARK.name + "_quick" * options.quick, settings)
    states = {"quiet": None, "loaded": max(os.sched_getaffinity(0))}
    files: dict[str, Any] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        reference.write_bytes(reference_model())
        paths = write_networks(Path(folder), names, pixels=PIXELS)
        thermometer, known = Thermometer(), QuietTimes(Path(folder) / "devices.db")
        thermometer.quietly(partial(calibrated, known))
        for state, busy in states.items():
            with busy_core(busy):
                rounds: list[dict[str, Any]] = []
                for number in range(count):
                    rounds.append({})
                    for name, path in paths.items():
                        measured = partial(one_round, path, reference, known)
                        made = measured if busy is not None else partial(thermometer.quietly, measured)
                        rounds[-1][name] = parts.part(f"{state} {number} {name}", made)
            for name in names:
                taken = [one[name] for one in rounds]
                files[name][state] = {key: [one[key] for one in taken] for key in taken[0]}
                print(line(name, state, files[name][state]), flush=True)
        turns = [list(paths.values())[number % len(paths)] for number in range(comparisons)]
        with connect("ort:cpu", quiet=known) as device:
            told = [
                parts.part(
                    f"comparison {number}",
                    partial(thermometer.quietly, partial(compare_with_copy, device, path)),
                )
                for number, path in enumerate(turns)
            ]
    parts.finish()
    unstable = sum(one["unstable"] for one in told)
    claims = sum(one["claims"] for one in told)
    speedups = [one["speedup"] for one in told]
    differs = sum(one["differs"] for one in told)
    restless = [one["restless"] for one in told]
    copies = {"speedups": speedups, "claims": claims, "differs": differs, "unstable": unstable}
    return {"files": files, "copies": {**copies, "restless": restless}}


def compare_with_copy(device: Device, path: Path) -> dict[str, Any]:
    """What a comparison of a file with its copy claims."""
    copy = path.with_name("copy.onnx")
    shutil.copyfile(path, copy)
    told = compare_files(device, path, copy, seconds=COMPARE_SECONDS)
    print(f"{path.stem} and its copy: {told.speedup:.4f} +- {told.half_width:.4f}", flush=True)
    return {
        "speedup": round(told.speedup, 5),
        "claims": " times faster than " in told.sentence(),
        "differs": told.differs,
        "unstable": told.unstable,
    }


def quietly(found: Figures) -> list[bool]:
    """Of each round, whether the machine was quiet; a busy loop of ours is not asked about."""
    return list(found.get("quiet", [True] * len(found["ours"])))


def used(found: Figures) -> list[float]:
    """Our ratios of rounds on a quiet machine, without those that were flagged."""
    rounds = zip(found["ours"], found["flagged"], quietly(found), strict=True)
    return [ratio for ratio, because, quiet in rounds if quiet and not because]


def flagged(found: Figures) -> int:
    """How many rounds on a quiet machine were flagged."""
    return sum(
        quiet and bool(because) for because, quiet in zip(found["flagged"], quietly(found), strict=True)
    )


def variation(values: Sequence[float]) -> float:
    """The standard deviation as a part of the mean; nan of fewer than two values."""
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else float("nan")


def line(name: str, state: str, found: Figures) -> str:
    """One file's line in one state of the machine."""
    left, several = used(found), sum(quietly(found))
    ours = f"ours {variation(left):6.2%} ({flagged(found)} of {several} flagged)"
    plain_part, loop = (f"{key} {variation(others(found, key)):6.2%}" for key in ("plain", "loop"))
    return f"{name:24} {state:7} {ours}  {plain_part}  {loop}"


def others(found: Figures, key: str) -> list[float]:
    """What another way of measuring found in the rounds on a quiet machine."""
    return [value for value, quiet in zip(found[key], quietly(found), strict=True) if quiet]


def worst(figures: Figures, state: str, key: str) -> float:
    """The largest variation over the files; of ours where enough are left."""
    states = [found[state] for found in figures["files"].values()]
    kept = [used(found) if key == "ours" else others(found, key) for found in states]
    return max((variation(values) for values in kept if len(values) >= LEAST_LEFT), default=float("nan"))


def misses(figures: Figures) -> list[str]:
    """What is not as claimed."""
    told = []
    lost = total = 0
    for name, states in figures["files"].items():
        left, several = used(states["quiet"]), quietly(states["quiet"])
        total += sum(several)
        lost += flagged(states["quiet"])
        if sum(several) < LEAST_QUIET * len(several):
            told.append(f"{name}: the machine was quiet in {sum(several)} of {len(several)} rounds only")
        if not variation(left) <= MOST_QUIET:
            told.append(f"{name}, quiet: {variation(left):.2%} of variation (at most {MOST_QUIET:.0%})")
        left = used(states["loaded"])
        if len(left) >= LEAST_LEFT and not variation(left) <= MOST_LOADED:
            told.append(f"{name}, loaded: {variation(left):.2%} of variation (at most {MOST_LOADED:.0%})")
    if lost > MOST_FLAGGED * total:
        told.append(f"{lost} of {total} measurements of a quiet machine were flagged")
    copies = figures["copies"]
    if copies["claims"] > MOST_CLAIMS * len(copies["speedups"]):
        told.append(
            f"{copies['claims']} of {len(copies['speedups'])} comparisons of copies claim a difference"
        )
    if copies["unstable"] > MOST_UNSTABLE * len(copies["speedups"]):
        told.append(f"{copies['unstable']} of {len(copies['speedups'])} comparisons of copies are unstable")
    return told


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    parts = []
    for state in ("quiet", "loaded"):
        ours, medians, loops = (worst(figures, state, key) for key in ("ours", "plain", "loop"))
        beside = f"plain medians {medians:.1%}, ratios of loops {loops:.1%}"
        parts.append(f"{state}: at most {ours:.2%} ({beside})")
    quiet, loaded = ([f[state] for f in figures["files"].values()] for state in ("quiet", "loaded"))
    counts = [(sum(map(flagged, found)), sum(map(sum, map(quietly, found)))) for found in (quiet, loaded)]
    made = sum(len(found["ours"]) for found in quiet)
    copies = figures["copies"]
    vain = sum(map(sum, (copies["restless"], *(f["quiet"]["restless"] for f in figures["files"].values()))))
    return (
        f"the variation of our ratio over fresh processes, {len(figures['files'])} files; "
        f"{'; '.join(parts)}, {counts[1][0]} of {counts[1][1]} flagged there and {counts[0][0]} of "
        f"{counts[0][1]} quiet ones, of {made}; {copies['claims']} of "
        f"{len(copies['speedups'])} comparisons of a file with its copy claim a difference, "
        f"{copies['unstable']} were unstable and claim nothing; {vain} rounds were made again, as others "
        "kept the machine busy"
    )


BENCHMARK = Benchmark("timing_repeatability", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument(
        "--measurements", type=int, default=20, metavar="N", help="of each file [default: 20]"
    )
    parser.add_argument("--comparisons", type=int, default=100, metavar="N", help="of copies [default: 100]")
    parser.add_argument(
        "--quick", action="store_true", help="two files, 3 measurements, 5 comparisons; stored apart"
    )
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
