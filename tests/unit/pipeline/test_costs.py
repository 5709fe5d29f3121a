"""What a search is told of costs beforehand: exactly, kept, and limits that nothing keeps refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nestling.config import load_config
from nestling.pipeline import candidate, costs
from nestling.pipeline.costs import COSTS, file_costs, known_costs
from nestling.pipeline.latency import LatencyPredictor
from nestling.pipeline.listening import Silent
from nestling.pipeline.workbench import Workbench
from nestling.profile import Fingerprint
from nestling.profile.prediction import LatencyModel
from nestling.quant import Unquantizable
from nestling.run import Run
from nestling.search import InfeasibleLimit, Problem
from nestling.search.encoding import Encoding
from nestling.space import Arch, SearchSpace, load_space

TESTS = Path(__file__).parents[2]
HERE = Fingerprint("ort:cpu", "a processor", (), 2, "linux", "runtime 1", "0123456789ab", False)


class Noting(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def toy_macs(_: Any, arch: Arch) -> int:
    """As multiply-accumulates are, without building anything."""
    inner = arch.integer("s1.width") * arch.integer("s1.depth") * arch.integer("s1.b1.kernel") ** 2
    return inner * arch.integer("resolution") ** 2


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LEAST_SAMPLES", 60)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    bench = Workbench(Run.create(folder, load_config(TESTS / "toy.toml")))
    assert bench.space.size > 1
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "toy")
    return tmp_path / "toy"


def opened(
    folder: Path,
    *,
    objectives: tuple[str, ...] = ("top1", "mmacs"),
    limits: dict[str, float] | None = None,
    strategy: str = "predictor",
) -> Workbench:
    bench = Workbench(Run.open(folder))
    search = bench.config.search.model_copy(
        update={"objectives": objectives, "limits": limits or {}, "strategy": strategy}
    )
    bench.config = bench.config.model_copy(update={"search": search})
    bench.device = SimpleNamespace(fingerprint=HERE, close=lambda: None)
    return bench


def told(bench: Workbench, metric: str, arch: Arch) -> float:
    exact = known_costs(bench, listener=Silent()).exact[metric]
    return float(exact(Encoding(bench.space).codes([arch]))[0])


def test_multiply_accumulates_are_told_and_not_learnt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    bench, listener = opened(folder), Noting()
    exact = known_costs(bench, listener=listener).exact["mmacs"]
    codes = Encoding(bench.space).sample(40, np.random.default_rng(3))
    truth = np.array([toy_macs(None, arch) / 1e6 for arch in Encoding(bench.space).archs(codes)])
    assert exact(codes) == pytest.approx(truth, rel=0.2)
    assert "mmacs is computed, not learnt" in listener.notes[0]


def test_only_what_is_asked_for_is_computed_and_for_whom_it_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_computed", lambda _: {"size_mb": lambda _: pytest.fail("computed")})
    assert known_costs(opened(folder), listener=Silent()).exact == {}
    random = opened(folder, objectives=("top1", "size_mb"), strategy="random")
    assert known_costs(random, listener=Silent()).exact == {}


def test_multiply_accumulates_are_told_also_where_nobody_asks_for_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    found = known_costs(opened(folder, objectives=("top1", "latency_ms")), listener=Silent())
    assert found.exact.keys() == {"mmacs"}


def test_costs_are_computed_once_for_all_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    bench = opened(folder)
    largest = bench.space.largest
    first = told(bench, "mmacs", largest)
    assert json.loads((folder / COSTS).read_text())["mmacs"][largest.key] == first
    monkeypatch.setattr(Workbench, "macs", lambda *_: pytest.fail("counted again"))
    assert told(opened(folder), "mmacs", largest) == first


def test_computing_that_was_cut_off_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Arch] = []

    def counting(_: Any, arch: Arch) -> int:
        if len(asked) == 40:
            raise KeyboardInterrupt
        asked.append(arch)
        return toy_macs(None, arch)

    monkeypatch.setattr(Workbench, "macs", counting)
    with pytest.raises(KeyboardInterrupt):
        known_costs(opened(folder), listener=Silent())
    assert len(json.loads((folder / COSTS).read_text())["mmacs"]) == 25
    before, asked[:] = set(asked[:25]), []
    known_costs(opened(folder), listener=Silent())
    assert asked
    assert not before & set(asked)


def test_a_limit_below_the_least_size_is_refused_with_that_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the least is at neither end of the space
    least = 0.02

    def size(arch: Arch) -> float:
        return least + abs(arch.integer("s1.width") - 16) / 100 + arch.integer("s1.depth") / 1000 - 0.001

    monkeypatch.setattr(costs, "_computed", lambda _: {"size_mb": size})
    bench = opened(folder, limits={"size_mb": 0.019})
    with pytest.raises(InfeasibleLimit, match=r"size_mb at most 0.019: the least .* is 0.02 "):
        known_costs(bench, listener=Silent())
    bench = opened(folder, limits={"size_mb": 0.0201})
    assert known_costs(bench, listener=Silent()).exact.keys() == {"size_mb"}


def test_archs_of_which_no_file_is_made_take_nothing_from_what_is_known_of_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs_of_file(_: Any, arch: Arch) -> dict[str, float]:
        if arch["s1.width"] == 8 and arch["s1.precision"] == "w8a8":  # the cheapest ones
            raise Unquantizable("between signed and unsigned integers")
        size = 0.01 * arch.integer("s1.width") + (0.01 if arch["s1.precision"] == "fp32" else 0.0)
        return {"size_mb": size + 0.001 * arch.integer("s1.depth")}

    monkeypatch.setattr(costs, "file_costs", costs_of_file)
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    bench, listener = opened(folder, objectives=("top1", "size_mb"), limits={"size_mb": 0.092}), Noting()
    assert "size_mb" in known_costs(bench, listener=listener).exact
    assert any("size_mb is computed, not learnt" in note for note in listener.notes)
    assert None in json.loads((folder / COSTS).read_text())["size_mb"].values()


def test_a_limit_is_refused_by_the_cheapest_archs_that_can_be_had(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(arch: Arch) -> float | None:
        # that of the cheapest of all is not known
        return None if arch["s1.width"] == arch["resolution"] == 8 else 0.001 * arch.integer("resolution")

    monkeypatch.setattr(costs, "_computed", lambda _: {"size_mb": size})
    with pytest.raises(InfeasibleLimit, match=r"the least .* is 0\.008 "):
        known_costs(opened(folder, limits={"size_mb": 0.007}), listener=Silent())


def test_the_costs_of_a_mix_that_cannot_be_had_are_none(folder: Path) -> None:
    bench = opened(folder)
    mixed = Arch.from_json(json.dumps({**bench.space.smallest, "stem.precision": "w8a8-signed"}))
    computed = costs._computed(bench)
    assert computed["size_mb"](mixed) is None
    assert computed["peak_mb"](mixed) is None


def test_no_network_is_written_twice_for_its_size_and_its_peak(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Arch] = []

    def costs_of_file(_: Any, arch: Arch) -> dict[str, float]:
        written.append(arch)
        return {"size_mb": 0.01 * arch.integer("s1.width"), "peak_mb": 0.001 * arch.integer("resolution")}

    monkeypatch.setattr(costs, "file_costs", costs_of_file)
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    bench = opened(folder, objectives=("top1", "size_mb"), limits={"peak_mb": 1.0})
    assert {"size_mb", "peak_mb"} <= known_costs(bench, listener=Silent()).exact.keys()
    assert len(written) == len(set(written)) >= 40


def test_a_cost_that_cannot_be_told_from_some_is_learnt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_computed", lambda _: {"mmacs": lambda a: 1 + int(a.key, 16) % 97})
    listener = Noting()
    assert known_costs(opened(folder), listener=listener).exact == {}
    assert "mmacs is learnt from the candidates" in listener.notes[0]


@pytest.fixture
def space() -> SearchSpace:
    return load_space(TESTS / "toy_space.toml").with_constants({"classes": 10})


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_sizes_that_are_computed_are_those_of_candidates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    bench = opened(folder)
    arch = bench.space.smallest if end == "smallest" else bench.space.largest
    torch.manual_seed(7)
    network = bench.family.build(arch).eval()  # other weights than those that costs are computed with
    monkeypatch.setattr(candidate, "verify_candidate", lambda *_: 0.0)
    found = candidate.write_candidate(bench, arch, tmp_path / "model.onnx", network=network)
    assert file_costs(bench, arch) == candidate.cost_metrics(found)


NO_MODEL = LatencyModel((), (), (), 1.0, 1.0, (), (), (), 0.0, 0.0, 1.0, (), (), 1.0)


def latency_model(folder: Path, *, tau: float, device: str = HERE.key, reference_ms: float = 1.0) -> None:
    content = {"device": device, "told": "another", "networks": 24, "reference_ms": reference_ms}
    content["held_out"] = {"model": {"tau": tau}}
    (folder / "latency_model.json").write_text(json.dumps(content))


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(bench: Workbench) -> Any:
        told: Any = bench.run.read_json("latency_model.json")
        tau, networks = told["held_out"]["model"]["tau"], told["networks"]
        reference_ms, device = told["reference_ms"], told["device"]
        return LatencyPredictor(NO_MODEL, reference_ms, bench.family, {}, device, told["told"], networks, tau)

    def predict(predictor: LatencyPredictor, arch: Arch) -> float:
        return predictor.reference_ms * toy_macs(None, arch) / 1e3

    monkeypatch.setattr(costs, "load_predictor", load)
    monkeypatch.setattr(costs, "_computed", lambda _: {})
    monkeypatch.setattr(costs, "predict_latency", predict)


@pytest.mark.usefixtures("predicted")
def test_a_good_latency_model_is_a_prior_of_the_latency(folder: Path) -> None:
    latency_model(folder, tau=0.93)
    bench, listener = opened(folder, objectives=("top1", "latency_ms"), limits={"latency_ms": 1e-3}), Noting()
    found = known_costs(bench, listener=listener)
    assert found.exact == {}
    codes = Encoding(bench.space).codes([bench.space.largest])
    wanted = np.log(toy_macs(None, bench.space.largest) / 1e3)
    assert found.priors["latency_ms"](codes) == pytest.approx(wanted, abs=0.1)
    assert "Kendall tau 0.93" in listener.notes[0]
    assert "no network is predicted to keep latency_ms at most 0.001" in listener.notes[1]


@pytest.mark.usefixtures("predicted")
def test_what_was_predicted_is_told_anew_where_the_reference_model_s_time_is(folder: Path) -> None:
    found = []
    for reference_ms in (1.5, 1.0):
        latency_model(folder, tau=0.93, reference_ms=reference_ms)
        bench, listener = opened(folder, objectives=("top1",), limits={"latency_ms": 1e-3}), Noting()
        prior = known_costs(bench, listener=listener).priors["latency_ms"]
        least = reference_ms * toy_macs(None, bench.space.smallest) / 1e3
        assert f"the fastest may take {least:.4g} ms" in listener.notes[1]
        found.append(prior(Encoding(bench.space).codes([bench.space.largest])))
    assert found[0] - found[1] == pytest.approx(np.log(1.5))


@pytest.mark.usefixtures("predicted")
@pytest.mark.parametrize(
    ("tau", "device", "why"),
    [(0.6, HERE.key, "tau .* is 0.60"), (float("nan"), HERE.key, "is nan"), (0.95, "x", "another device")],
)
def test_a_latency_model_that_is_not_good_or_not_of_this_device_is_left_out_and_told(
    folder: Path, tau: float, device: str, why: str
) -> None:
    latency_model(folder, tau=tau, device=device)
    listener = Noting()
    bench = opened(folder, objectives=("top1", "latency_ms"))
    assert known_costs(bench, listener=listener).priors == {}
    assert len(listener.notes) == 1
    assert re.search(why, listener.notes[0])


def test_what_is_known_can_be_of_a_part_of_the_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "macs", toy_macs)
    bench = opened(folder)
    part = bench.space.with_constants({"s1.width": 8, "resolution": 16})
    asked = Problem.parse(part, objectives=["top1"], limits={})
    exact = known_costs(bench, listener=Silent(), asked=asked).exact["mmacs"]
    codes = Encoding(part).sample(20, np.random.default_rng(3))
    truth = [toy_macs(None, arch) / 1e6 for arch in Encoding(part).archs(codes)]
    assert exact(codes) == pytest.approx(truth, rel=0.2)
