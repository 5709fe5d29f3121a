"""What a search does when it has come to its end."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.config import load_config
from nestling.data import EvalImages
from nestling.pipeline import concluding, searching, workbench
from nestling.pipeline.concluding import _steadied, concluded
from nestling.pipeline.listening import Silent
from nestling.pipeline.searching import search_supernet
from nestling.pipeline.studies import about, problem, searched, study_place
from nestling.pipeline.workbench import Workbench
from nestling.profile import DeviceError, WorkerDevice
from nestling.run import Run
from nestling.search import EvaluationFailed, Metrics, SearchResult, Trial, correct_trial, search
from nestling.search.opening import open_queue
from nestling.search.queue import Queue, Task
from nestling.space import Arch, SearchSpace
from nestling.train.evaluate import Accuracy

TESTS = Path(__file__).parents[2]


def test_a_search_that_ends_leaves_the_files_that_others_are_at_work_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    asked, where = problem(bench), study_place(bench)
    beaten, better, last, theirs, waiting = islice(asked.space.walk(), 5)

    def trial(arch: Arch, top1: float) -> Trial:
        metrics = dict.fromkeys(asked.needed(), 1.0) | {"top1": top1, "latency_unstable": 0.0}
        return Trial(0, arch, metrics, "complete")

    with open_queue(asked, where.storage, where.name, about=about(bench)) as queue:
        queue.offer([beaten, better, last, theirs, waiting])
        given = queue.next(9)
        for top1 in (0.4, 0.5):
            assert isinstance(given, Task)
            given = queue.next(9, outcome=(given, trial(given.arch, top1)))
        mine = given
        assert isinstance(mine, Task)
        assert mine.arch == last
        another = Queue(queue.record, owner="another")
        assert isinstance(another.next(9), Task)

        def end(*_: object) -> SearchResult:
            found = searched(bench)
            queue.next(9, outcome=(mine, trial(last, 0.6)))  # the best of all is handed in meanwhile
            return found

        monkeypatch.setattr(searching, "_search", end)
        monkeypatch.setattr(concluding, "_steadied", lambda _bench, _place, result, *_, **__: result)
        monkeypatch.setattr(Workbench, "check_trained", lambda _: None)
        (bench.run.folder / "candidates").mkdir()
        for arch in (beaten, better, last, theirs, waiting):
            bench.candidate_path(arch).touch()
        result = search_supernet(bench, listener=Silent())
    assert [trial.arch for trial in result.front] == [better]
    left = {file.stem for file in (bench.run.folder / "candidates").iterdir()}
    assert left == {better.key, last.key, theirs.key, waiting.key}


def test_an_unstable_front_is_timed_again_and_recorded_beside_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    vars(bench)["device"] = None
    where, asked = study_place(bench), problem(bench)
    unstable = {"latency_ms": 1.0, "latency_ratio": 0.5, "latency_unstable": 1.0}
    metrics = dict.fromkeys(asked.needed(), 1.0) | {"top1": 0.5} | unstable
    result = search(asked, lambda _: metrics, storage=where.storage, name=where.name, trials=1)
    [trial] = result.front
    written: list[Path] = []
    monkeypatch.setattr(concluding, "write_candidate", lambda _bench, _arch, path: written.append(path))
    taken = SimpleNamespace(ratio=2.0, unstable=False, reference_ms=3.0)
    monkeypatch.setattr(concluding, "measure", lambda *_, **__: taken)
    monkeypatch.setattr(concluding, "run_reference", lambda *_: {"latency_ms": 3.0})
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    found = _steadied(bench, where, result, listener, away=False)
    assert written == [bench.candidate_path(trial.arch)]
    assert found.unstable == ()
    assert found.trials[0].metrics["latency_ms"] == 6.0
    assert found.trials == searched(bench).trials
    assert told == [f"{trial.arch.key} was timed again: 6 ms, not 1 ms"]


def test_a_latency_that_the_device_doubts_is_recorded_as_unstable_where_it_cannot_be_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))

    class Doubting(WorkerDevice):
        def __init__(self) -> None:
            pass

        def doubts(self, path: Path) -> bool:
            return path.exists()

    vars(bench)["device"] = Doubting()
    where, asked = study_place(bench), problem(bench)
    stable = {"latency_ms": 1.0, "latency_ratio": 0.5, "latency_unstable": 0.0}
    metrics = dict.fromkeys(asked.needed(), 1.0) | {"top1": 0.5} | stable
    result = search(asked, lambda _: metrics, storage=where.storage, name=where.name, trials=1)
    [trial] = result.front
    bench.candidate_path(trial.arch).parent.mkdir(exist_ok=True)
    bench.candidate_path(trial.arch).touch()

    def lost(*_: object, **__: object) -> None:
        raise EvaluationFailed("the worker was lost")

    monkeypatch.setattr(concluding, "measure", lost)
    monkeypatch.setattr(concluding, "PAUSES_AT_END", (0.0,))
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    _steadied(bench, where, result, listener, away=False)
    assert [one.metrics["latency_ms"] for one in searched(bench).unstable] == [1.0]
    key = trial.arch.key
    assert told == [
        f"{key} is doubted: the device was slower at its 1 ms than it was seen to be since",
        f"{key} was not timed again: the worker was lost",
    ]


def test_a_device_that_is_away_when_the_front_is_looked_at_ends_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    where, asked = study_place(bench), problem(bench)
    unstable = {"latency_ms": 1.0, "latency_ratio": 0.5, "latency_unstable": 1.0}
    metrics = dict.fromkeys(asked.needed(), 1.0) | {"top1": 0.5} | unstable
    result = search(asked, lambda _: metrics, storage=where.storage, name=where.name, trials=1)

    def away(*_: object, **__: object) -> None:
        raise DeviceError("the board does not answer")

    monkeypatch.setattr(workbench, "open_device", away)
    monkeypatch.setattr(concluding, "write_candidate", lambda *_: None)
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    assert _steadied(bench, where, result, listener, away=False) == result
    assert told == ["the front's latencies could not be looked at to the end: the board does not answer"]


def three(space: SearchSpace) -> list[Arch]:
    """The ends of the space, and one between them."""
    ends = [space.smallest, space.largest]
    return [*ends, next(arch for arch in space.walk() if arch not in ends)]


@pytest.fixture
def raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A run that has searched three networks, of which the fastest, of an unstable latency, beat the others.

    Timed again, it takes longer than they do.
    """
    config = load_config(TESTS / "toy.toml", overrides=["data.search_images=200"])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = None
    asked, where = problem(bench), study_place(bench)
    archs = three(asked.space)

    def evaluate(arch: Arch) -> Metrics:
        place = archs.index(arch)
        top1, seen = [(0.95, 200.0), (48 / 64, 64.0), (10 / 64, 64.0)][place]
        ms = 1.0 + place / 10
        return dict.fromkeys(asked.needed(), 1.0) | {
            "top1": top1,
            "top1_images": seen,
            "top1_partial": float(seen < 200),
            "latency_ms": ms,
            "latency_ratio": ms,
            "latency_unstable": float(place == 0),
        }

    begun = partial(search, asked, evaluate, storage=where.storage, name=where.name, strategy="random")
    begun(trials=3, warm_start=2, seeds=archs)
    taken = SimpleNamespace(ratio=1.3, unstable=False, reference_ms=1.0)
    monkeypatch.setattr(concluding, "measure", lambda *_, **__: taken)
    monkeypatch.setattr(concluding, "run_reference", lambda *_: {"latency_ms": 1.0})
    monkeypatch.setattr(concluding, "write_candidate", lambda *_: None)
    return bench


def test_what_lost_its_race_to_a_network_that_is_slower_than_it_seemed_is_scored_on_all_images(
    raced: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, near, far = three(raced.space)
    scored: list[str] = []

    def score(_: object, path: Path, images: EvalImages, *, resolution: int) -> Accuracy:
        assert (len(images), resolution) == (200, raced.resolution(near))
        scored.append(path.stem)
        return Accuracy(160, 200)

    monkeypatch.setattr(concluding, "score", score)
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    result = concluded(raced, study_place(raced), searched(raced), listener, fresh=True)
    assert scored == [near.key]  # which is more accurate than the third can be, and faster
    assert [trial.arch for trial in result.front] == [near, fast]
    assert result.front[0].metrics["top1"] == 0.8
    assert result.trials == searched(raced).trials
    assert [trial.arch for trial in result.trials if trial.is_partial] == [far]
    assert f"{near.key}, which nothing beats any more, was scored on all images: 80.00%, 75.00% on 64" in told


@pytest.mark.parametrize("error", [EvaluationFailed, DeviceError])
def test_what_cannot_be_scored_on_all_images_is_told_and_ends_nothing(
    raced: Workbench, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise error("the worker was lost")

    monkeypatch.setattr(concluding, "score", lost)
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    result = concluded(raced, study_place(raced), searched(raced), listener, fresh=True)
    assert len([trial for trial in result.trials if trial.is_partial]) == 2
    assert any("on all images: the worker was lost" in note for note in told)


def test_what_fails_again_and_again_is_tried_once_where_others_are_scored_on_all_images(
    raced: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, near, far = three(raced.space)
    tried: list[str] = []

    def score(_: object, path: Path, *__: object, **___: object) -> Accuracy:
        tried.append(path.stem)
        if path.stem == near.key:
            raise EvaluationFailed("the worker was lost")
        return Accuracy(20, 200)

    monkeypatch.setattr(concluding, "score", score)
    concluded(raced, study_place(raced), searched(raced), Silent(), fresh=True)
    assert tried == [near.key, far.key]


@pytest.mark.parametrize("device", ["ssh://pi@board/ort:cpu", "pool:ssh://a/ort:cpu,ssh://b/ort:cpu"])
def test_a_search_that_is_done_opens_no_line_to_a_device_for_what_nothing_beats(
    raced: Workbench, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    fast, near, far = three(raced.space)
    where, asked = study_place(raced), problem(raced)
    slower = {"latency_ms": 1.3, "latency_ratio": 1.3, "latency_unstable": 0.0}
    for trial in searched(raced).trials:
        if trial.arch == fast:
            correct_trial(asked, trial, slower, storage=where.storage, name=where.name)
    profile = raced.config.profile.model_copy(update={"device": device})
    raced.config = raced.config.model_copy(update={"profile": profile})

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the device is asked")

    monkeypatch.setattr(concluding, "write_candidate", opened)
    monkeypatch.setattr(concluding, "score", opened)
    told: list[str] = []
    listener: Any = SimpleNamespace(note=told.append)
    result = concluded(raced, where, searched(raced), listener, fresh=False)
    assert {trial.arch for trial in result.trials if trial.is_partial} == {near, far}
    assert len(told) == 1
    assert "nothing beats any more are scored on a part of the images only" in told[0]


def test_what_is_timed_again_over_a_line_frees_what_is_then_scored_over_it(
    raced: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = raced.config.profile.model_copy(update={"device": "ssh://pi@board/ort:cpu"})
    raced.config = raced.config.model_copy(update={"profile": profile})
    monkeypatch.setattr(concluding, "score", lambda *_, **__: Accuracy(160, 200))
    result = concluded(raced, study_place(raced), searched(raced), Silent(), fresh=False)
    assert three(raced.space)[1] in [trial.arch for trial in result.front]
