"""What a search is refused leaves the run as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nestling.config import ConfigError, load_config
from nestling.data import DataError
from nestling.pipeline import searching, stages
from nestling.pipeline.listening import Silent
from nestling.pipeline.searching import join_search, search_supernet
from nestling.pipeline.settling import settle
from nestling.pipeline.stages import open_run, prepare
from nestling.pipeline.studies import about, is_searched, problem, searched, study_place
from nestling.pipeline.workbench import Workbench
from nestling.run import Run, RunError
from nestling.search import InfeasibleLimit, Problem, StudyMismatch, search
from nestling.space import Arch

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _device_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "offer_precisions", lambda *_, **__: None)
    monkeypatch.setattr(Workbench, "device", SimpleNamespace(fingerprint="a device"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that looks trained, with a study of three candidates of 1 ms."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    bench = Workbench(Run.create(folder, load_config(TESTS / "toy.toml")))
    bench.run.write_json("data.json", {"fingerprint": bench.data.fingerprint})
    bench.run.write_json("training.json", {})
    bench.checkpoints.mkdir()
    (bench.checkpoints / "checkpoints.json").write_text('[{"sha256": "abc"}]')

    def evaluate(arch: Arch) -> dict[str, float]:
        return {"top1": 0.5, "latency_ms": 1.0, "mmacs": bench.macs(arch) / 1e6}

    where = study_place(bench)
    search(problem(bench), evaluate, storage=where.storage, name=where.name, trials=3)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("search.limits.mmacs=0.001", InfeasibleLimit, "mmacs at most 0.001"),
        ("search.limits.latency_ms=0.4", InfeasibleLimit, "latency_ms at most 0.4"),
        ("search.limits.size_mb=5.0", StudyMismatch, "evaluated without size_mb"),
        ("search.limits.foo=1", ConfigError, "unknown metric 'foo'"),
        ("search.strategy=predicter", ConfigError, "did you mean 'predictor'"),
        ("search.study=mysql://h/d", ConfigError, "postgresql://user@host"),
        ("search.warm_from=/nowhere", RunError, "holds no run"),
    ],
)
def test_a_search_that_is_refused_leaves_run_and_study_as_they_were(
    run: Path, override: str, error: type[Exception], message: str
) -> None:
    before = {name: (run / name).read_bytes() for name in ("config.json", "study.db", "space.toml")}
    with pytest.raises(error, match=message):
        search_supernet(open_run(run, overrides=[override]), listener=Silent())
    assert {name: (run / name).read_bytes() for name in before} == before
    assert len(searched(open_run(run)).complete) == 3


@pytest.mark.parametrize("theirs", ["objectives", "space", "weights"])
def test_a_search_that_is_sent_to_the_study_of_another_leaves_both_as_they_were(
    run: Path, tmp_path: Path, theirs: str
) -> None:
    mine, file = open_run(run), tmp_path / "other.db"
    space, objectives = mine.space, ("top1", "latency_ms") if theirs != "objectives" else ("top1",)
    if theirs == "space":
        first = space.open_choices[0]
        space = space.only({first.name: first.values[:1]})
    search(
        Problem.parse(space, objectives=objectives, limits={}),
        lambda _: {"top1": 0.5, "latency_ms": 1.0},
        storage=file,
        name="nestling",
        trials=2,
        about={**about(mine), "weights": "theirs" if theirs == "weights" else "abc"},
    )
    before = file.read_bytes(), (run / "config.json").read_bytes()
    asked = [f"search.study={file}", "search.limits.latency_ms=5"]
    with pytest.raises(StudyMismatch, match=rf"of another problem \(it differs in .*{theirs}"):
        search_supernet(open_run(run, overrides=asked), listener=Silent())
    assert (file.read_bytes(), (run / "config.json").read_bytes()) == before
    assert len(searched(open_run(run)).complete) == 3


def test_a_run_without_weights_lays_no_limits_over_the_study_of_another(run: Path, tmp_path: Path) -> None:
    file, mine = tmp_path / "other.db", open_run(run)
    metrics = {"top1": 0.5, "latency_ms": 1.0}
    search(problem(mine), lambda _: metrics, storage=file, name="nestling", trials=2, about=about(mine))
    before = file.read_bytes()
    (run / "training" / "checkpoints.json").unlink()
    asked = [f"search.study={file}", "search.limits.latency_ms=5"]
    with pytest.raises(StudyMismatch, match=r"differs in limits, weights"):
        prepare(load_config(TESTS / "toy.toml", overrides=asked), run, listener=Silent())
    assert file.read_bytes() == before


def test_a_run_of_before_whose_limits_were_left_bad_is_told_so_and_mended(run: Path) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["search"]["limits"] = {"foo": 1.0}
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="unknown metric 'foo'"):
        searched(open_run(run))
    stored["search"]["limits"] = {"mmacs": 0.001}
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(StudyMismatch, match="`nestling search` lays the run's limits over it"):
        searched(open_run(run))
    settle(open_run(run, overrides=["search.limits={}"]), note=lambda _: None)
    assert len(searched(open_run(run)).complete) == 3


def test_what_is_asked_for_is_kept_with_the_studys_limits(run: Path) -> None:
    bench, told = open_run(run, overrides=["search.limits.latency_ms=1.5", "search.trials=3"]), list[str]()
    assert Run.open(run).config().search.limits == {}
    assert is_searched(bench)
    settle(bench, note=told.append)
    assert Run.open(run).config() == bench.config
    assert searched(open_run(run)).problem.limits == problem(bench).limits
    assert told == [
        "3 candidates of before are judged by the limits that are given now",
        "all 3 candidates were evaluated under other limits; `--set search.trials=6` looks for more under "
        "these",
    ]


def test_a_configuration_that_is_refused_leaves_a_run_that_has_begun_as_it_was(run: Path) -> None:
    before = (run / "config.json").read_bytes()
    for override in ("search.limits.mmacs=0.001", "search.limits.size_mb=5.0"):
        config = load_config(TESTS / "toy.toml", overrides=[override])
        with pytest.raises((ConfigError, StudyMismatch)):
            prepare(config, run, listener=Silent())
        assert (run / "config.json").read_bytes() == before
    config = load_config(TESTS / "toy.toml", overrides=["search.limits.latency_ms=1.5"])
    prepare(config, run, listener=Silent()).close()
    assert searched(open_run(run)).problem.limits == problem(open_run(run)).limits != ()


def test_what_is_refused_late_ends_the_devices_worker(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Workbench] = []
    monkeypatch.setattr(Workbench, "close", lambda bench: closed.append(bench))
    refused = load_config(TESTS / "toy.toml", overrides=["search.limits.size_mb=5.0"])
    with pytest.raises(StudyMismatch, match="evaluated without size_mb"):
        prepare(refused, run, listener=Silent())
    assert len(closed) == 1

    def fail(_: Workbench) -> None:
        raise OSError("the images are gone")

    monkeypatch.setattr(stages, "data_facts", fail)
    with pytest.raises(OSError, match="the images are gone"):
        prepare(load_config(TESTS / "toy.toml"), run, listener=Silent())
    assert len(closed) == 2


def test_a_space_may_be_mended_until_training_begins(tmp_path: Path) -> None:
    space = Path(shutil.copy(TESTS / "toy_space.toml", tmp_path / "space.toml"))
    config = load_config(TESTS / "toy.toml").model_copy(update={"space": str(space)})
    prepare(config, tmp_path / "run", listener=Silent()).close()
    space.write_text(space.read_text().replace("kernel = [3, 5]", "kernel = [3, 7]"))
    bench = prepare(config, tmp_path / "run", listener=Silent())
    bench.close()
    assert {values for c in bench.space.choices if "kernel" in c.name for values in c.values} == {3, 7}
    bench.checkpoints.mkdir()
    space.write_text(space.read_text().replace("kernel = [3, 7]", "kernel = [3, 5]"))
    with pytest.raises(ConfigError, match=r"space\.toml was changed since .* began; begin a new run"):
        prepare(config, tmp_path / "run", listener=Silent())


def write_images(root: Path, *, shift: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("val", 30)):
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8) + np.uint8(shift)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


def test_a_copy_on_another_machine_is_searched_there_with_the_same_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        f"data.source={write_images(tmp_path / 'there')}",
        "torch_device=cuda",
        "data.train_images=30",
        "data.test_images=20",
    ]
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml", overrides=settings)))
    bench.run.write_json("data.json", {"fingerprint": bench.data.fingerprint})
    bench.run.write_json("training.json", {})
    assert bench.space.size > 1
    bench.checkpoints.mkdir()
    (tmp_path / "there").rename(tmp_path / "here")
    with pytest.raises(DataError, match="there"):
        _ = open_run(tmp_path / "run").data
    other = write_images(tmp_path / "other", shift=1)
    with pytest.raises(RunError, match=r"no longer those .* name the right ones with --set data\.source="):
        open_run(tmp_path / "run", overrides=[f"data.source={other}"])

    asked = [f"data.source={tmp_path / 'here'}", "torch_device=cpu", "data.workers=0"]
    seen: list[Workbench] = []
    monkeypatch.setattr(searching, "_search", lambda bench, *_: seen.append(bench))
    join_search(open_run(tmp_path / "run", overrides=asked), listener=Silent())
    assert Run.open(tmp_path / "run").config() == bench.config  # a worker keeps it to itself
    assert seen[0].torch_device.type == "cpu"
    settle(open_run(tmp_path / "run", overrides=asked), note=pytest.fail)
    assert open_run(tmp_path / "run").data.fingerprint == bench.data.fingerprint


def test_a_study_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    config = load_config(TESTS / "toy.toml", overrides=["search.study=mysql://h/d"])
    with pytest.raises(ConfigError, match="postgresql://user@host"):
        prepare(config, tmp_path / "run", listener=Silent())
