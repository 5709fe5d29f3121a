"""The parts of the benchmarks of devices that can be wrong without anybody noticing."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from nestling.profile import Fingerprint, Measurement, MeasurementStore
from nestling.profile.leases import Attempt
from nestling.profile.worker import RefusalError, refuse_external_data
from nestling.search.lost import LOST

pytest.importorskip("asyncssh", reason="the benchmarks of devices need asyncssh: pip install 'nestling[ssh]'")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Load = Callable[[str], ModuleType]

FAULTS: dict[str, Any] = {
    "sizes": {
        "faults": 2, "starts": 2, "cuts": 1, "files": 3, "kills": 1, "trials": 6, "killed": 4, "measured": 2,
    },
    "faults": {
        "injected": {"SIGSEGV": 1, "hang on run": 1}, "failed_trials": 2, "unexplained": [],
        "failed_without_cause": 0, "doubled": 0, "wrong_on_front": 0, "front": 1, "complete_trials": 4,
        "starts_lost": {"SIGSEGV": 1, "SIGKILL": 1},
    },
    "cuts": {
        "cut": {
            "files": 2, "cuts": 1, "failed": [], "not_measured": 0, "counted_twice": 0, "without_cause": 0,
            "folders_left": 0,
        },
        "times_as_long": 1.2,
    },
    "files": {
        "files": 3, "touched_outside": [], "left_behind": [], "not_named": [], "slowest_seconds": 4.1,
        "not_refused": [], "lost_by_others": [], "search_grew_mb": 9.0,
        "workers_lost_by": {"endless loop: ended at its limit": 1},
    },
    "kills": {
        "searches": [{
            "kills": 1, "lost_or_changed": 0, "doubled": 0, "workers_left": 0, "integrity": "ok",
            "measured_twice": 0, "leases_integrity": "ok", "lease_is_free": True, "evaluated": 4,
            "failed": 1, "failed_by_kills": 0, "reasons": {"the file was refused": 1},
        }],
    },
}  # fmt: skip
FLEET: dict[str, Any] = {
    "candidates": 12, "namespaces": True, "seconds": {"one": 60.0, "two": 33.0}, "part": 0.55,
    "same_files": True, "same_accuracy": True, "failed": [], "by_board": [6, 7],
    "trials": {"one": 12, "two": 12}, "measured": {"one": 12, "two": 12},
    "measured_files": {"one": 12, "two": 12}, "measurements": {"one": 12, "two": 13},
    "ratios_differ": {"median": 0.01, "most": 0.04},
}  # fmt: skip
CUDA: dict[str, Any] = {
    "members": {
        "01-a": {
            "torch:cuda": {"ms": [0.2, 0.21, 0.5], "ours": [1.0, 1.01, 3.0], "flagged": [[], [], ["busy"]]},
            "torch:cuda?graph=0": {"ms": [1.2, 1.3], "ours": [5.0, 5.02], "flagged": [[], []]},
        }
    }
}
GOOD = {"device_faults": FAULTS, "fleet": FLEET, "cuda_front": CUDA}
BAD = [
    ("device_faults", ("faults", "failed_trials"), 1),
    ("device_faults", ("faults", "injected"), {"SIGSEGV": 1}),
    ("device_faults", ("faults", "unexplained"), ["trial 3, SIGSEGV during load: Fail"]),
    ("device_faults", ("faults", "doubled"), 1),
    ("device_faults", ("faults", "complete_trials"), 3),
    ("device_faults", ("cuts", "cut", "cuts"), 0),
    ("device_faults", ("cuts", "cut", "counted_twice"), 1),
    ("device_faults", ("cuts", "cut", "folders_left"), 1),
    ("device_faults", ("cuts", "times_as_long"), 1.6),
    ("device_faults", ("files", "touched_outside"), ["opened /canary"]),
    ("device_faults", ("files", "slowest_seconds"), 60.0),
    ("device_faults", ("files", "files"), 2),
    ("device_faults", ("files", "not_refused"), ["number for a graph: measured"]),
    ("device_faults", ("files", "lost_by_others"), ["empty: the worker was ended by SIGSEGV"]),
    ("device_faults", ("faults", "starts_lost"), {"SIGSEGV": 1}),
    ("device_faults", ("kills", "searches", 0, "measured_twice"), 1),
    ("device_faults", ("kills", "searches", 0, "lost_or_changed"), 1),
    ("device_faults", ("kills", "searches", 0, "failed_by_kills"), 1),
    ("device_faults", ("kills", "searches", 0, "reasons"), {"": 1}),
    ("device_faults", ("kills", "searches", 0, "lease_is_free"), False),
    ("device_faults", ("kills", "searches", 0, "leases_integrity"), "row 1 missing"),
    ("cuda_front", ("members", "01-a", "torch:cuda", "flagged"), [[], [], []]),
    ("cuda_front", ("members", "01-a", "torch:cuda", "flagged"), [[], ["busy"], ["busy"]]),
    ("cuda_front", ("members", "01-a", "torch:cuda?graph=0", "ours"), [5.0, 5.3]),
    ("fleet", ("part",), 0.66),
    ("fleet", ("same_files",), False),
    ("fleet", ("failed",), ["a"]),
    ("fleet", ("measured", "two"), 11),
    ("fleet", ("measured_files", "one"), 11),
    ("fleet", ("trials", "two"), 13),
    ("fleet", ("by_board",), [13]),
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def judged(load: Load, name: str, figures: dict[str, Any], folder: Path) -> int:
    stored = folder / "stored.json"
    stored.write_text(json.dumps({"figures": figures}))
    code: int = load(name).main(["--check", "--stored", "--output", str(stored)])
    return code


@pytest.mark.parametrize("name", GOOD)
def test_good_figures_pass_and_are_the_last_line(
    name: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(load, name, GOOD[name], tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == load(name).sentence(GOOD[name])


@pytest.mark.parametrize(("name", "keys", "value"), BAD, ids=lambda value: str(value)[:40])
def test_a_figure_beyond_its_limit_fails_the_check(
    name: str, keys: tuple[Any, ...], value: object, load: Load, tmp_path: Path
) -> None:
    figures = copy.deepcopy(GOOD[name])
    at = figures
    for key in keys[:-1]:
        at = at[key]
    assert at[keys[-1]] != value
    at[keys[-1]] = value
    assert judged(load, name, figures, tmp_path) == 1


def test_a_file_is_measured_twice_where_a_stable_measurement_was_followed_by_another(
    load: Load, tmp_path: Path
) -> None:
    module = load("device_faults")
    steady = Measurement(
        Fingerprint("ort:cpu?threads=1", "A CPU", (), 1, "Linux", "ort", "0" * 12, False),
        (1e-3,) * 40, (1e-3,) * 40, 0.1, 0.1,
    )  # fmt: skip
    store = MeasurementStore(tmp_path / "m.db")
    store.put(dataclasses.replace(steady, seconds=(1e-3, 9e-3) * 20), file="a", settings="")
    once = [Attempt(file, "ort:cpu", 0.0, 1.0, "measured", None) for file in "ab"]
    again = [*once, once[0], Attempt("b", "ort:cpu", 0.0, 1.0, "abandoned", None)]
    assert module.measured_twice(again, store) == 0
    assert module.measured_twice([*again, once[1]], store) == 1


def test_failures_that_come_from_kills_alone_are_told_apart(load: Load) -> None:
    killed = f"{LOST} 4 times, last process 3 on host: it was killed, or its machine was"
    stored = [{"state": "complete"}, {"state": "failed", "reason": killed}]
    stored += [{"state": "failed", "reason": "refused"}, {"state": "failed"}]
    assert load("device_faults").failures(stored) == {
        "failed": 3, "failed_by_kills": 1, "reasons": {killed: 1, "refused": 1, "": 1}
    }  # fmt: skip


def test_hostile_files_are_what_they_say(load: Load, tmp_path: Path) -> None:
    module = load("device_faults_files")
    made = list(module.hostile([tmp_path / "canary"], tmp_path / "private"))
    names = Counter(name for name, _ in made)
    assert names["giant constant"] == 4
    assert names["number for a node's text"] == 12
    assert set(module.ENDLESS) <= set(names)
    assert names["external with a number for its name"] == 20
    for name, content in made:
        if name.startswith(module.REFUSED):
            with pytest.raises(RefusalError):
                refuse_external_data(content)
    by_name = dict(made)
    assert str(tmp_path / "canary").encode() in by_name["external sparse"] + b"".join(c for _, c in made)
    for name in ("nested functions", "endless loop", "giant expansion"):
        refuse_external_data(by_name[name])  # nothing that reading could find is wrong with them
        assert onnx.load_from_string(by_name[name]).graph.node


def test_mutations_differ_and_repeat(load: Load, tmp_path: Path) -> None:
    module = load("device_faults_files")
    whole = [module.endless_loop(5)]

    def made(seed: int) -> list[tuple[str, bytes]]:
        found = module.files(250, whole=whole, canaries=[tmp_path / "c"], folder=tmp_path, seed=seed)
        return list(found)

    assert len(made(0)) == 250
    assert made(0) == made(0) != made(1)
    mutated = [content for name, content in made(0) if name == "mutated network"]
    assert sum(content != whole[0] for content in mutated) > 0.9 * len(mutated)
    # what was mutated is told, as only endless files may cost a worker
    hostile = {name for name, _ in module.hostile([tmp_path / "c"], tmp_path)}
    sources = {name.removeprefix(module.MUTATED) for name, _ in made(0) if name.startswith(module.MUTATED)}
    assert {"network"} < sources <= {"network"} | hostile
    assert module.may_be_ended("mutated endless loop")
    assert not module.may_be_ended("mutated giant constant")


def test_a_plan_of_faults_comes_to_its_end_each_kind_alike_often(load: Load, tmp_path: Path) -> None:
    module, plan = load("device_faults_worker"), tmp_path / "plan.json"
    module.new_plan(plan, faults=10, starts=3, seed=0)
    rng = random.Random(0)
    for _ in range(200):
        verb = rng.choice(("load", "optimized", "time", "predict"))
        kind = module.fault(verb, plan)
        if kind is not None and kind.startswith("hang"):
            assert kind.endswith("load") == (verb in module.LOADS)
    happened = Counter(fault["kind"] for fault in module.read_plan(plan)["happened"])
    assert happened == dict.fromkeys(module.KINDS, 2)
    assert module.SAID.keys() == set(module.KINDS)
    assert [module.fault_at_start(plan) for _ in range(6)] == [
        "SIGSEGV",
        "SIGKILL",
        None,
        None,
        "SIGSEGV",
        None,
    ]
    assert module.read_plan(plan)["starts_lost"] == ["SIGSEGV", "SIGKILL", "SIGSEGV"]


@pytest.mark.parametrize(("kind", "status"), [("SIGSEGV", -11), ("SIGKILL", -9), ("out of memory", 1)])
def test_a_fault_befalls(kind: str, status: int) -> None:
    code = f"import sys; sys.path.append({str(BENCHMARKS)!r}); "
    code += f"import device_faults_worker; device_faults_worker.befall({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert status < 0 or "MemoryError" in done.stderr


def test_a_watch_sees_who_opens_makes_and_reads_through_a_hard_link(load: Load, tmp_path: Path) -> None:
    canary, other = tmp_path / "canary", tmp_path / "other"
    canary.write_text("secret")
    other.mkdir()
    (other / "linked").hardlink_to(canary)
    with load("watching").Watch([tmp_path, other]) as watch:
        assert watch.seen() == []
        (other / "linked").read_text()
        assert [event for event in watch.seen() if "opened" in event and "linked" in event]
        (tmp_path / "new").touch()
        assert [event for event in watch.seen() if "made" in event and str(tmp_path / "new") in event]
        assert watch.seen() == []
