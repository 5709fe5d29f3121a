"""Latencies of networks that were not measured are predicted well enough to leave candidates out of a search.

Networks of `search_spaces/mobilenet_cifar_small.toml`, with its resolutions and precisions, spread over the
logarithm of their multiply-accumulates, are measured as a search measures them (one thread of ONNX Runtime,
beside the reference model; what stays unstable is left out); and each of their blocks alone. Weights are
random: latency does not depend on them. Then latencies of networks that were left out are told by

- model: `nestling.profile.prediction`, as `nestling latency` fits it;
- table: the sum of the latencies of the blocks, with overheads, as once-for-all has it;
- macs: a constant and a factor of the multiply-accumulates.

Figures are the mean absolute error in percent (MAPE) and Kendall's tau, once by five folds of all networks,
and once learnt from 25, 50, 100 and 200 random ones and judged on all others, the mean of `REPEATS` draws.
All ways are judged on the networks that all of them can tell; how many one cannot is printed. The model is
judged alone on all that it can tell besides.

Claim: by folds the model tells every network, and its tau over all of them is at least 0.95.

The table of all measurements is stored beside the figures, in `results/predictor_measured.json`, and an
interrupted measuring is continued from it. `--refit` measures nothing: it fits today's model to that table.

    python benchmarks/predictor.py [--check] [--refit] [--networks 300] [--seconds 1.5] [--passes 2] [--quick]

Takes 25 minutes on two idle cores, an hour on a busy host; with --quick, 60 networks, and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, UNFINISHED, Benchmark, Figures, place, store

from nestling.export import ExportMismatch
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import Family, family
from nestling.pipeline.latency import block_signatures, description
from nestling.pipeline.untrained import measure_blocks, measure_network
from nestling.profile import Device, DeviceError, connect
from nestling.profile.held_out import Learner, Quality, by_macs, by_model, by_table, held_out, qualities
from nestling.profile.prediction import LEAST
from nestling.quant import Unquantizable
from nestling.search import EvaluationFailed
from nestling.space import Arch, SearchSpace, load_space
from nestling.space.sampling import stratified

SPACE = Path(__file__).parents[1] / "search_spaces" / "mobilenet_cifar_small.toml"
MEASURED = "predictor_measured.json"
DEVICE = "ort:cpu?threads=1"
LEAST_TAU = 0.95
SIZES = (25, 50, 100, 200)
REPEATS = 5
BLOCK_SECONDS = 0.5
"""The longest that a block is timed: there are many."""
LEAST_LEFT = 20
"""Networks that are left to judge on, or the size is not tried."""
FEWEST = 2 * LEAST
"""Networks to learn from and judge on at all."""
WAYS = ("model", "table", "macs")


def cifar() -> tuple[SearchSpace, Family]:
    """The space, with ten classes, and its family."""
    space = load_space(SPACE).with_constants({"classes": 10})
    return space, family(space.family)


def spread(space: SearchSpace, build: Family, count: int) -> list[Arch]:
    """About `count` archs, spread over the logarithm of their multiply-accumulates, in random order."""

    @cache
    def macs(arch: Arch) -> int:
        return cost(build_shapes(build.build, arch), arch.integer("resolution")).macs

    smallest = macs(space.smallest)
    archs = stratified(space, lambda arch: 1 + math.log(macs(arch) / smallest), count)
    # shuffled: what is measured first and last is then not what is cheap and dear
    return [archs[index] for index in np.random.default_rng(0).permutation(len(archs))]


def measured(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All measurements; continues those in `path`, where they are of this device.

    Networks come first, and those that stayed unstable again at the end of each pass: what made them so may
    have passed. Then come the blocks of the networks that are judged.
    """
    space, build = cifar()
    archs = spread(space, build, options.networks)
    with connect(DEVICE, seconds=options.seconds) as device:
        key = device.fingerprint.key
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if found.get("device") != key:
            found = {"device": key, "told": str(device.fingerprint), "networks": {}, "blocks": {}}
            found |= {"refused": {}, "unstable": [], **place()}
        for number in range(1, options.passes + 1):
            left = [
                arch for arch in archs if arch.key not in found["networks"].keys() | found["refused"].keys()
            ]
            for place_in_pass, arch in enumerate(left, 1):
                told = measure_one(device, build, arch, found)
                store(path, found)
                print(f"pass {number}, {place_in_pass} of {len(left)}: {arch.key} {told}", flush=True)
    judged_archs = [arch for arch in archs if arch.key in found["networks"]]
    with connect(DEVICE, seconds=min(options.seconds, BLOCK_SECONDS)) as device:
        for number, arch in enumerate(judged_archs, 1):
            try:
                parts = measure_blocks(device, build, arch, keep={}, known=found["blocks"], pauses=())
            except (DeviceError, EvaluationFailed, Unquantizable) as error:  # the table cannot tell this one
                print(f"blocks of {number} of {len(judged_archs)}: {error}", flush=True)
                continue
            found["blocks"] |= {signature: one.ratio for signature, one in parts.items()}
            restless = {signature for signature, one in parts.items() if one.unstable}
            found["unstable_blocks"] = sorted({*found.get("unstable_blocks", ()), *restless})
            if parts:
                store(path, found)
                print(f"blocks of {number} of {len(judged_archs)}: {len(parts)} new", flush=True)
    return found


def measure_one(device: Device, build: Family, arch: Arch, found: dict[str, Any]) -> str:
    """Measures a network and puts it into `found`; in words, how that went."""
    try:
        taken = measure_network(device, build, arch, keep={}, pauses=())
    except (DeviceError, EvaluationFailed, ExportMismatch) as error:
        found["refused"][arch.key] = str(error)
        return f"refused: {error}"
    if taken.unstable:
        found["unstable"].append(arch.key)
        return f"{taken.ratio:.3f}, unstable"
    found["networks"][arch.key] = {
        "decisions": dict(arch),
        "ratio": taken.ratio,
        "noise": taken.ratio_noise,
    }
    return f"{taken.ratio:.3f}"


def learners(found: Figures) -> tuple[dict[str, Learner], list[float]]:
    """The ways to tell latencies, and the ratios that were measured."""
    if len(found["networks"]) < FEWEST:
        raise SystemExit(
            f"only {len(found['networks'])} measurements were stable and {FEWEST} are needed; is the machine "
            "busy? The same command measures the others"
        )
    space, build = cifar()
    rows = found["networks"].values()
    archs = [space.canonical(row["decisions"]) for row in rows]
    ratios = [float(row["ratio"]) for row in rows]
    described = [description(build, arch, keep={}) for arch in archs]
    networks = [block_signatures(build, arch, keep={}) for arch in archs]
    macs = [cost(build_shapes(build.build, arch), arch.integer("resolution")).macs for arch in archs]
    return {
        "model": by_model(described, ratios, noises=[row.get("noise") for row in rows]),
        "table": by_table(found["blocks"], networks, ratios),
        "macs": by_macs(macs, ratios),
    }, ratios


def judged(found: Figures) -> dict[str, Any]:
    """The figures of all ways, by folds and by size."""
    ways, ratios = learners(found)
    told = {name: held_out(len(ratios), learn) for name, learn in ways.items()}
    by_folds = {name: asdict(found) for name, found in qualities(told, ratios).items()}
    [alone] = qualities({"model": told["model"]}, ratios).values()
    sizes = {str(size): of_size(ways, ratios, size) for size in SIZES if len(ratios) - size >= LEAST_LEFT}
    return {
        "networks": len(ratios),
        "blocks": len(found["blocks"]),
        "unstable_blocks": len(found.get("unstable_blocks", ())),
        "unstable": len(set(found["unstable"]) - found["networks"].keys()),
        "refused": len(found["refused"]),
        "fastest_and_slowest": [min(ratios), max(ratios)],
        "device": found["told"],
        "measured": found["date"],
        "folds": by_folds,
        "model_alone": asdict(alone),
        "sizes": sizes,
    }


def of_size(ways: Mapping[str, Learner], ratios: Sequence[float], size: int) -> dict[str, dict[str, float]]:
    """Each way's mean figures of what is learnt from `size` random networks, on others that all can tell."""
    drawn: list[dict[str, Quality]] = []
    for seed in range(REPEATS):
        order = np.random.default_rng(seed).permutation(len(ratios)).tolist()
        known, asked = order[:size], order[size:]
        told = {name: learn(known, asked) for name, learn in ways.items()}
        drawn.append(qualities(told, [ratios[index] for index in asked]))
    return {
        name: {
            "mape": float(np.mean([one[name].mape for one in drawn])),
            "tau": float(np.mean([one[name].tau for one in drawn])),
            "told": float(np.mean([one[name].told for one in drawn])),
        }
        for name in ways
    }


def measure(options: argparse.Namespace) -> Figures:
    """Measures, unless it is to fit anew alone, and judges; prints a line for each size and way."""
    path = options.measured
    found = json.loads(path.read_text()) if options.refit else measured(options, path)
    figures = judged(found)
    for name in WAYS:
        print(line("5 folds", name, figures["folds"][name]), flush=True)
        if untold := figures["networks"] - figures["folds"][name]["told"]:
            print(f"{name} cannot tell {untold} of {figures['networks']}; all are judged on the others")
    for size, told in figures["sizes"].items():
        for name in WAYS:
            print(line(f"{size} networks", name, told[name]), flush=True)
    return figures


def line(learnt: str, name: str, told: Mapping[str, float]) -> str:
    """One way's figures."""
    return f"{learnt:12} {name:6} MAPE {told['mape']:7.2%}  tau {told['tau']:.3f}"


def misses(figures: Figures) -> list[str]:
    """What is not as claimed."""
    alone, networks = figures["model_alone"], figures["networks"]
    judged = {f"all {alone['told']} that it tells": alone["tau"]}
    judged["those that all ways tell"] = figures["folds"]["model"]["tau"]
    found = [
        f"the model's tau over {of} is {tau:.3f} (at least {LEAST_TAU})"
        for of, tau in judged.items()
        if not tau >= LEAST_TAU  # nan is none
    ]
    if alone["told"] < networks:
        found.append(f"the model cannot tell {networks - alone['told']} of {networks} networks")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    parts = [
        f"{name} {figures['folds'][name]['mape']:.1%} and {figures['folds'][name]['tau']:.3f}"
        for name in WAYS
    ]
    fewest = next(iter(figures["sizes"].items()), None)
    untold = figures["networks"] - figures["folds"]["table"]["told"]
    alone = figures["model_alone"]
    beside = (
        f" ({untold} that the table cannot tell left out; the model on all {alone['told']} that it tells "
        f"{alone['mape']:.1%} and {alone['tau']:.3f})"
        if untold
        else ""
    )
    few = "" if fewest is None else f"; the model of {fewest[0]} networks {fewest[1]['model']['tau']:.3f}"
    return (
        f"{figures['networks']} measured networks of {SPACE.stem}, held out by folds, mean error and "
        f"Kendall's tau: {', '.join(parts)}{beside}{few}"
    )


BENCHMARK = Benchmark("predictor", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--networks", type=int, default=300, metavar="N", help="measured [default: 300]")
    parser.add_argument(
        "--seconds", type=float, default=1.5, metavar="S", help="the longest that one is timed [default: 1.5]"
    )
    parser.add_argument(
        "--passes", type=int, default=2, metavar="N", help="tries of what stays unstable [default: 2]"
    )
    parser.add_argument("--quick", action="store_true", help="60 networks; stored apart")
    parser.add_argument("--refit", action="store_true", help="measure nothing: fit what was measured anew")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help=f"where measurements are kept [default: benchmarks/results/{MEASURED}; with --quick in build]",
    )
    options = parser.parse_args(words)
    if options.quick:
        options.networks = min(options.networks, 60)
    options.measured = options.measured or (UNFINISHED if options.quick else RESULTS) / MEASURED
    if options.refit and not options.measured.exists():
        print(f"there is no {options.measured}; run the benchmark without --refit first", file=sys.stderr)
        return 1
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
