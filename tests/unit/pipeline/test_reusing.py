"""What another device's run has found out is taken over where its candidates are the same networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.config import load_config
from nestling.pipeline import reusing, searching
from nestling.pipeline.listening import Silent
from nestling.pipeline.reusing import Reused, reused
from nestling.pipeline.studies import problem, study_place
from nestling.pipeline.workbench import Workbench
from nestling.profile import Fingerprint, Measurement
from nestling.quant import QuantPolicy
from nestling.run import Run, RunError
from nestling.search import SearchResult, Trial
from nestling.space import Arch

TESTS = Path(__file__).parents[2]
HERE = Fingerprint("ort:cpu", "a processor", (), 2, "linux", "runtime 1", "0123456789ab", False)
FOUND = {"size_mb": 0.1, "mmacs": 1.0, "peak_mb": 0.2, "latency_ms": 7.0, "top1_images": 60.0}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that looks trained."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    bench = Workbench(Run.create(folder, load_config(TESTS / "toy.toml")))
    assert bench.space.size > 1
    bench.run.write_json("data.json", {"fingerprint": bench.data.fingerprint})
    bench.run.write_json("training.json", {})
    bench.checkpoints.mkdir()
    (bench.checkpoints / "checkpoints.json").write_text('[{"sha256": "abc"}]')
    bench.run.write_json("reference.json", {"fingerprint": {"int8_saturates": False}})
    return folder


@pytest.fixture
def other(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "other")
    return tmp_path / "other"


def open_beside(other: Path) -> Workbench:
    folder = other.with_name("mine")
    if not folder.exists():
        shutil.copytree(other, folder)
    bench = Workbench(Run.open(folder))
    search = bench.config.search.model_copy(update={"warm_from": str(other)})
    bench.config = bench.config.model_copy(update={"search": search})
    bench.device = SimpleNamespace(fingerprint=HERE, close=lambda: None)
    return bench


def floats(arch: Arch) -> dict[str, Any]:
    return {name: "fp32" if name.endswith("precision") else value for name, value in arch.items()}


def tried(monkeypatch: pytest.MonkeyPatch, bench: Workbench, **more: float) -> tuple[Arch, Arch, Arch]:
    """What the other run tried: the largest network, one in floats beaten by it, and one that lost a race."""
    space = bench.space
    beaten = space.canonical({**floats(space.smallest), "s1.width": 16})
    trials = tuple(
        Trial(number, arch, {**FOUND, "top1": top1, "top1_partial": partial, **more}, "complete")
        for number, (arch, top1, partial) in enumerate(
            [(space.largest, 0.9, 0.0), (beaten, 0.8, 0.0), (space.smallest, 0.3, 1.0)]
        )
    )
    result = SearchResult(problem(bench), trials)
    monkeypatch.setattr(reusing, "searched", lambda _: result)
    return space.largest, beaten, space.smallest


def test_whole_scores_and_sizes_are_taken_over_and_latencies_are_not(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_beside(other)
    largest, beaten, _ = tried(monkeypatch, bench)
    found = reused(bench, listener=Silent())
    assert found.metrics.keys() == {largest, beaten}
    wanted = {name: value for name, value in FOUND.items() if name != "latency_ms"}
    assert found.metrics[beaten] == {**wanted, "top1": 0.8}
    assert found.front == (largest,)


def test_what_was_taken_over_is_kept_where_the_other_run_is_not_seen(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_beside(other)
    tried(monkeypatch, bench)
    found = reused(bench, listener=Silent())
    other.rename(other.with_name("elsewhere"))
    again = Workbench(Run.open(bench.run.folder))
    again.config = bench.config
    assert reused(again, listener=Silent()) == found
    (bench.run.folder / "reused.json").unlink()
    with pytest.raises(RunError, match="holds no run"):
        reused(again, listener=Silent())


def test_quantized_networks_are_passed_over_where_weights_have_fewer_bits(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other / "reference.json").write_text('{"fingerprint": {"int8_saturates": true}}')
    bench = open_beside(other)
    space = bench.space
    tried(monkeypatch, bench)
    quantized = space.canonical({**space.largest, "stem.precision": "w8a8"})
    (result,) = [reusing.searched(bench)]  # type: ignore[attr-defined]
    more = Trial(3, quantized, {**FOUND, "top1": 0.95}, "complete")
    monkeypatch.setattr(reusing, "searched", lambda _: SearchResult(result.problem, (*result.trials, more)))
    assert quantized not in reused(bench, listener=Silent()).metrics
    assert space.largest in reused(bench, listener=Silent()).metrics
    (other / "reference.json").write_text('{"fingerprint": {"int8_saturates": false}}')
    assert quantized in reused(bench, listener=Silent()).metrics


def test_precisions_of_the_other_device_alone_are_passed_over(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_beside(other)
    largest, _, _ = tried(monkeypatch, bench)
    bench.run.space_file.write_text(
        bench.run.space_file.read_text().replace('["w8a8", "fp32"]', '["w8a8"]', 1)
    )
    again = open_beside(other)
    assert again.space != bench.space
    assert largest not in again.space.walk()
    assert reused(again, listener=Silent()).metrics == {}


def change_config(other: Path, part: str, key: str, value: object) -> None:
    content = json.loads((other / "config.json").read_text())
    content[part][key] = value
    (other / "config.json").write_text(json.dumps(content))


DIFFERENT: dict[str, Callable[[Path], object]] = {
    "the supernet's weights": lambda other: (other / "training" / "checkpoints.json").write_text(
        '[{"sha256": "abd"}]'
    ),
    "the images, or how they are split": lambda other: (other / "data.json").write_text(
        '{"fingerprint": "x"}'
    ),
    "[quant]": lambda other: change_config(other, "quant", "rounding", "moments"),
    "search.recalibration_images": lambda other: change_config(other, "search", "recalibration_images", 5),
    "the space (but for its precisions)": lambda other: (other / "space.toml").write_text(
        (other / "space.toml").read_text().replace("[8, 16]", "[8, 24]", 1)
    ),
}


@pytest.mark.parametrize("what", list(DIFFERENT))
def test_a_run_whose_candidates_are_other_networks_is_refused(
    other: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bench = open_beside(other)
    tried(monkeypatch, bench)
    DIFFERENT[what](other)
    with pytest.raises(RunError) as caught:
        reused(bench, listener=Silent())
    assert f"the runs differ in {what}. " in str(caught.value)


def test_a_run_does_not_begin_with_itself_or_with_nothing(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_beside(other)
    empty = SearchResult(problem(bench), ())
    monkeypatch.setattr(reusing, "searched", lambda _: empty)
    with pytest.raises(RunError, match="was not searched yet"):
        reused(bench, listener=Silent())
    bench.config = bench.config.model_copy(
        update={"search": bench.config.search.model_copy(update={"warm_from": str(bench.run.folder)})}
    )
    with pytest.raises(RunError, match="its own candidates"):
        reused(bench, listener=Silent())


def test_of_what_is_known_only_latency_is_measured(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_beside(other)
    (bench.run.folder / "reference.json").unlink()
    arch = bench.space.smallest
    written = SimpleNamespace(policy=QuantPolicy(()), resolution=8)
    took = Measurement(HERE, (0.004,) * 20, (0.002,) * 20, 0.1, 0.1)
    monkeypatch.setattr(searching, "write_candidate", lambda *_: written)
    monkeypatch.setattr(searching, "cost_metrics", lambda *_: {"size_mb": 0.1})
    monkeypatch.setattr(searching, "measure", lambda *_: took)
    scoring: Any = lambda *_, **__: pytest.fail("scored")  # noqa: E731
    known = {arch: {"top1": 0.8, "size_mb": 0.1}}
    metrics = searching._evaluation(bench, study_place(bench), scoring, known, note=print)(arch)
    assert metrics["top1"] == 0.8
    assert metrics["latency_ms"] == pytest.approx(4.0)
    assert metrics["top1_reused"] == 1.0


def test_nothing_is_taken_over_where_no_run_is_named(begun: Path) -> None:
    assert reused(Workbench(Run.open(begun)), listener=Silent()) == Reused({})
