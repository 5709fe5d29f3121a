"""A plain loop around ONNX Runtime, as one writes it: the peer that the benchmarks of latency start.

Prints the median of the milliseconds of a call, on one thread and one input of random numbers. With `--calls`
that many calls are timed after three others; with `--seconds` all calls of that time after one other, as
onnxruntime_perf_test does. Knows nothing of Nestling.

    python benchmarks/plain_timing.py FILE [--calls 50 | --seconds 1.5] [--core 0]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np
import onnxruntime


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="an ONNX file with one input")
    parser.add_argument("--calls", type=int, help="how many calls are timed")
    parser.add_argument("--seconds", type=float, default=1.5, help="or for how long [default: 1.5]")
    parser.add_argument("--core", type=int, help="the core to keep to [default: any]")
    options = parser.parse_args(words)
    if options.core is not None:
        os.sched_setaffinity(0, [options.core])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(options.file, settings, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    feed = {given.name: np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)}
    for _ in range(1 if options.calls is None else 3):
        session.run(None, feed)
    taken = []
    end = time.perf_counter() + options.seconds
    while len(taken) < options.calls if options.calls is not None else time.perf_counter() < end:
        begun = time.perf_counter()
        session.run(None, feed)
        taken.append(time.perf_counter() - begun)
    print(statistics.median(taken) * 1e3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
