"""A search on two boards takes little more than half of the time that it takes on one.

Claim: `nestling search --workers` on a pool of two boards takes at most 0.65 of the time of the same search
on one of them, and measures the same candidates.

A trained supernet on digits is searched twice by the command a user would give, by three processes each time,
so that there is always a candidate to measure: along the same random archs, each made, checked, timed and
scored as in any search. The boards are ssh servers on this machine, each in a network namespace and on a core
of its own, where that is permitted; else they listen on 127.0.0.1. The processes that search have those cores
too, as there are no others, and stand back behind the boards (`nice`).

What is halved is the time on boards, so that it must be most of the whole: `profile.seconds` is such that a
file is timed for seconds, while it is made in about one. Starting the processes is counted. A measurement
that is unstable is taken again, as in any search; how many were taken is told.

    python benchmarks/fleet.py [--check] [--quick] [--candidates 60]

About 12 minutes on two idle cores; with `--quick` three. Needs asyncssh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_faults import train
from kill_resume import copy_trained, stored_trials
from record import Benchmark, Figures

from nestling.profile.leases import LeaseQueue

MOST = 0.65
"""The time with two boards, as a part of that with one."""
INSIDE = "NESTLING_FLEET_NAMESPACE"
"""Set where this process runs in a network namespace that was made for it."""
WORKERS = 3
"""Processes that search: two whose candidates are timed, and one that makes the next."""
MEASURE_SECONDS = 6.0
TOLERANCE = 1e-9
"""Never reached: every candidate is timed for the whole of its seconds, with one board as with two."""
NICE = 10
"""How far the processes that search stand back behind the boards, whose cores they share."""
LIMIT_SECONDS = 3600.0
"""A search that takes longer is taken to hang."""


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


def searched(run: Path, work: Path, boards: Sequence[SshBoard], *, count: int, seed: int) -> dict[str, Any]:
    """What `nestling search` tells of `count` candidates that were measured on `boards`.

    Raises:
        SystemExit: it ends with an error, or not at all.
    """
    folder = copy_trained(run, work / f"with-{len(boards)}", objectives=["top1", "latency_ms"])
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["profile"] |= {
        "device": "pool:" + ",".join(board.device for board in boards),
        "seconds": MEASURE_SECONDS,
        "tolerance": TOLERANCE,
    }
    # no race: whether one is run depends on what is known by then
    config["search"] |= {"strategy": "random", "race": False, "trials": count}
    file.write_text(json.dumps({**config, "seed": seed}))
    words = ["nice", "-n", str(NICE), sys.executable, "-m", "nestling.cli", "search", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [*words, "--workers", str(WORKERS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"the search on {len(boards)} boards ended with {done.returncode}:\n{done.stderr}")
    trials = stored_trials(folder / "study.db")
    complete = {trial["arch"]: trial["metrics"] for trial in trials if trial["state"] == "complete"}
    tries = [one for one in LeaseQueue(folder / "leases.db").attempts() if one.outcome == "measured"]
    return {
        "seconds": round(seconds, 1),
        "failed": [trial["arch"] for trial in trials if trial["state"] == "failed"],
        "trials": len(trials),
        "complete": complete,
        "measured_files": len({one.file for one in tries}),
        "measurements": len(tries),
        "board_seconds": round(sum((one.ended or one.began) - one.began for one in tries), 1),
        "by_board": sorted(Counter(one.board for one in tries).values()),
        "unstable": sum(metrics["latency_unstable"] for metrics in complete.values()),
    }


def measure(options: argparse.Namespace) -> Figures:
    """The figures of a search with one board, and with two."""
    count = min(options.candidates, 12) if options.quick else options.candidates
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
    ways = {"one": one, "two": two}
    shared = one["complete"].keys() & two["complete"].keys()
    pairs = [(one["complete"][arch], two["complete"][arch]) for arch in sorted(shared)]
    apart = [abs(b["latency_ratio"] / a["latency_ratio"] - 1) for a, b in pairs]
    told = ("seconds", "trials", "measured_files", "measurements", "board_seconds", "unstable")
    return {
        "candidates": count,
        "namespaces": INSIDE in os.environ,
        **{name: {way: found[name] for way, found in ways.items()} for name in told},
        "part": round(two["seconds"] / one["seconds"], 3),
        "measured": {way: len(found["complete"]) for way, found in ways.items()},
        "same_files": one["complete"].keys() == two["complete"].keys(),
        "same_accuracy": all(a["top1"] == b["top1"] for a, b in pairs),
        "failed": [*one["failed"], *two["failed"]],
        "by_board": two["by_board"],
        "ratios_differ": {
            "median": round(statistics.median(apart), 4) if apart else None,
            "most": round(max(apart, default=0.0), 4),
        },
    }


def misses(figures: Figures) -> list[str]:
    """What is not good enough."""
    found = []
    if figures["part"] > MOST:
        found.append(f"two boards took {figures['part']} of the time of one; the limit is {MOST}")
    if not (figures["same_files"] and figures["same_accuracy"]):
        found.append("other candidates were measured with two boards than with one")
    if figures["failed"]:
        found.append(f"{len(figures['failed'])} candidates failed: {figures['failed'][0]}")
    for way in ("one", "two"):
        for name in ("measured", "measured_files", "trials"):
            if figures[name][way] != figures["candidates"]:
                found.append(
                    f"{figures[name][way]} {name.replace('_', ' ')} of {figures['candidates']}, {way}"
                )
    if len(figures["by_board"]) != 2:
        found.append(f"two boards were to share the work; they measured {figures['by_board']}")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    same = "the same" if figures["same_files"] else "OTHER"
    where = "network namespaces" if figures["namespaces"] else "127.0.0.1"
    seconds, taken = figures["seconds"], figures["measurements"]
    return (
        f"`nestling search --workers {WORKERS}` on two ssh boards ({where}) took {figures['part']:.2f} of "
        f"the time on one for {figures['candidates']} candidates ({seconds['two']:.0f} and "
        f"{seconds['one']:.0f} s, {taken['two']} and {taken['one']} measurements), {same} candidates "
        "measured; ratios differ by "
        f"{figures['ratios_differ']['median']:.1%} (median)"
    )


BENCHMARK = Benchmark("fleet", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--quick", action="store_true", help="12 candidates at most; stored apart")
    parser.add_argument(
        "--candidates", type=int, default=60, metavar="N", help="of each search [default: 60]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the plan [default: 0]")
    options = parser.parse_args(words)
    if not options.stored and (code := own_network(sys.argv[1:] if words is None else words)) is not None:
        return code
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
