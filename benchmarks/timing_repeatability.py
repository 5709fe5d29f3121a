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

Whether the machine is quiet without our busy loop is not ours to say: other tenants of a host slow its cores
by a third to a half. So a loop in plain Python is timed on every core before and after each round, and where
it took over 1.15 times its fastest time, others were at work. That is told; it is for `Device.measure` to
see it and flag what it spoils.

Claims, of the coefficient of variation of ours in each file, of the measurements that are not flagged:

1. Without a load of ours: at most 2 %, of 3 measurements at least; and at most 5 % are flagged of those
   during which nobody else was at work either.
2. Loaded: at most 4 % (where fewer than 3 are left, none is used).
3. At most 5 of 100 comparisons of a file with its copy claim a difference in what a user reads. Of one that
   is unstable nothing is claimed there, and at most a quarter are of those beside which nobody was at work.

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
CALIBRATIONS = 5
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


def calibrate(known: QuietTimes) -> None:
    """Times the reference model: so that the first measurement has something to go by."""
    with connect("ort:cpu", quiet=known) as device:
        device.calibrate(seconds=SECONDS)


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
    settings = {
        "names": names,
        "seconds": (SECONDS, LOOP_SECONDS, COMPARE_SECONDS),
        "claims": "beside a thermometer",
    }
    parts = Parts(BENCHMARK.name + "_quick" * options.quick, settings)
    states = {"quiet": None, "loaded": max(os.sched_getaffinity(0))}
    files: dict[str, Any] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        reference.write_bytes(reference_model())
        paths = write_networks(Path(folder), names, pixels=PIXELS)
        thermometer, known = Thermometer(), QuietTimes(Path(folder) / "devices.db")
        for _ in range(CALIBRATIONS):
            calibrate(known)
        for state, busy in states.items():
            with busy_core(busy):
                rounds: list[dict[str, Any]] = []
                for number in range(count):
                    rounds.append({})
                    for name, path in paths.items():
                        made = partial(thermometer.beside, partial(one_round, path, reference, known))
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
                    partial(thermometer.beside, partial(compare_with_copy, device, path)),
                )
                for number, path in enumerate(turns)
            ]
    parts.finish()
    copies: dict[str, Any] = {key: [one[key] for one in told] for key in ("speedup", "unstable", "quiet")}
    copies["speedups"] = copies.pop("speedup")
    copies |= {key: sum(one[key] for one in told) for key in ("claims", "differs")}
    return {"files": files, "copies": copies}


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
    lost = total = 0
    for name, states in figures["files"].items():
        quiet = states["quiet"]
        left = used(quiet)
        flags = [because for because, alone in zip(quiet["flagged"], quiet["quiet"], strict=True) if alone]
        total += len(flags)
        lost += sum(map(bool, flags))
        if len(left) < LEAST_LEFT or not variation(left) <= MOST_QUIET:
            told.append(f"{name}, quiet: {variation(left):.2%} of variation (at most {MOST_QUIET:.0%})")
        left = used(states["loaded"])
        if len(left) >= LEAST_LEFT and not variation(left) <= MOST_LOADED:
            told.append(f"{name}, loaded: {variation(left):.2%} of variation (at most {MOST_LOADED:.0%})")
    if total < LEAST_LEFT:
        told.append(
            f"others were at work in all but {total} of the quiet rounds: what is flagged there is not told"
        )
    if lost > MOST_FLAGGED * total:
        told.append(f"{lost} of {total} measurements of a quiet machine were flagged")
    copies = figures["copies"]
    if copies["claims"] > MOST_CLAIMS * len(copies["speedups"]):
        told.append(
            f"{copies['claims']} of {len(copies['speedups'])} comparisons of copies claim a difference"
        )
    alone = [one for one, quiet in zip(copies["unstable"], copies["quiet"], strict=True) if quiet]
    if len(alone) < LEAST_LEFT:
        told.append(
            f"others were at work in all but {len(alone)} of the comparisons: so with what is unstable"
        )
    if sum(alone) > MOST_UNSTABLE * len(alone):
        told.append(f"{sum(alone)} of {len(alone)} comparisons on a quiet machine are unstable")
    return told


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    parts = []
    for state in ("quiet", "loaded"):
        ours, medians, loops = (worst(figures, state, key) for key in ("ours", "plain", "loop"))
        beside = f"plain medians {medians:.1%}, ratios of loops {loops:.1%}"
        parts.append(f"{state}: at most {ours:.2%} ({beside})")
    quiet, loaded = ([f[state] for f in figures["files"].values()] for state in ("quiet", "loaded"))
    flags = [sum(sum(map(bool, one["flagged"])) for one in found) for found in (quiet, loaded)]
    several = sum(len(one["ours"]) for one in quiet)
    copies = figures["copies"]
    alone = sum(sum(one["quiet"]) for one in quiet)
    return (
        f"the variation of our ratio over fresh processes, {len(quiet)} files; {'; '.join(parts)}; "
        f"{flags[0]} and {flags[1]} of {several} flagged; others were at work in {several - alone} of the "
        f"quiet ones; {copies['claims']} of {len(copies['speedups'])} comparisons of a file with its copy "
        f"claim a difference, {sum(copies['unstable'])} were unstable and claim nothing"
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
