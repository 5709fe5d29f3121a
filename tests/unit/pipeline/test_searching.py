from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestling.config import load_config
from nestling.models.graph import Untraceable
from nestling.pipeline import racing, searching
from nestling.pipeline.searching import _evaluation, _seeds
from nestling.pipeline.studies import study_place
from nestling.pipeline.workbench import Workbench
from nestling.quant import QuantPolicy, Unquantizable
from nestling.run import Run
from nestling.search import EvaluationFailed
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
    return _evaluation(bench, study_place(bench), racing.Scoring(bench), {})(bench.given_space.smallest)


def test_a_precision_for_research_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationFailed, match=r"w4a4 is for research: .* has no latency"):
        _evaluate(tmp_path / "run", monkeypatch, precision="w4a4", limits="{latency_ms = 5.0}")


def test_it_is_scored_where_no_latency_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _evaluate(tmp_path / "run", monkeypatch, precision="w4a4", limits="{}")
    assert metrics == {"top1": 0.5, "top1_images": 60.0, "top1_partial": 0.0, "mmacs": 1.0}


@pytest.mark.parametrize("error", [Untraceable, Unquantizable, ValueError])
def test_only_networks_that_cannot_be_quantized_have_no_seeds(
    error: type[ValueError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
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
