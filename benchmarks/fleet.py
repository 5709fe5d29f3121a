"""Two boards halve the time that candidates wait for their latency.

Claim: two boards take at most 0.65 of the time of one, and measure the same files, each once.

A trained supernet on digits is searched along a fixed plan of archs, with one board and then with two: every
candidate is materialized, quantized, written, checked, scored and timed as in any search. The boards are ssh
servers on this machine, each in a network namespace and on a core of its own, where that is permitted; else
they listen on 127.0.0.1. While boards are timing, the next candidate is made.

Beside that it is told how far the ratios to the reference model agree.

    python benchmarks/fleet.py [--check] [--quick]

About 8 minutes on two idle cores; with `--quick` two. Needs asyncssh.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_faults import train
from kill_resume import copy_trained
from record import Benchmark, Figures

from nestling.pipeline import open_run
from nestling.pipeline.candidate import score, write_candidate
from nestling.profile import DevicePool, Measurement, WorkerDevice
from nestling.profile.address import parse_address
from nestling.profile.leases import LeaseQueue
from nestling.profile.transport_ssh import SshProcess
from nestling.search import EvaluationFailed
from nestling.space import Arch

MOST = 0.65
"""The time with two boards, as a part of that with one."""
INSIDE = "NESTLING_FLEET_NAMESPACE"
"""Set where this process runs in a network namespace that was made for it."""
MEASURE_SECONDS = 2.0
TOLERANCE = 1e-9
"""Never reached: every candidate is timed for the whole of its seconds, with one board as with two."""
SPREAD = 9.0
"""The boards share a machine, so how fast each is says nothing here."""


@dataclass(frozen=True, slots=True)
class SshBoard:
    """An ssh server that was started; `device` is the address of its device."""

    host: str
    port: int

    @property
    def device(self) -> str:
        """Its device, with this process's Python."""
        return f"ssh://{self.host}:{self.port}/ort:cpu?python={sys.executable}"


def own_network(words: Sequence[str]) -> int | None:
    """The exit code of this program, run again in a network of its own; None where that is not permitted."""
    if INSIDE in os.environ:
        return None
    tried = subprocess.run(
        ["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        return None
    again = ["unshare", "-n", sys.executable, __file__, *words]
    return subprocess.run(again, env={**os.environ, INSIDE: "1"}, check=False).returncode


@contextlib.contextmanager
def board(home: Path, number: int) -> Iterator[SshBoard]:
    """An ssh server on a core of its own and, where this process has its own network, in a namespace."""
    cores = sorted(os.sched_getaffinity(0))
    apart = INSIDE in os.environ
    host = f"10.77.{number}.2" if apart else "127.0.0.1"
    serve = f'exec taskset -c {cores[number % len(cores)]} "$0" "$@"'
    if apart:
        join = f"ip link set lo up && ip addr add {host}/24 dev eth0 && ip link set eth0 up && "
        command = ["unshare", "-n", "sh", "-c", "echo ready; read -r go; " + join + serve]
    else:
        command = ["sh", "-c", serve]
    script = Path(__file__).with_name("loopback.py")
    command += [
        sys.executable,
        str(script),
        str(home),
        "--host",
        host,
        "--temporary",
        str(home / str(number)),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        if apart:
            server.stdout.readline()
            wire(server.pid, number)
            server.stdin.write("go\n")
            server.stdin.flush()
        yield SshBoard(host, int(server.stdout.readline()))
        server.stdin.close()


def wire(pid: int, number: int) -> None:
    """Leads a line from this process's network into that of the process `pid`."""
    ours = f"board{number}"
    peer = ["peer", "name", "eth0", "netns", str(pid)]
    for words in (
        ["link", "add", ours, "type", "veth", *peer],
        ["addr", "add", f"10.77.{number}.1/24", "dev", ours],
        ["link", "set", ours, "up"],
    ):
        subprocess.run(["ip", *words], check=True)


def plan(bench: Any, count: int, *, seed: int) -> list[Arch]:
    """The archs that are evaluated: the smallest, the largest, and random ones."""
    rng = random.Random(seed)
    archs = [bench.space.smallest, bench.space.largest]
    while len(archs) < count:
        arch = bench.space.sample(rng)
        if arch not in archs:
            archs.append(arch)
    return archs


def searched(run: Path, work: Path, boards: Sequence[SshBoard], *, count: int, seed: int) -> dict[str, Any]:
    """What a search along the plan tells, measured on `boards`."""
    folder = copy_trained(run, work / f"with-{len(boards)}", objectives=["top1", "latency_ms"])
    bench = open_run(folder)
    queue = LeaseQueue(folder / "leases.db")
    addresses = [parse_address(one.device) for one in boards]
    devices = []
    for address in addresses:
        assert address.place is not None
        devices.append(
            WorkerDevice(
                address,
                transport=SshProcess(address.place),  # type: ignore[arg-type]
                seconds=MEASURE_SECONDS,
                tolerance=TOLERANCE,
                timeout_seconds=60,
            )
        )
    bench.device = DevicePool(devices, name="pool:fleet", device="pool:ort:cpu", queue=queue, spread=SPREAD)
    archs = plan(bench, count, seed=seed)
    waiting: dict[str, Future[Measurement]] = {}
    accuracy: dict[str, float] = {}
    failed: list[str] = []
    try:
        _ = bench.device.fingerprint, bench.supernet, bench.data  # made once, in no search's time
        with ThreadPoolExecutor(len(boards)) as threads:
            began = time.monotonic()
            for arch in archs:
                path = bench.candidate_path(arch)
                try:
                    candidate = write_candidate(bench, arch, path)
                    accuracy[arch.key] = score(
                        bench.device, path, bench.data.search, resolution=candidate.resolution
                    ).top1
                except EvaluationFailed as error:
                    failed.append(f"{arch.key}: {error}")
                    continue
                waiting[arch.key] = threads.submit(bench.device.measure, path)
            taken = {key: future.result() for key, future in waiting.items()}
            seconds = time.monotonic() - began
    finally:
        bench.close()
    attempts = queue.attempts()
    return {
        "seconds": round(seconds, 1),
        "failed": failed,
        "accuracy": accuracy,
        "ratios": {key: measurement.ratio for key, measurement in taken.items()},
        "unstable": sum(measurement.unstable for measurement in taken.values()),
        "counted": dict(Counter(attempt.file for attempt in attempts if attempt.outcome == "measured")),
        "by_board": sorted(Counter(a.board for a in attempts if a.outcome == "measured").values()),
    }


def measure(options: argparse.Namespace) -> Figures:
    """The figures of a search with one board, and with two."""
    count = 12 if options.quick else 60
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        run = train(work, trials=count)
        home = work / "home"
        home.mkdir()
        os.environ["HOME"] = str(home)
        os.environ.pop("SSH_AUTH_SOCK", None)
        boards = [stack.enter_context(board(home, number)) for number in range(2)]
        one = searched(run, work, boards[:1], count=count, seed=options.seed)
        two = searched(run, work, boards, count=count, seed=options.seed)
    shared = one["ratios"].keys() & two["ratios"].keys()
    apart = [abs(two["ratios"][key] / one["ratios"][key] - 1) for key in shared]
    return {
        "candidates": count,
        "namespaces": INSIDE in os.environ,
        "seconds": {"one": one["seconds"], "two": two["seconds"]},
        "part": round(two["seconds"] / one["seconds"], 3),
        "measured": {"one": len(one["ratios"]), "two": len(two["ratios"])},
        "same_files": one["counted"].keys() == two["counted"].keys(),
        "same_accuracy": one["accuracy"] == two["accuracy"],
        "counted_twice": sum(n > 1 for way in (one, two) for n in way["counted"].values()),
        "failed": [*one["failed"], *two["failed"]],
        "by_board": two["by_board"],
        "unstable": {"one": one["unstable"], "two": two["unstable"]},
        "ratios_differ": {"median": round(statistics.median(apart), 4), "most": round(max(apart), 4)},
    }


def misses(figures: Figures) -> list[str]:
    """What is not good enough."""
    found = []
    if figures["part"] > MOST:
        found.append(f"two boards took {figures['part']} of the time of one; the limit is {MOST}")
    if not (figures["same_files"] and figures["same_accuracy"]):
        found.append("other candidates were measured with two boards than with one")
    if figures["counted_twice"]:
        found.append(f"{figures['counted_twice']} files were counted twice")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    same = "the same" if figures["same_files"] else "OTHER"
    where = "network namespaces" if figures["namespaces"] else "127.0.0.1"
    return (
        f"two ssh boards ({where}) took {figures['part']:.2f} of the time of one for {figures['candidates']} "
        f"candidates ({figures['seconds']['two']:.0f} and {figures['seconds']['one']:.0f} s), {same} files "
        f"measured; ratios differ by {figures['ratios_differ']['median']:.1%} (median)"
    )


BENCHMARK = Benchmark("fleet", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--quick", action="store_true", help="12 candidates instead of 60; stored apart")
    parser.add_argument("--seed", type=int, default=0, help="of the plan [default: 0]")
    options = parser.parse_args(words)
    if not options.stored and (code := own_network(sys.argv[1:] if words is None else words)) is not None:
        return code
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
