"""The latencies of a front on a GPU by PyTorch: kernel by kernel, and as one replayed CUDA graph.

Every exported member of a finished run (for CIFAR-10: `nestling run configs/cifar10_cpu.toml`) is measured
in floats by `torch:cuda`, which captures a file as a CUDA graph and replays it, and by `torch:cuda?graph=0`,
which starts its kernels one by one; in turns, each time in a fresh process. Told are the medians of both, how
much the ratio to the reference model varies from process to process, and how many were flagged as unstable.

Claim: of each member and way the ratio varies by at most 2 % (coefficient of variation of what is not
flagged).

    python benchmarks/cuda_front.py RUN [--check] [--rounds 10] [--devices ADDRESS ...]

Needs a GPU, and a PyTorch for it. `--devices torch:cpu` tries the same without one, which tells nothing of
GPUs. Takes about 4 seconds for each member, round and device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from record import Benchmark, Figures
from timing_repeatability import used, variation

from nestling.profile import DeviceError, connect

DEVICES = ("torch:cuda", "torch:cuda?graph=0")
MOST = 0.02
FILES = ("model_fp32.onnx", "model.onnx")
"""Of a member's folder, the first that is there: in floats."""


def members(run: Path) -> dict[str, Path]:
    """Name -> file in floats, of every exported member of the front of `run`.

    Raises:
        SystemExit: there are none.
    """
    found = {card.parent.name: card.parent for card in sorted(run.glob("exports/*/card.json"))}
    if not found:
        raise SystemExit(f"{run} has no exported network; `nestling export {run}` makes them")
    return {
        name: next(filter(Path.exists, (folder / file for file in FILES))) for name, folder in found.items()
    }


def measure(options: argparse.Namespace) -> Figures:
    """All measurements of each member; prints a line for each."""
    if options.run is None:
        raise SystemExit("give the folder of a finished run")
    files = members(options.run)
    found: dict[str, Any] = {
        name: {address: {"ms": [], "ours": [], "flagged": []} for address in options.devices}
        for name in files
    }
    for _ in range(options.rounds):
        for name, path in files.items():
            for address in options.devices:
                with connect(address, seconds=options.seconds) as device:
                    taken = device.measure(path)
                one = found[name][address]
                one["ms"].append(taken.latency_ms)
                one["ours"].append(taken.ratio)
                one["flagged"].append(list(taken.unstable_because))
    for name, ways in found.items():
        print(name, *(line(address, way) for address, way in ways.items()), sep="  ", flush=True)
    return {"members": found}


def line(address: str, way: Figures) -> str:
    """One way of one member."""
    flagged = sum(map(bool, way["flagged"]))
    return (
        f"{address} {statistics.median(way['ms']):.4f} ms (ratio varies by {variation(used(way)):.2%}, "
        f"{flagged} of {len(way['ms'])} flagged)"
    )


def misses(figures: Figures) -> list[str]:
    """Whose ratio varies too much, or cannot be told."""
    return [
        f"{name} by {address}: the ratio varies by {variation(used(way)):.2%} (at most {MOST:.0%})"
        for name, ways in figures["members"].items()
        for address, way in ways.items()
        if not variation(used(way)) <= MOST
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    told = []
    for address in next(iter(figures["members"].values())):
        ways = [ways[address] for ways in figures["members"].values()]
        medians = [statistics.median(way["ms"]) for way in ways]
        widest = max(variation(used(way)) for way in ways)
        told.append(f"{address} {min(medians):.4f} to {max(medians):.4f} ms, varying by {widest:.2%} at most")
    return f"latencies of {len(figures['members'])} members: {'; '.join(told)}"


BENCHMARK = Benchmark("cuda_front", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a run whose front is exported")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="[default: 10]")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of timing [default: 2]")
    parser.add_argument("--devices", nargs="+", default=DEVICES, metavar="ADDRESS", help="of PyTorch")
    try:
        return BENCHMARK.run(parser.parse_args(words))
    except DeviceError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
