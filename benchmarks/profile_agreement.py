"""`nestling profile` tells the latency that anybody's loop around ONNX Runtime finds.

Five timm networks at their 224 px, one thread. In turns, several times: `profile_file` on `ort:cpu` (what
`nestling profile` prints), and a plain loop around ONNX Runtime in a process that knows nothing of Nestling.
The medians over the rounds are compared. Where the package `openvino` is installed, OpenVINO's latency on
the same file stands beside them, and is not judged.

Claim: in every network the two agree within 5 %.

    python benchmarks/profile_agreement.py [--check] [--rounds 5] [--seconds 3] [--networks NAME ...]

Takes 4 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import Benchmark, Figures
from timing_repeatability import plain
from timm_files import NETWORKS, write_networks

from nestling.profile import connect, profile_file

PIXELS = 224
LIMIT = 0.05


def measure(options: argparse.Namespace) -> Figures:
    """Both figures of each network; prints a line for each."""
    devices = ["ort:cpu"] + (["openvino:cpu"] if importlib.util.find_spec("openvino") else [])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_networks(Path(folder), options.networks, pixels=PIXELS).items():
            taken: dict[str, list[float]] = {place: [] for place in [*devices, "loop"]}
            unstable = 0
            for _ in range(options.rounds):
                for address in devices:
                    with connect(address, seconds=options.seconds) as device:
                        measurement = profile_file(device, path).measurement
                    taken[address].append(measurement.latency_ms)
                    unstable += measurement.unstable and address == "ort:cpu"
                [calls] = plain(path, seconds=options.seconds)
                taken["loop"].append(statistics.median(calls))
            medians = {place: round(statistics.median(ms), 4) for place, ms in taken.items()}
            found[name] = {"milliseconds": medians, "rounds": options.rounds, "unstable": unstable}
            print(line(name, found[name]), flush=True)
    return {"networks": found}


def deviation(found: Figures) -> float:
    """How far ours is from the loop's, as a part of that."""
    return float(found["milliseconds"]["ort:cpu"] / found["milliseconds"]["loop"] - 1)


def line(name: str, found: Figures) -> str:
    """One network's line."""
    told = "  ".join(f"{place} {ms:8.3f} ms" for place, ms in found["milliseconds"].items())
    return f"{name:24} {told}  {deviation(found):+.2%}  ({found['unstable']} of {found['rounds']} unstable)"


def misses(figures: Figures) -> list[str]:
    """Which networks' figures do not agree."""
    return [
        f"{name}: ours differs from the loop's by {deviation(found):+.1%} (at most {LIMIT:.0%})"
        for name, found in figures["networks"].items()
        if not abs(deviation(found)) <= LIMIT
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    networks = figures["networks"]
    widest = max(networks, key=lambda name: abs(deviation(networks[name])))
    other = [
        f"{name} {found['milliseconds']['openvino:cpu'] / found['milliseconds']['ort:cpu']:.2f}"
        for name, found in networks.items()
        if "openvino:cpu" in found["milliseconds"]
    ]
    return (
        f"the latency of {len(networks)} timm networks is within {abs(deviation(networks[widest])):.2%} of "
        f"an independent loop's (at most {LIMIT:.0%}; {widest} is the furthest)"
        + (f"; OpenVINO takes, times ONNX Runtime's: {', '.join(other)}" if other else "")
    )


BENCHMARK = Benchmark("profile_agreement", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="[default: 5]")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of timing [default: 3]")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of timm")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
