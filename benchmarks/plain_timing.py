"""A plain loop around ONNX Runtime, as one writes it: the peer that the benchmarks of latency start.

Times every file, one after the other, on one thread and one input of random numbers, as onnxruntime_perf_test
does: all calls of some seconds, `--calls` at least, after one that is not timed. Prints a line for each file:
the milliseconds of all its calls as a JSON list. Knows nothing of Nestling.

    python benchmarks/plain_timing.py FILE ... [--seconds 1.5] [--calls 1] [--core 0]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np
import onnxruntime


def timed(file: str, *, seconds: float, calls: int) -> list[float]:
    """The milliseconds of each call."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    feed = {given.name: np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)}
    session.run(None, feed)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < calls:
        begun = time.perf_counter()
        session.run(None, feed)
        taken.append((time.perf_counter() - begun) * 1e3)
    return taken


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="an ONNX file with one input")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each file [default: 1.5]")
    parser.add_argument("--calls", type=int, default=1, help="that are timed at least [default: 1]")
    parser.add_argument("--core", type=int, help="the core to keep to [default: any]")
    options = parser.parse_args(words)
    if options.core is not None:
        os.sched_setaffinity(0, [options.core])
    for file in options.files:
        print(json.dumps(timed(file, seconds=options.seconds, calls=options.calls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
