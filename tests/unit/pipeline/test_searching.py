from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.config import load_config
from nestling.models.graph import Untraceable
from nestling.owners import place
from nestling.pipeline import racing, searching
from nestling.pipeline.listening import Silent
from nestling.pipeline.searching import _evaluation, _seeds, search_supernet
from nestling.pipeline.studies import about, problem, searched, study_place
from nestling.pipeline.workbench import Workbench
from nestling.profile import Fingerprint, Measurement
from nestling.quant import QuantPolicy, Unquantizable
from nestling.run import Run, RunError
from nestling.search import EvaluationFailed, SearchResult, search
from nestling.search.database import Database
from nestling.search.lost import RETRIES
from nestling.search.queue import Queue, Task
from nestling.search.record import Record, begin_study
from nestling.train.evaluate import Accuracy

TESTS = Path(__file__).parents[2]


def _evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch, *, precision: str, limits: str) -> Any:
    """The metrics of a network in `precision`, as a search with `limits` takes them; nothing may be timed."""
    overrides = ['search.objectives=["top1", "size_mb"]', f"search.limits={limits}"]
    bench = Workbench(Run.create(folder, load_config(TESTS / "toy.toml", overrides=overrides)))
    vars(bench)["device"] = None
    written = SimpleNamespace(policy=QuantPolicy((("", precision),)), resolution=8)
    monkeypatch.setattr(searching, "write_candidate", lambda *_: written)
    monkeypatch.setattr(racing, "score", lambda *_, **__: Accuracy(30, 60))
    monkeypatch.setattr(searching, "cost_metrics", lambda *_: {"mmacs": 1.0})
    monkeypatch.setattr(searching, "measure", lambda *_: pytest.fail("timed"))
    return _evaluation(bench, study_place(bench), racing.Scoring(bench), {}, note=pytest.fail)(
        bench.given_space.smallest
    )


def test_a_precision_for_research_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationFailed, match=r"w4a4 is for research: .* has no latency"):
        _evaluate(tmp_path / "run", monkeypatch, precision="w4a4", limits="{latency_ms = 5.0}")


def test_it_is_scored_where_no_latency_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _evaluate(tmp_path / "run", monkeypatch, precision="w4a4", limits="{}")
    assert metrics == {"top1": 0.5, "top1_images": 60.0, "top1_partial": 0.0, "mmacs": 1.0}


@pytest.mark.parametrize(("losses", "how"), [(0, "_search"), (RETRIES, "_search"), (RETRIES + 1, "_watch")])
def test_a_search_that_was_lost_with_one_candidate_again_and_again_goes_on_under_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: int, how: str
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    asked, where = problem(bench), study_place(bench)
    if losses:
        database = Database(where.storage, prepare=partial(begin_study, problem=asked, name=where.name))
        record = Record(asked, database, where.name, about=about(bench))
        for number in range(losses):  # each time by a process that is not there any more
            queue = Queue(record, owner=f"host:{2**30}:0:{place()}:{number}")
            queue.offer([asked.space.smallest])
            assert isinstance(queue.next(9), Task)
        database.close()
    called: list[str] = []

    def going(name: str) -> Callable[..., SearchResult]:
        def go(*_: object) -> SearchResult:
            called.append(name)
            return searched(bench)

        return go

    monkeypatch.setattr(searching, "_search", going("_search"))
    monkeypatch.setattr(searching, "_watch", going("_watch"))
    monkeypatch.setattr(Workbench, "check_trained", lambda _: None)
    search_supernet(bench, listener=Silent())
    assert called == [how]
    assert bench.run.study_file.exists() == (losses > 0)  # asking begins none


@pytest.mark.parametrize(("strategy", "told"), [("sorted_net", True), ("random", False)])
def test_a_plan_that_came_to_its_end_is_told_with_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, told: bool
) -> None:
    overrides = [f'search.strategy="{strategy}"', 'search.objectives=["top1", "mmacs"]']
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml", overrides=overrides)))
    where = study_place(bench)

    def run(*_: object) -> SearchResult:
        metrics = {"top1": 0.5, "mmacs": 1.0}
        return search(
            problem(bench),
            lambda _: metrics,
            storage=where.storage,
            name=where.name,
            trials=bench.config.search.trials,
            strategy=strategy,
            about=about(bench),
        )

    monkeypatch.setattr(searching, "_search", run)
    monkeypatch.setattr(Workbench, "check_trained", lambda _: None)
    notes: list[str] = []
    listener: Any = SimpleNamespace(stage=lambda _: None, note=notes.append)
    tried = len(search_supernet(bench, listener=listener).trials)
    said = f"sorted_net has come to the end of its plan: {tried} candidates are evaluated, not 8"
    assert (tried < 8) is told
    assert any(note.startswith(said) for note in notes) is told


@pytest.mark.parametrize("error", [Untraceable, Unquantizable, ValueError])
def test_only_networks_that_cannot_be_quantized_have_no_seeds(
    error: type[ValueError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("because")

    told: list[str] = []
    monkeypatch.setattr(searching, "seeds", refuse)
    monkeypatch.setattr(searching, "problem", lambda _: None)
    listener: Any = SimpleNamespace(note=told.append)
    bench: Any = None
    if error is ValueError:  # of a mistake, which must be heard of
        with pytest.raises(ValueError, match="because"):
            _seeds(bench, listener)
    else:
        assert _seeds(bench, listener) == []
        assert told == ["no archs by sensitivity: because"]


def _timed_by(runtime: str) -> Measurement:
    fingerprint = Fingerprint("ort:cpu?threads=1", "A CPU", ("avx2",), 1, "Linux", runtime, "0" * 12, False)
    return Measurement(fingerprint, (0.002,) * 40, (0.001,) * 40, 0.1, 0.1)


BEFORE = "onnxruntime 1.0"


@pytest.mark.parametrize("before", [BEFORE, f"{BEFORE} (settings 1)"])
def test_a_search_begun_with_other_settings_of_its_runtime_goes_on_and_is_told(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    vars(bench)["device"] = None
    candidate = SimpleNamespace(policy=QuantPolicy(), resolution=8)
    monkeypatch.setattr(searching, "write_candidate", lambda *_: candidate)
    monkeypatch.setattr(searching, "cost_metrics", lambda *_: {})
    told: list[str] = []

    def latency(runtime: str) -> float:
        monkeypatch.setattr(searching, "measure", lambda *_: _timed_by(runtime))
        scoring: Any = lambda *_, costs, **__: costs  # noqa: E731
        evaluate = _evaluation(bench, study_place(bench), scoring, {}, note=told.append)
        assert evaluate(bench.given_space.smallest) == evaluate(bench.given_space.smallest)
        return evaluate(bench.given_space.smallest)["latency_ms"]

    assert latency(before) == latency(before) == pytest.approx(2.0)
    assert told == []
    assert latency(f"{BEFORE} (settings 2)") == pytest.approx(2.0)
    [note] = told
    assert f"({before}) than those of now ({BEFORE} (settings 2))" in note
    with pytest.raises(RunError, match="another device or runtime"):
        latency("onnxruntime 1.1 (settings 2)")
