"""A run's milliseconds are those of the device at its best, whenever that came to be known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.config import load_config
from nestling.pipeline import concluding
from nestling.pipeline.concluding import concluded
from nestling.pipeline.listening import Silent
from nestling.pipeline.measuring import latency_metrics
from nestling.pipeline.scale import rescaled, run_reference
from nestling.pipeline.studies import REFERENCE, problem, searched, study_place
from nestling.pipeline.workbench import Workbench
from nestling.profile import Fingerprint, Measurement
from nestling.profile.measurement import Conditions
from nestling.run import Run
from nestling.search import agree, amend, correct_trial, search
from nestling.space import Arch

TESTS = Path(__file__).parents[2]


def taken(ratio: float, *, reference_ms: float, slowed: float | None) -> Measurement:
    fingerprint = Fingerprint("ort:cpu?threads=1", "A CPU", ("avx2",), 1, "Linux", "ort 1", "0" * 12, False)
    times = [reference_ms / 1e3] * 40
    candidate = [ratio * time for time in times]
    return Measurement(
        fingerprint, tuple(candidate), tuple(times), 0.1, 0.1, conditions=Conditions(slowed=slowed)
    )


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    limits = "search.limits={latency_ms = 2.5}"
    return Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml", overrides=[limits])))


def searching_with(bench: Workbench, measurements: list[Measurement]) -> None:
    """A search whose candidates are measured so, as the search stage does it."""
    where, asked, left = study_place(bench), problem(bench), list(measurements)

    def evaluate(_: Arch) -> dict[str, float]:
        measurement = left.pop(0)
        reference = run_reference(bench, where, measurement)
        metrics = latency_metrics(measurement, reference_ms=float(reference["latency_ms"]))
        return dict.fromkeys(asked.needed(), 1.0) | {"top1": 0.5} | metrics

    search(asked, evaluate, storage=where.storage, name=where.name, trials=len(measurements))


def rescale(bench: Workbench, told: list[str] | None = None) -> list[float]:
    listener: Any = SimpleNamespace(note=(told if told is not None else []).append)
    result = rescaled(bench, study_place(bench), searched(bench), listener)
    assert result.trials == searched(bench).trials
    return [trial.metrics["latency_ms"] for trial in result.trials]


def test_a_search_begun_on_a_slowed_device_tells_its_latencies_anew(bench: Workbench) -> None:
    slow = taken(2.0, reference_ms=1.5, slowed=None)
    searching_with(bench, [slow, taken(4.0, reference_ms=1.0, slowed=1.0)])
    assert [trial.metrics["latency_ms"] for trial in searched(bench).trials] == [3.0, 6.0]
    told: list[str] = []
    assert rescale(bench, told) == pytest.approx([2.0, 4.0])
    assert "takes 1 ms on this device at its best, and not 1.5 as when the search began" in told[0]
    assert json.loads((bench.run.folder / REFERENCE).read_text())["latency_ms"] == 1.0
    # limits are judged by what is told now
    assert [problem(bench).feasible(one.metrics) for one in searched(bench).trials] == [True, False]
    assert rescale(bench, told) == pytest.approx([2.0, 4.0])
    assert len(told) == 1
    later = run_reference(bench, study_place(bench), taken(1.0, reference_ms=1.5, slowed=1.5))
    assert later["latency_ms"] == 1.0


def test_what_was_slightly_faster_changes_nothing(bench: Workbench) -> None:
    slightly = taken(2.0, reference_ms=0.95, slowed=1.0)
    searching_with(bench, [taken(2.0, reference_ms=1.0, slowed=None), slightly])
    assert rescale(bench) == pytest.approx([2.0, 2.0])


def test_a_command_killed_in_between_is_finished_by_the_next(bench: Workbench) -> None:
    searching_with(
        bench, [taken(2.0, reference_ms=1.5, slowed=None), taken(4.0, reference_ms=1.0, slowed=1.0)]
    )
    rescale(bench)
    where = study_place(bench)
    for trial, before in zip(searched(bench).trials, (3.0, 6.0), strict=True):
        correct_trial(problem(bench), trial, {"latency_ms": before}, storage=where.storage, name=where.name)
    assert rescale(bench) == pytest.approx([2.0, 4.0])


def test_a_front_timed_again_on_a_quiet_device_tells_all_latencies_by_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(bench)["device"] = None
    restless = taken(1.6, reference_ms=1.5, slowed=1.2)
    assert restless.unstable
    searching_with(bench, [restless, taken(2.0, reference_ms=1.5, slowed=1.0)])
    where = study_place(bench)
    assert [problem(bench).feasible(one.metrics) for one in searched(bench).trials] == [True, True]
    monkeypatch.setattr(concluding, "write_candidate", lambda *_: None)
    monkeypatch.setattr(concluding, "measure", lambda *_, **__: taken(1.5, reference_ms=0.5, slowed=1.0))
    monkeypatch.setattr(concluding, "PAUSES_AT_END", (0.0,))
    result = concluded(bench, where, searched(bench), Silent(), fresh=False)
    assert [one.metrics["latency_ms"] for one in result.trials] == pytest.approx([0.75, 1.0])
    assert result.trials == searched(bench).trials
    assert rescale(bench) == pytest.approx([0.75, 1.0])


def test_of_two_processes_that_amend_a_fact_the_first_one_holds(bench: Workbench) -> None:
    where: dict[str, Any] = asdict(study_place(bench))
    asked = problem(bench)
    searching_with(bench, [taken(2.0, reference_ms=1.0, slowed=None)])
    assert agree(asked, "fact", "old", **where) == "old"
    assert amend(asked, "fact", "new", before="old", **where) == "new"
    assert amend(asked, "fact", "newer", before="old", **where) == "new"
    assert agree(asked, "fact", "other", **where) == "new"


def test_a_run_without_latencies_is_as_it_was(bench: Workbench) -> None:
    assert rescale(bench) == []
    assert not (bench.run.folder / REFERENCE).exists()
