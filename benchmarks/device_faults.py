"""Whatever befalls a worker, a line or the search: nothing is lost, doubled, or read that should not be.

Claims:

1. Faults are injected into the worker in a real search on digits: SIGSEGV, SIGKILL, no memory, hangs while
   loading and while running. Each fails one candidate, whose trial says why; the search goes on to its end.
   Workers that are lost while they start, twice in a row, fail none.
2. Lines to three boards (ssh servers on this machine) are cut while a pool measures: each file is measured
   once, and the time is told beside that of a run whose lines are not cut.
3. Hostile and mutated ONNX files are measured one after another: no file is read, made or changed outside,
   none outlives its limit, none but endless ones costs a worker, each refusal says why, and an ordinary file
   is measured afterwards.
4. A search on a pool is killed with SIGKILL at random moments and continued: no trial is lost or doubled,
   none has failed because of the kills, no lease is left, no worker outlives it.

    python benchmarks/device_faults.py [--check] [--quick] [--only faults cuts files kills]

About 20 minutes on two idle cores; with `--quick` (a tenth of everything) four. Needs asyncssh.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from device_faults_files import REFUSED, files, may_be_ended
from device_faults_worker import SAID, new_plan, read_plan
from kill_resume import (
    account_of,
    copy_trained,
    integrity,
    look_at_search,
    random_moments,
    searching,
    stored_trials,
    training,
)
from killing import run_killed
from record import Benchmark, Figures
from watching import Watch

from nestling.pipeline import Silent, open_run, search_supernet
from nestling.profile import (
    DeviceError,
    DevicePool,
    Measurement,
    MeasurementStore,
    WorkerDevice,
    WorkerLostError,
)
from nestling.profile.address import parse_address
from nestling.profile.leases import Attempt, LeaseQueue
from nestling.profile.quiet import QuietTimes
from nestling.profile.transport_local import LocalProcess
from nestling.search import Trial
from nestling.search.lost import LOST

PARTS = ("faults", "cuts", "files", "kills")
FULL = {
    "faults": 100, "starts": 20, "cuts": 20, "files": 1000, "kills": 50, "trials": 150, "killed": 30,
    "measured": 120,
}  # fmt: skip
QUICK = {
    "faults": 10, "starts": 4, "cuts": 3, "files": 130, "kills": 4, "trials": 24, "killed": 10,
    "measured": 36,
}  # fmt: skip
HANG_SECONDS = 4.0
"""What a call of the device may take where hangs are injected, and for a hostile file."""
MEMORY_MB = 4096
SETTINGS: dict[str, float | str] = {
    "search.objectives": json.dumps(["top1", "latency_ms"]),
    "train.epochs": 2,
    "train.ramp_epochs": 1,
    "search.population": 8,
    "search.recalibration_images": 128,
    "search.calibration_images": 32,
    "profile.seconds": 0.1,
}
SLOWEST = 1.5
"""How many times as long as without cuts a pool may take."""


def train(work: Path, *, trials: int) -> Path:
    """A run that was trained a little."""
    run = work / "trained"
    training(
        run, [f"--set={key}={value}" for key, value in {**SETTINGS, "search.trials": trials}.items()]
    ).finish()
    return run


def faulty_search(run: Path, work: Path, *, faults: int, starts: int, seed: int) -> dict[str, Any]:
    """What a search tells of which the worker suffered `faults`, and was lost in so many of its `starts`."""
    folder, plan = work / "faulty", work / "plan.json"
    copy_trained(run, folder, objectives=["top1", "latency_ms"])
    new_plan(plan, faults=faults, starts=starts, seed=seed)
    script = Path(__file__).with_name("device_faults_worker.py")
    bench = open_run(folder)
    bench.device = WorkerDevice(
        parse_address(f"ort:cpu?memory={MEMORY_MB}M"),
        transport=LocalProcess((sys.executable, str(script), str(plan))),
        seconds=bench.config.profile.seconds,
        tolerance=bench.config.profile.tolerance,
        timeout_seconds=HANG_SECONDS,
        store=MeasurementStore(folder / "measurements.db"),
        quiet=QuietTimes(folder / "devices.db"),
    )
    began = time.monotonic()
    try:
        result = search_supernet(bench, listener=Silent())
    finally:
        bench.close()
    told = read_plan(plan)
    happened = told["happened"]
    failed = [trial for trial in result.trials if trial.state == "failed"]
    unexplained = [
        f"trial {trial.number}, {fault['kind']} during {fault['verb']}: {trial.reason}"
        for fault, trial in zip(happened, failed, strict=False)
        if SAID[fault["kind"]] not in trial.reason
    ]
    evaluated = [trial for trial in result.trials if trial.state != "duplicate"]
    complete = [trial for trial in evaluated if trial.state == "complete"]
    return {
        "injected": dict(Counter(fault["kind"] for fault in happened)),
        "starts_lost": dict(Counter(told["starts_lost"])),
        "failed_trials": len(failed),
        "unexplained": unexplained,
        "failed_without_cause": sum(not trial.reason for trial in failed),
        "complete_trials": len(complete),
        "front": len(result.front),
        "doubled": len(evaluated) - len({trial.arch for trial in evaluated}),
        "wrong_on_front": sum(trial.state != "complete" for trial in result.front),
        "seconds": round(time.monotonic() - began, 1),
        "seconds_of_a_failed_trial": typical_seconds(failed),
        "seconds_of_a_good_trial": typical_seconds(complete),
    }  # fmt: skip


def typical_seconds(trials: Sequence[Trial]) -> float | None:
    """The median of what `trials` took."""
    return round(statistics.median(trial.seconds for trial in trials), 2) if trials else None


def small_networks(folder: Path, count: int) -> list[Path]:
    """So many different networks of a few layers."""
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        weight = rng.standard_normal((4 + number % 13, 3, 3, 3)).astype(np.float32)
        nodes = [
            helper.make_node("Conv", ["images", "weight"], ["maps"]),
            helper.make_node("GlobalAveragePool", ["maps"], ["out"]),
        ]
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 48, 48])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight, "weight")],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        paths.append(folder / f"{number}.onnx")
        paths[-1].write_bytes(made.SerializeToString())
    return paths


def measure_all(pool: DevicePool, paths: Sequence[Path], *, at_once: int) -> list[Measurement | DeviceError]:
    """How long each file takes, or why that cannot be told, in the order of `paths`; so many at once."""

    def one(path: Path) -> Measurement | DeviceError:
        try:
            return pool.measure(path)
        except DeviceError as error:
            return error

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(one, paths))


def measured_by_boards(
    boards: Sequence[Any], work: Path, paths: Sequence[Path], *, cuts: int, pause: float, seed: int
) -> Figures:
    """What a pool of `boards` tells of the files in `paths`, while lines are cut so often.

    Between two cuts lie `pause` seconds on average.
    """
    rng, stop, done = random.Random(seed), threading.Event(), 0
    devices = [
        WorkerDevice(address, transport=_ssh(address), seconds=1.0, tolerance=1e-9, timeout_seconds=30)
        for address in (parse_address(board.device()) for board in boards)
    ]
    queue, said = LeaseQueue(work / f"leases-{cuts}.db"), list[str]()
    with DevicePool(
        devices, name="pool:loopback", device="pool:ort:cpu", queue=queue, spread=9.0, tell=said.append
    ) as pool:
        pool.start()

        def cut() -> None:
            nonlocal done
            while done < cuts and not stop.wait(rng.uniform(0.2, 1.8) * pause):
                done += rng.choice(boards).cut() > 0

        cutter = threading.Thread(target=cut)
        began = time.monotonic()
        cutter.start()
        try:
            answers = measure_all(pool, paths, at_once=len(boards))
        finally:
            seconds = time.monotonic() - began
            stop.set()
            cutter.join()
        in_service = len(pool.in_service)
    until = time.monotonic() + 40
    while any(board.lodgings() for board in boards) and time.monotonic() < until:
        time.sleep(0.1)
    attempts = queue.attempts()
    counted = Counter(attempt.file for attempt in attempts if attempt.outcome == "measured")
    return {
        "files": len(paths),
        "cuts": done,
        "failed": [str(answer) for answer in answers if isinstance(answer, DeviceError)],
        "outcomes": dict(Counter(str(attempt.outcome) for attempt in attempts)),
        "without_cause": sum(attempt.outcome != "measured" and not attempt.cause for attempt in attempts),
        "not_measured": len(paths) - len(counted),
        "counted_twice": sum(count > 1 for count in counted.values()),
        "seconds": round(seconds, 1),
        "in_service": in_service,
        "set_aside": sum("set aside" in sentence for sentence in said),
        "folders_left": sum(len(board.lodgings()) for board in boards),
    }


def _ssh(address: Any) -> Any:
    from nestling.profile.transport_ssh import SshProcess

    return SshProcess(address.place)


def cut_lines(work: Path, measured: int, *, cuts: int, seed: int) -> dict[str, Any]:
    """The same files on three boards, with lines that hold and with lines that are cut."""
    from loopback import boards

    home = work / "home"
    os.environ["HOME"] = str(home)
    os.environ.pop("SSH_AUTH_SOCK", None)
    paths = small_networks(work / "small", measured)
    with boards(home, 3) as opened:
        whole = measured_by_boards(opened, work, paths, cuts=0, pause=1.0, seed=seed)
        pause = 0.8 * whole["seconds"] / cuts
        cut = measured_by_boards(opened, work, paths, cuts=cuts, pause=pause, seed=seed)
    return {"whole": whole, "cut": cut, "times_as_long": round(cut["seconds"] / whole["seconds"], 2)}


def hostile_files(work: Path, *, count: int, seed: int) -> dict[str, Any]:
    """What became of `count` hostile and mutated files; a search's files are mutated, where there was one."""
    private, outside = work / "private", work / "outside"
    private.mkdir()
    outside.mkdir()
    canaries = [outside / "canary", private / "canary"]
    for canary in canaries:
        canary.write_bytes(b"1234" * 64)
    (private / "linked").hardlink_to(canaries[0])
    whole = [path.read_bytes() for path in sorted(work.glob("*/candidates/*.onnx"))[:4]]
    good = small_networks(work / "good", 1)[0]
    target = work / "hostile.onnx"
    outcomes: Counter[str] = Counter()
    slowest, unnamed, others = 0.0, list[str](), Counter[str]()
    admitted, lost_by = list[str](), list[str]()
    device = WorkerDevice(
        parse_address(f"ort:cpu?memory={MEMORY_MB}M"),
        transport=LocalProcess(
            ("env", "-u", "PYTHONPATH", "-C", str(private), f"TMPDIR={private}", f"HOME={private}",
             sys.executable, "-P", str(Path(_worker_file()).resolve()))
        ),
        seconds=0.02,
        tolerance=0.05,
        timeout_seconds=HANG_SECONDS,
    )  # fmt: skip
    before = memory_mb()
    with Watch([outside, private]) as watch, device:
        canaries[0].read_bytes()
        if not watch.seen():
            raise SystemExit("inotify tells nothing of this file system; set TMPDIR to a folder on another")
        device.start()
        expected = device.measure(good).seconds
        watch.seen()
        for name, content in files(
            count, whole=[*whole, good.read_bytes()], canaries=canaries, folder=private, seed=seed
        ):
            target.write_bytes(content)
            device.start()
            began = time.monotonic()
            try:
                device.measure(target)
                outcome = "measured"
            except WorkerLostError as error:
                outcome = "ended at its limit" if "no answer" in str(error) else "worker lost"
                others[f"{name}: {outcome}"] += 1
                if outcome == "worker lost" or not may_be_ended(name):
                    lost_by.append(f"{name}: {error}")
                unnamed += [] if str(target) in str(error) else [f"{name}: {error}"]
            except DeviceError as error:
                outcome = "refused"
                unnamed += [] if str(target) in str(error) else [f"{name}: {error}"]
            if name.startswith(REFUSED) and outcome != "refused":
                admitted.append(f"{name}: {outcome}")
            slowest = max(slowest, time.monotonic() - began)
            outcomes[outcome] += 1
        touched = watch.seen()
        again = device.measure(good).seconds
    left = sorted(path.name for path in private.iterdir())
    return {
        "files": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "workers_lost_by": dict(others),
        "slowest_seconds": round(slowest, 2),
        "touched_outside": touched,
        "left_behind": [name for name in left if name not in ("canary", "linked")],
        "not_named": unnamed,
        "not_refused": admitted,
        "lost_by_others": lost_by,
        "good_file_after": round(statistics.median(again) / statistics.median(expected), 2),
        "search_grew_mb": round(memory_mb() - before, 1),
    }


def _worker_file() -> str:
    from nestling.profile import worker

    return worker.__file__


def memory_mb() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def killed_searches(run: Path, work: Path, *, kills: int, trials: int, seed: int) -> dict[str, Any]:
    """What became of searches on a pool of one board, this machine, that were killed so often in all."""

    def begin(number: int) -> tuple[Path, Any]:
        folder = copy_trained(run, work / f"killed-{number}", objectives=["top1", "latency_ms"])
        config = json.loads((folder / "config.json").read_text())
        config["profile"]["device"] = "pool:ort:cpu?threads=1"
        config["search"]["trials"] = trials
        (folder / "config.json").write_text(json.dumps(config))
        return folder, searching(folder)

    whole, command = begin(0)
    seconds = command.finish()
    moments = random_moments(kills, seconds=seconds, rng=random.Random(seed))
    found = []
    for killed in run_killed(begin, moments, look=look_at_search):
        stored = stored_trials(killed.run / "study.db")
        queue = LeaseQueue(killed.run / "leases.db")
        attempts = queue.attempts()
        outcomes = Counter(str(attempt.outcome) for attempt in attempts)
        found.append(
            {
                "measured_twice": measured_twice(attempts, MeasurementStore(killed.run / "measurements.db")),
                **account_of(killed.kills, stored),
                **failures(stored),
                "kills": len(killed.kills),
                "workers_left": sum(not kill["worker_ended"] for kill in killed.kills),
                "integrity": integrity(killed.run / "study.db"),
                "leases_integrity": integrity(killed.run / "leases.db"),
                "lease_is_free": queue.take(None, ["ort:cpu?threads=1"]) is not None,
                "outcomes": dict(outcomes),
            }
        )
    return {"seconds": round(seconds, 1), "trials": len(stored_trials(whole / "study.db")), "searches": found}


def failures(stored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many trials have failed for each reason, and how many of them for no other than kills."""
    reasons = Counter(str(trial.get("reason", "")) for trial in stored if trial["state"] == "failed")
    killed = sum(count for reason, count in reasons.items() if LOST in reason)
    return {"failed": reasons.total(), "failed_by_kills": killed, "reasons": dict(reasons)}


def measured_twice(attempts: Sequence[Attempt], store: MeasurementStore) -> int:
    """How many measurements of a file were counted beyond its first stable one."""
    counted = Counter(attempt.file for attempt in attempts if attempt.outcome == "measured")
    unstable = {file: len(store.unstable(file)) for file in counted}
    return sum(max(0, count - unstable[file] - 1) for file, count in counted.items())


def measure(options: argparse.Namespace) -> Figures:
    """The figures of all parts that are wanted."""
    sizes = QUICK if options.quick else FULL
    figures: dict[str, Any] = {"sizes": sizes, "seed": options.seed}
    with tempfile.TemporaryDirectory(prefix="device_faults-") as folder:
        work = Path(folder)
        run = work / "trained"
        if {"faults", "kills"} & set(options.only):
            run = train(work, trials=sizes["trials"])
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "faults": lambda: faulty_search(
                run, work, faults=sizes["faults"], starts=sizes["starts"], seed=options.seed
            ),
            "cuts": lambda: cut_lines(work, sizes["measured"], cuts=sizes["cuts"], seed=options.seed),
            "files": lambda: hostile_files(work, count=sizes["files"], seed=options.seed),
            "kills": lambda: killed_searches(
                run, work, kills=sizes["kills"], trials=sizes["killed"], seed=options.seed
            ),
        }
        for name in PARTS:
            if name in options.only:
                figures[name] = parts[name]()
                print(f"{name}: {json.dumps(figures[name])}", flush=True)
    return figures


def misses(figures: Figures) -> list[str]:
    """What did not go as it should."""
    sizes, found = figures["sizes"], []

    def wrong(part: str, told: str, is_wrong: bool) -> None:
        if is_wrong:
            found.append(f"{part}: {told}")

    if (part := figures.get("faults")) is not None:
        injected = sum(part["injected"].values())
        wrong(
            "faults", f"{injected} were injected, {sizes['faults']} were to be", injected != sizes["faults"]
        )
        starts = sum(part["starts_lost"].values())
        wrong("faults", f"{starts} starts were lost, {sizes['starts']} were to be", starts != sizes["starts"])
        wrong(
            "faults",
            f"{part['failed_trials']} trials failed of {injected} faults",
            part["failed_trials"] != injected,
        )
        ended = part["complete_trials"] + part["failed_trials"]
        wrong("faults", f"{ended} trials came to an end of {sizes['trials']}", ended != sizes["trials"])
        wrong("faults", f"another cause was recorded: {part['unexplained']}", bool(part["unexplained"]))
        wrong("faults", "trials failed without a cause", part["failed_without_cause"] > 0)
        wrong("faults", f"{part['doubled']} archs were evaluated twice", part["doubled"] != 0)
        wrong("faults", "a failed trial is on the front", part["wrong_on_front"] > 0)
        wrong("faults", "nothing was found", part["front"] == 0)
    if (part := figures.get("cuts")) is not None:
        cut = part["cut"]
        wrong(
            "cuts", f"{cut['cuts']} lines were cut, {sizes['cuts']} were to be", cut["cuts"] < sizes["cuts"]
        )
        for name in ("failed", "not_measured", "counted_twice", "without_cause", "folders_left"):
            wrong("cuts", f"{name.replace('_', ' ')}: {cut[name]}", bool(cut[name]))
        wrong("cuts", f"{part['times_as_long']} times as long as without", part["times_as_long"] > SLOWEST)
    if (part := figures.get("files")) is not None:
        wrong(
            "files",
            f"{part['files']} were tried, {sizes['files']} were to be",
            part["files"] != sizes["files"],
        )
        for name in ("touched_outside", "left_behind", "not_named", "not_refused", "lost_by_others"):
            wrong("files", f"{name.replace('_', ' ')}: {part[name]}", bool(part[name]))
        late = part["slowest_seconds"] > HANG_SECONDS + 2
        wrong("files", f"one took {part['slowest_seconds']} s, the limit is {HANG_SECONDS} s", late)
        wrong("files", f"the search grew by {part['search_grew_mb']} MB", part["search_grew_mb"] > 200)
    if (part := figures.get("kills")) is not None:
        kills = sum(search["kills"] for search in part["searches"])
        wrong("kills", f"{kills} kills, {sizes['kills']} were to be", kills != sizes["kills"])
        for search in part["searches"]:
            for name in ("lost_or_changed", "doubled", "measured_twice", "failed_by_kills", "workers_left"):
                wrong("kills", f"{name.replace('_', ' ')}: {search[name]}", search[name] > 0)
            wrong("kills", "trials failed without a cause", "" in search["reasons"])
            sound = search["integrity"] == search["leases_integrity"] == "ok"
            wrong("kills", f"damaged: {search['integrity']}, {search['leases_integrity']}", not sound)
            wrong("kills", "a lease was left", not search["lease_is_free"])
            wrong(
                "kills", f"{search['evaluated']} archs were evaluated", search["evaluated"] != sizes["killed"]
            )
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    told = []
    if (part := figures.get("faults")) is not None:
        told.append(
            f"{sum(part['injected'].values())} faults in the worker failed {part['failed_trials']} trials, "
            f"{len(part['unexplained'])} without their cause, and {sum(part['starts_lost'].values())} lost "
            "starts none"
        )
    if (part := figures.get("cuts")) is not None:
        cut = part["cut"]
        told.append(
            f"{cut['cuts']} cut lines: {cut['not_measured']} of {cut['files']} files not measured, "
            f"{cut['counted_twice']} counted twice, {part['times_as_long']} x the time"
        )
    if (part := figures.get("files")) is not None:
        lost = sum(part["workers_lost_by"].values())
        told.append(
            f"{part['files']} hostile files: {len(part['touched_outside'])} touched a file outside, "
            f"{lost} cost a worker, the slowest took {part['slowest_seconds']} s"
        )
    if (part := figures.get("kills")) is not None:
        searches = part["searches"]
        told.append(
            f"{sum(search['kills'] for search in searches)} kills of the search: "
            f"{sum(search['lost_or_changed'] for search in searches)} trials lost, "
            f"{sum(search['doubled'] for search in searches)} doubled, "
            f"{sum(search['measured_twice'] for search in searches)} measured twice, "
            f"{sum(search['failed_by_kills'] for search in searches)} failed because of kills, "
            f"{sum(search['failed'] - search['failed_by_kills'] for search in searches)} for other causes"
        )
    return "; ".join(told)


BENCHMARK = Benchmark("device_faults", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--quick", action="store_true", help="a tenth of everything; stored apart")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts [default: all]")
    parser.add_argument("--seed", type=int, default=0, help="of every random decision [default: 0]")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
