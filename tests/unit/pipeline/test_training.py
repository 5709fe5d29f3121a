from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nestling.config import load_config
from nestling.pipeline.forecast import Forecast
from nestling.pipeline.listening import Silent
from nestling.pipeline.summary import training_cost
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.run import Run, RunError
from nestling.train.account import Spent
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress

TOY = Path(__file__).parents[2] / "toy.toml"


class Hearing(Silent):
    """Notes what training cost; interrupts it after step `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.heard: list[tuple[Spent, Forecast]] = []

    def spent(self, spent: Spent, forecast: Forecast) -> None:
        self.heard.append((spent, forecast))

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        del progress
        if record.step == self.stop:
            raise KeyboardInterrupt


def bench(folder: Path) -> Workbench:
    settings = [
        "train.epochs=2", "train.checkpoint_seconds=0", "train.strategy=alone", "train.warmup_epochs=0"
    ]  # fmt: skip
    return Workbench(Run.create(folder, load_config(TOY, overrides=settings)))


def finished(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


def test_a_finished_training_tells_what_it_cost_beside_what_was_forecast(tmp_path: Path) -> None:
    hearing = Hearing()
    train_supernet(bench(tmp_path), listener=hearing)
    ((spent, forecast),) = hearing.heard
    told = finished(tmp_path)
    assert told["spent"] == spent.to_dict()
    assert told["forecast"] == forecast.to_dict()
    assert (spent.steps, spent.images) == (forecast.steps, forecast.images) == (6, 6 * 64)
    assert spent.macs == pytest.approx(forecast.macs)  # one network, every step
    assert spent.seconds > 0


def test_a_training_that_was_interrupted_counts_its_finished_steps_once(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_supernet(bench(whole), listener=Silent())
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train_supernet(bench(parts), listener=Hearing(stop))
        assert not (parts / "training.json").exists()
    train_supernet(bench(parts), listener=Silent())
    found, wanted = (finished(folder)["spent"] for folder in (parts, whole))
    assert {**found, "seconds": 0.0} == {**wanted, "seconds": 0.0}


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_refused_until_training_has_finished_again(
    tmp_path: Path,
) -> None:
    train_supernet(bench(tmp_path), listener=Silent())
    wanted = bench(tmp_path).supernet.state_dict()
    last = max((tmp_path / "training").glob("step-*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(
        RunError, match=rf"{last.name}, is damaged.*remove .*training\.json and run `nestling t"
    ):
        _ = bench(tmp_path).supernet
    (tmp_path / "training.json").unlink()
    with pytest.warns(RuntimeWarning, match="is damaged"):
        train_supernet(bench(tmp_path), listener=Silent())
    found = bench(tmp_path).supernet.state_dict()
    assert all(bool((found[name] == tensor).all()) for name, tensor in wanted.items())
    assert last.read_bytes() == content


FORECAST = {"steps": 100, "images": 6400, "macs": 2e12, "seconds": 50.0}
SPENT: dict[str, Any] = {
    "steps": 100, "images": 6400, "macs": 2.2e12, "macs_error": 1e10, "seconds": 75.0,
    "joules": {"cpu": 4321.0, "dram": None, "gpu": None},
}  # fmt: skip


def said(found: dict[str, str]) -> dict[str, str]:
    return {name: fact.replace("\N{NARROW NO-BREAK SPACE}", " ") for name, fact in found.items()}


def test_the_cost_is_said_with_its_forecast_and_only_energy_that_was_told() -> None:
    assert said(training_cost({"spent": SPENT, "forecast": FORECAST})) == {
        "steps": "100",
        "images": "6.40 k",
        "multiply-accumulates": "2.20 T ± 10.0 G (forecast 2.00 T)",
        "wall time": "1 min 15 s (forecast 50 s)",
        "energy, cpu": "4.32 kJ",
    }
    untold = {**SPENT, "macs_error": 0.0, "joules": dict.fromkeys(("cpu", "dram", "gpu"))}
    found = said(training_cost({"spent": untold, "forecast": FORECAST}))
    assert found["multiply-accumulates"] == "2.20 T (forecast 2.00 T)"
    assert found["energy"] == "not told by the machine"


def test_a_training_that_nobody_counted_has_no_cost() -> None:
    assert training_cost({}) == {}
    assert training_cost({"finished": True, "forecast": FORECAST}) == {}
