"""A candidate of a search, from arch to quantized, checked file and session, costs a fraction of a second.

For once-for-all's MobileNetV3 (width 1.0) and for every space in `search_spaces/`, at 64 px or their largest
resolution where that is less: random archs, w8a8 where the space does not choose precisions, go through the
pipeline's own `write_candidate`, and then through the device's worker, as in a search. Seconds by stage:

- materialize: the arch as a plain network with its own weights;
- recalibrate: batch normalization over `--recalibration` images; told apart, as it is part of scoring an
  arch in any precision;
- trace, split: the graph of operators, gates split where they are quantized;
- observe: ranges from `--calibration` images;
- to_onnx, insert_qdq, save: the file; insert_qdq is also the constants' integers;
- simulate: 16 images in PyTorch; cost: multiply-accumulates and parameters;
- session, predict: beside these, in the device's worker: the file loaded in the runtime, which layers are
  computed on integers there (where none is quantized, `predict` loads it), and the same 16 images; this
  session stays for what follows, timing included;
- compare: the ONNX checker, waiting for the worker, and logits.

The stages beside are told, but no part of a candidate's seconds: those who wait for them are. Every candidate
is of another network; `again` tells the seconds of one whose network is kept, as it is for another policy.

An arch that was measured while others kept the machine busy (see `thermometer.py`) is replaced by another, as
long as there is time for it: a whole run spends 10 minutes on that at most. Of those that are left, the quiet
ones make the median where they are a third or more; else all do. Either is told.

Claim: for once-for-all's space, all but recalibration takes at most 0.4 s at the median, on 2 cores.

Beside it, once: the path by `torch.onnx.export` and `onnxruntime.quantization`, for one arch of that space.

    python benchmarks/candidate_cost.py [--check] [--archs 12] [--threads 2] [--spaces NAME ...]

Takes 5 minutes on 2 idle cores, 15 where they are never idle. Images are the built-in digits, enlarged: what
they show costs nothing.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch
from arch_switch import JUDGED, SPACES
from lending_overhead import STAGES, ofa_space
from quant_speed import by_runtime, calm
from record import Benchmark, Figures, quartiles
from thermometer import Thermometer

from nestling.config import DataConfig, ProfileConfig, RunConfig, SearchConfig
from nestling.export import official_export
from nestling.pipeline import candidate, floats, verifying, writing
from nestling.pipeline.workbench import Workbench
from nestling.quant import quantizing
from nestling.run import Run
from nestling.space import Choice, SearchSpace
from nestling.space.files import load_space, save_space

MOST_SECONDS = 0.4
LEAST_QUIET = 1 / 3
"""Where a smaller part of a space's archs was measured on a quiet machine, all of them count."""
PIXELS = 64
APART = "recalibrate"
CLOCKED: tuple[tuple[ModuleType, str, str], ...] = (
    (candidate, "recalibrate", "recalibrate"),
    (floats, "trace", "trace"),
    (floats, "cost", "cost"),
    (quantizing, "split_gates", "split"),
    (quantizing, "statistics", "observe"),
    (quantizing, "collect", "observe"),
    (quantizing, "ranges", "observe"),
    (writing, "with_integers", "insert_qdq"),
    (writing, "to_onnx", "to_onnx"),
    (writing, "insert_qdq", "insert_qdq"),
    (writing, "with_metadata", "save"),
    (writing, "save_onnx", "save"),
    (verifying, "simulated", "simulate"),
    (verifying, "verify", "compare"),
    (verifying, "check_precisions", "session"),
)
"""Where `write_candidate` finds a function, its name -> the stage that its time is told under."""
STAGES_IN_ORDER = (
    "materialize", "recalibrate", "trace", "split", "observe", "to_onnx", "insert_qdq", "save", "simulate",
    "cost", "session", "predict", "compare", "rest",
)  # fmt: skip
BESIDE = ("session", "predict")
"""Stages in the device's worker, while the others go on."""


class Stopwatch:
    """Seconds by stage; of a stage inside another one of its thread, only the inner gets them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._own = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to the stage `name`."""
        inner: list[float] = vars(self._own).setdefault("inner", [0.0])
        inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - inner.pop()
            inner[-1] += taken

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, whose seconds are those of the stage `name`."""

        def clocked(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **named)

        return clocked


@contextmanager
def clocked(watch: Stopwatch, bench: Workbench) -> Iterator[None]:
    """The pipeline, with a stopwatch at each of its stages."""
    kept = [(module, name, vars(module)[name]) for module, name, _ in CLOCKED]
    device = bench.device
    real_predict = device.predict
    for module, name, stage in CLOCKED:
        setattr(module, name, watch.around(vars(module)[name], stage))
    device.predict = watch.around(real_predict, "predict")
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
        device.predict = real_predict


def quantized_everywhere(space: SearchSpace) -> SearchSpace:
    """`space`, every stage in w8a8."""
    names = ("stem", "head", "s1", *(f"s{stage}" for stage in range(2, len(STAGES) + 2)), "s7")
    return SearchSpace(
        space.family, (*space.choices, *(Choice(f"{name}.precision", ("w8a8",)) for name in names))
    )


def bench_of(space: SearchSpace, folder: Path, options: argparse.Namespace, *, pixels: int) -> Workbench:
    """A workbench for `space` whose supernet was never trained."""
    folder.mkdir(parents=True)
    save_space(space, folder / "given.toml")
    config = RunConfig(
        name="cost",
        space=str(folder / "given.toml"),
        torch_device="cpu",
        data=DataConfig(source="digits", size=pixels, search_images=100),
        search=SearchConfig(
            recalibration_images=options.recalibration, calibration_images=options.calibration
        ),
        profile=ProfileConfig(device="ort:cpu?threads=1"),
    )
    bench = Workbench(Run.create(folder / "run", config))
    bench.supernet = bench.new_supernet(pretrained=False).eval()
    calm(bench.supernet.largest)
    return bench


def spaces(names: list[str] | None) -> dict[str, tuple[SearchSpace, int]]:
    """Each space and its largest resolution: once-for-all's first, then those in files."""
    found = {JUDGED: (quantized_everywhere(ofa_space()), PIXELS)}
    for path in sorted(SPACES.glob("*.toml")):
        if names is None or path.stem in names:
            space = load_space(path)
            sides = [int(v) for c in space.choices if c.name == "resolution" for v in c.values]
            found[path.stem] = space, min(max(sides, default=PIXELS), PIXELS)
    return {name: (space.with_constants({"resolution": side}), side) for name, (space, side) in found.items()}


def seconds_of_one(bench: Workbench, rng: random.Random, path: Path) -> dict[str, float]:
    """Seconds by stage of one random arch, and `again`: of the same, its network being kept."""
    watch = Stopwatch()
    arch = bench.space.sample(rng)
    bench.floats.clear()
    gc.collect()
    supernet = bench.supernet
    with clocked(watch, bench), watch.stage("rest"):
        real = supernet.materialize
        supernet.materialize = watch.around(real, "materialize")
        try:
            candidate.write_candidate(bench, arch, path)
        finally:
            supernet.materialize = real
    began = time.perf_counter()
    candidate.write_candidate(bench, arch, path)
    return {**watch.seconds, "again": time.perf_counter() - began}


def peers_path(bench: Workbench, rng: random.Random, folder: Path) -> dict[str, float]:
    """Seconds of the same by PyTorch's exporter and ONNX Runtime's quantization tool, for one arch."""
    network = bench.supernet.materialize(bench.space.sample(rng)).eval()
    images = next(iter(bench.calibration_images(bench.data.size)))[:32]
    began = time.perf_counter()
    official_export(network, folder / "official.onnx", resolution=bench.data.size)
    exported = time.perf_counter()
    saturates = bench.device.fingerprint.int8_saturates
    by_runtime(folder / "official.onnx", folder / "theirs.onnx", images, reduce_range=saturates)
    onnx.checker.check_model(folder / "theirs.onnx")
    return {"torch.onnx.export": exported - began, "quantize_static": time.perf_counter() - exported}


def measure(options: argparse.Namespace) -> Figures:
    """Seconds by stage, of each arch of each space; prints a table."""
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    peers: dict[str, float] = {}
    thermometer = Thermometer()
    print(
        " " * 28
        + "".join(f"{stage:>13}" for stage in ("without rec.", "with rec.", "again", *STAGES_IN_ORDER)),
        flush=True,
    )
    for name, (space, pixels) in spaces(options.spaces).items():
        rng = random.Random(0)
        with tempfile.TemporaryDirectory() as folder:
            bench = bench_of(space, Path(folder) / name, options, pixels=pixels)
            try:
                path = Path(folder) / "candidate.onnx"
                seconds_of_one(bench, rng, path)  # what is made once
                rows = [
                    thermometer.quietly(partial(seconds_of_one, bench, rng, path))
                    for _ in range(options.archs)
                ]
                if name == JUDGED and options.peers:
                    peers = peers_path(bench, rng, Path(folder))
            finally:
                bench.close()
        found[name] = {
            "family": space.family,
            "pixels": pixels,
            "seconds": {stage: [round(row.get(stage, 0.0), 5) for row in rows] for stage in STAGES_IN_ORDER},
            "again": [round(row["again"], 5) for row in rows],
            "restless": [row["restless"] for row in rows],
            "quiet": [row["quiet"] for row in rows],
        }
        whole = [round(seconds, 5) for seconds in totals(found[name], recalibrated=True)]
        found[name]["with_recalibration"] = whole
        print(line(name, found[name]), flush=True)
    if peers:
        print(
            "by torch.onnx.export and quantize_static: "
            + ", ".join(f"{k} {v:.1f} s" for k, v in peers.items())
        )
    return {
        "threads": options.threads,
        "archs": options.archs,
        "calibration_images": options.calibration,
        "recalibration_images": options.recalibration,
        "spaces": found,
        "peers_seconds": {name: round(seconds, 3) for name, seconds in peers.items()},
    }


def totals(found: Any, *, recalibrated: bool = False) -> list[float]:
    """Seconds of each arch, all stages but those in the worker and, unless `recalibrated`, recalibration."""
    left = BESIDE if recalibrated else (APART, *BESIDE)
    stages = [values for stage, values in found["seconds"].items() if stage not in left]
    return [sum(row) for row in zip(*stages, strict=True)]


def counted(found: Any) -> list[bool]:
    """Whether each arch counts: those of a quiet machine where they are enough, else all."""
    quiet: list[bool] = found["quiet"]
    return quiet if sum(quiet) >= max(LEAST_QUIET * len(quiet), 2) else [True] * len(quiet)


def median(values: Sequence[float], found: Any) -> float:
    """The median of `values`, one for each arch of a space, over those that count."""
    return quartiles([value for value, counts in zip(values, counted(found), strict=True) if counts])[1]


def line(name: str, found: Any) -> str:
    """The medians of one space in milliseconds, and how the machine was."""
    medians = [
        median(totals(found), found),
        median(totals(found, recalibrated=True), found),
        median(found["again"], found),
        *(median(found["seconds"][stage], found) for stage in STAGES_IN_ORDER),
    ]
    return f"{name:28}" + "".join(f"{1e3 * value:13.1f}" for value in medians) + busy(found)


def busy(found: Any) -> str:
    """How many archs of a space were measured while others kept the machine busy; nothing where none was."""
    restless, several = len(found["quiet"]) - sum(found["quiet"]), len(found["quiet"])
    if not restless:
        return ""
    if all(counted(found)):
        return (
            f"; the machine was not quiet, {restless} of {several} archs were measured while others used it"
        )
    return f"; left out are {restless} of {several} archs, measured while others used the machine"


def median_seconds(figures: Figures, space: str = JUDGED) -> float:
    """The median seconds of a candidate of `space`, recalibration apart."""
    found = figures["spaces"][space]
    return median(totals(found), found)


def misses(figures: Figures) -> list[str]:
    """Whether a candidate of the judged space takes too long."""
    got = median_seconds(figures)
    return [] if got <= MOST_SECONDS else [f"a candidate takes {got:.2f} s, at most {MOST_SECONDS} s"]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    judged = figures["spaces"][JUDGED]
    whole, again = median(totals(judged, recalibrated=True), judged), median(judged["again"], judged)
    slowest = max(figures["spaces"], key=lambda name: median_seconds(figures, name))
    peers = sum(figures["peers_seconds"].values())
    beside = f"; by exporter and quantize_static {peers:.1f} s" if peers else ""
    of_all = (
        f"; of {len(figures['spaces'])} spaces, {slowest} takes longest: "
        f"{median_seconds(figures, slowest):.2f} s"
    )
    return (
        f"a candidate of once-for-all's space at {PIXELS} px takes {median_seconds(figures):.2f} s from arch "
        f"to quantized, checked file and session (at most {MOST_SECONDS}), recalibration apart "
        f"({whole:.2f} s with it), and {again:.2f} s for another policy of the same network{busy(judged)}"
        f"{beside}{of_all if len(figures['spaces']) > 1 else ''}"
    )


BENCHMARK = Benchmark("candidate_cost", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--archs", type=int, default=12, help="random archs of each space [default: 12]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument("--calibration", type=int, default=128, help="images for ranges [default: 128]")
    parser.add_argument(
        "--recalibration", type=int, default=1024, help="images for normalization [default: 1024]"
    )
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out the peers' path")
    parser.add_argument(
        "--spaces", nargs="*", metavar="NAME", help="beside once-for-all's [default: all in search_spaces/]"
    )
    options = parser.parse_args(words)
    if options.archs < 2:
        parser.error(f"--archs is {options.archs}; a median with its spread takes at least 2")
    known = {path.stem for path in SPACES.glob("*.toml")}
    unknown = sorted(set(options.spaces or ()) - known)
    if unknown:
        parser.error(f"no space {', '.join(unknown)} in search_spaces/; known: {', '.join(sorted(known))}")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
