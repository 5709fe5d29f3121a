"""The worker with faults on purpose: run in the worker's place, it dies, hangs or runs out of memory.

    python device_faults_worker.py PLAN.json

The plan says which faults are still to come and how many requests lie between two of them; each fault that
happens is taken off it and told in it first, so that the next worker goes on with the plan.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nestling.profile import worker

LOADS = ("load", "optimized")
RUNS = ("time", "predict")
AT_START = ("SIGSEGV", "SIGKILL")
"""What befalls a worker while it says hello: twice in a row, and no candidate is to suffer from it."""
KINDS = ("SIGSEGV", "SIGKILL", "out of memory", "hang on load", "hang on run")
SAID = {
    "SIGSEGV": "SIGSEGV",
    "SIGKILL": "SIGKILL",
    "out of memory": "MemoryError",
    "hang on load": "no answer",
    "hang on run": "no answer",
}
"""What the recorded cause of each fault must say."""

Verb = Callable[[Mapping[str, Any], bytearray], tuple[dict[str, Any], bytes]]


def new_plan(path: Path, *, faults: int, starts: int, seed: int) -> None:
    """Writes a plan of so many faults, all kinds alike often, in random order, and of so many lost starts."""
    kinds = [KINDS[number % len(KINDS)] for number in range(faults)]
    random.Random(seed).shuffle(kinds)
    lost = [AT_START[number % len(AT_START)] for number in range(starts)]
    write_plan(
        path,
        {"seed": seed, "left": kinds, "wait": 9, "happened": []}
        | {"starts_left": lost, "start_wait": 0, "starts_lost": []},
    )


def read_plan(path: Path) -> dict[str, Any]:
    """The plan."""
    plan: dict[str, Any] = json.loads(path.read_text())
    return plan


def write_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Puts the plan in the place of what was there."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(plan))
    draft.replace(path)


def fault(verb: str, path: Path) -> str | None:
    """The fault that befalls the worker now, if any; the plan has been told."""
    plan = read_plan(path)
    if not plan["left"]:
        return None
    if plan["wait"] > 0:
        write_plan(path, {**plan, "wait": plan["wait"] - 1})
        return None
    impossible = "hang on run" if verb in LOADS else "hang on load"
    kind = next((kind for kind in plan["left"] if kind != impossible), None)
    if kind is None:
        return None
    plan["left"].remove(kind)
    plan["happened"].append({"kind": kind, "verb": verb})
    plan["wait"] = random.Random(f"{plan['seed']}/{len(plan['happened'])}").randrange(9)
    write_plan(path, plan)
    return str(kind)


def fault_at_start(path: Path) -> str | None:
    """The fault that befalls the worker while it says hello, if any; the plan has been told.

    It befalls the first worker and the next one, then two that start are let be.
    """
    plan = read_plan(path)
    if plan["start_wait"] > 0 or not plan["starts_left"]:
        write_plan(path, {**plan, "start_wait": max(0, plan["start_wait"] - 1)})
        return None
    kind = plan["starts_left"].pop(0)
    plan["starts_lost"].append(kind)
    write_plan(path, {**plan, "start_wait": 2 * (len(plan["starts_lost"]) % 2 == 0)})
    return str(kind)


def befall(kind: str) -> None:
    """Does to this process what `kind` says."""
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
    if kind == "out of memory":
        bytearray(1 << 46)  # more than any limit
    # As native code hangs: deaf to everything but the system's own alarm, which a worker has for this.
    while kind.startswith("hang"):
        time.sleep(1)


def faulty(verb: str, serve: Verb, path: Path) -> Verb:
    """`serve`, which a fault may befall first."""

    def served(request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        if request.get("model") != "reference" and (kind := fault(verb, path)) is not None:
            befall(kind)
        return serve(request, blob)

    return served


class FaultyWorker(worker.Worker):
    """The worker, whose hello, and whose verbs that load or run a candidate, go wrong as the plan says."""

    def __init__(self) -> None:
        super().__init__()
        path = Path(sys.argv[1])
        for verb in (*LOADS, *RUNS):
            self.verbs[verb] = faulty(verb, self.verbs[verb], path)
        hello = self.verbs["hello"]

        def faulty_hello(request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
            if (kind := fault_at_start(path)) is not None:
                befall(kind)
            return hello(request, blob)

        self.verbs["hello"] = faulty_hello


if __name__ == "__main__":
    worker.Worker = FaultyWorker  # type: ignore[misc]
    worker.main()
