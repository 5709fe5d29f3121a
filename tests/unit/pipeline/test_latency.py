from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nestling.config import ConfigError, load_config
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import Family, family
from nestling.models.graph import trace
from nestling.models.graph_blocks import blocks
from nestling.pipeline import latency
from nestling.pipeline.latency import (
    block_signatures,
    description,
    learn_latency,
    load_predictor,
    predict_latency,
)
from nestling.pipeline.latency import spread as real_spread
from nestling.pipeline.listening import Silent
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.stages import open_run
from nestling.pipeline.steps import block_signature, steps
from nestling.pipeline.untrained import measure_blocks, measure_network, shapes_graph, untrained_graph
from nestling.pipeline.workbench import Workbench
from nestling.profile import DeviceError, Fingerprint, Measurement, WorkerDevice, connect
from nestling.profile.prediction import Description, describe
from nestling.quant import QuantPolicy, Unquantizable, check_policy
from nestling.run import Run, RunError
from nestling.search import EvaluationFailed
from nestling.space import Arch, SearchSpace, load_space

TESTS = Path(__file__).parents[2]
HERE = Fingerprint("ort:cpu", "a processor", (), 2, "linux", "runtime 1", "0123456789ab", False)
RESET = replace(HERE, runtime="runtime 1 (settings 1)")
REPLACED = replace(HERE, reference="f" * 12)
OTHER = Fingerprint("ort:cpu", "another one", (), 2, "linux", "runtime 1", "0123456789ab", False)


class Pretended:
    """A device of which only the fingerprint is asked."""

    name = "ort:cpu"

    def __init__(self, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint

    def close(self) -> None:
        """Has nothing to end."""


@cache
def described(arch: Arch) -> Description:
    """What there is to know of `arch`, whose every learning would build and trace it again."""
    return description(family("mobilenet"), arch, keep={})


@cache
def ratio(arch: Arch) -> float:
    """What the pretended device takes: calls, and multiply-accumulates, faster ones in integers."""
    rates = {"calls": 0.02, "w8a8 macs": 1 / 4e5, "fp32 macs": 1 / 1e5}
    return 0.1 + sum(
        rate * amount
        for name, amount in described(arch).sums.items()
        for ending, rate in rates.items()
        if name.endswith(ending)
    )


@cache
def drawn(count: int) -> list[Arch]:
    """Random archs of the toy run, both ends among them."""
    space = load_space(TESTS / "toy_space.toml").with_constants({"classes": 10})
    rng = random.Random(0)
    return list(dict.fromkeys([space.smallest, space.largest, *(space.sample(rng) for _ in range(count))]))


@cache
def macs(arch: Arch) -> int:
    return cost(build_shapes(family("mobilenet").build, arch), arch.integer("resolution")).macs


@pytest.fixture(autouse=True)
def _told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "description", lambda _, arch, keep: described(arch) if not keep else None)
    monkeypatch.setattr(latency, "spread", lambda _, count: drawn(count))
    monkeypatch.setattr(Workbench, "macs", lambda _, arch: macs(arch))


class Measuring:
    """Stands for `measure_network`: counts, is restless or refuses where it is told to."""

    def __init__(
        self,
        *,
        restless: bool = False,
        stop_after: int | None = None,
        refuses: Exception | None = None,
        refusals: int | None = None,
    ) -> None:
        self.count, self.restless, self.stop_after = 0, restless, stop_after
        self.refuses, self.refusals = refuses, refusals

    def __call__(self, device: Any, family: Family, arch: Arch, **_: Any) -> Measurement:
        del device, family
        if self.count == self.stop_after:
            raise KeyboardInterrupt
        self.count += 1
        if self.refuses is not None and (self.refusals is None or self.count <= self.refusals):
            raise self.refuses
        took = 0.002 * ratio(arch)
        second = 3 * took if self.restless else took
        return Measurement(HERE, (took, second) * 10, (0.002,) * 20, 0.1, 0.1)


def bench_on(folder: Path, fingerprint: Fingerprint) -> Workbench:
    bench = open_run(folder)
    bench.device = Pretended(fingerprint)  # type: ignore[assignment]
    return bench


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose space was checked, which takes longer than all that is tested here."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    Run.create(folder, load_config(TESTS / "toy.toml"))
    assert open_run(folder).space.size > 1
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space(TESTS / "toy_space.toml").with_constants({"classes": 10})


@pytest.fixture(scope="module")
def cpu() -> Iterator[WorkerDevice]:
    with connect("ort:cpu", seconds=0.02, timeout_seconds=60) as device:
        yield device


def learn(
    monkeypatch: pytest.MonkeyPatch, folder: Path, measuring: Measuring, *, networks: int = 18
) -> dict[str, Any]:
    monkeypatch.setattr(latency, "measure_network", measuring)
    return learn_latency(bench_on(folder, HERE), networks=networks, listener=Silent())


def test_what_is_learnt_predicts_archs_that_were_not_measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    found = learn(monkeypatch, folder, Measuring(), networks=24)
    told = found["held_out"]
    assert told["model"]["tau"] > 0.9
    assert told["model"]["tau"] > told["macs"]["tau"]
    assert told["model"]["mape"] < told["macs"]["mape"]
    bench = bench_on(folder, HERE)
    predictor = load_predictor(bench)
    assert predictor is not None
    largest = bench.space.largest
    assert predict_latency(predictor, largest) == pytest.approx(2 * ratio(largest), rel=0.1)


def test_measuring_that_was_cut_off_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(monkeypatch, folder, Measuring(stop_after=10))
    assert load_predictor(bench_on(folder, HERE)) is None
    rest = Measuring()
    found = learn(monkeypatch, folder, rest)
    assert rest.count == found["networks"] - 10
    assert rest.count > 0


def test_unstable_measurements_are_not_learnt_from(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(RunError, match="only 0 measurements"):
        learn(monkeypatch, folder, Measuring(restless=True), networks=16)


FAILURES = [DeviceError("no such operator"), EvaluationFailed("the worker was ended by SIGSEGV")]
"""What the real function raises before a file is timed, and while it is."""


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_device_that_refuses_everything_is_told_soon(
    monkeypatch: pytest.MonkeyPatch, folder: Path, failure: Exception
) -> None:
    measuring = Measuring(refuses=failure)
    with pytest.raises(type(failure), match=str(failure)):
        learn(monkeypatch, folder, measuring)
    assert measuring.count == 3


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_networks_on_which_the_device_fails_are_left_out(
    monkeypatch: pytest.MonkeyPatch, folder: Path, failure: Exception
) -> None:
    measuring = Measuring(refuses=failure, refusals=2)
    assert learn(monkeypatch, folder, measuring)["networks"] == len(drawn(18)) - 2


def test_networks_of_which_no_file_is_made_are_left_out_and_say_nothing_of_the_device(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    measuring = Measuring(refuses=Unquantizable("between signed and unsigned integers"), refusals=3)
    assert learn(monkeypatch, folder, measuring)["networks"] == len(drawn(18)) - 3


MIXING = ["w8a8", "w8a8-signed", "fp32"]


@pytest.mark.parametrize("same_macs", [False, True])
def test_networks_that_are_measured_can_all_be_written(
    monkeypatch: pytest.MonkeyPatch, folder: Path, same_macs: bool
) -> None:
    bench = open_run(folder)
    places = ["stem.precision", "s1.precision", "head.precision"]
    choices = tuple(
        replace(choice, values=tuple(MIXING)) if choice.name in places else choice
        for choice in bench.space.choices
    )
    vars(bench)["space"] = replace(bench.space, choices=choices)
    counted = (lambda _: 1) if same_macs else (lambda arch: arch["s1.width"] * arch["resolution"] ** 2)
    monkeypatch.setattr(Workbench, "macs", lambda _, arch: counted(arch))
    found = real_spread(bench, 6)
    assert len(found) >= 3
    for arch in found:
        graph = untrained_graph(bench.family, arch)
        check_policy(graph, quant_policy(bench.family, arch, graph))


class BlockByBlock:
    """Stands for `measure_blocks`: a network has one block, its own; failures and restless ones first."""

    def __init__(self, *, restless: int = 0, failures: int = 0, failure: Exception | None = None) -> None:
        self.restless, self.failures = restless, failures
        self.failure = failure or EvaluationFailed("the worker was ended by SIGSEGV")
        self.asked: list[str] = []

    def __call__(
        self, device: Any, family: Family, arch: Arch, *, known: Any, on_block: Any, **_: Any
    ) -> None:
        del device, family
        if arch.key in known:
            return
        self.asked.append(arch.key)
        if len(self.asked) <= self.failures:
            raise self.failure
        second = 0.009 if len(self.asked) <= self.restless + self.failures else 0.002
        on_block(arch.key, Measurement(HERE, (0.002, second) * 10, (0.002,) * 20, 0.1, 0.1))


def learn_blocks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, by_block: BlockByBlock
) -> tuple[dict[str, Any], int]:
    """The file of measurements, and of how many networks the table can tell."""
    monkeypatch.setattr(latency, "measure_network", Measuring())
    monkeypatch.setattr(latency, "measure_blocks", by_block)
    monkeypatch.setattr(latency, "block_signatures", lambda _, arch, **__: (arch.key,))
    found = learn_latency(bench_on(folder, HERE), networks=18, with_blocks=True, listener=Silent())
    measured = json.loads((folder / "latency_measured.json").read_text())
    return measured, found["held_out"]["table"]["told"]


def test_blocks_that_stay_unstable_are_flagged_and_taken_again_the_next_time(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    first = BlockByBlock(restless=2)
    measured, _ = learn_blocks(monkeypatch, folder, first)
    assert measured["unstable_blocks"] == sorted(first.asked[:2])
    assert measured["blocks"].keys() == set(first.asked)
    again = BlockByBlock()
    measured, _ = learn_blocks(monkeypatch, folder, again)
    assert set(again.asked) == set(first.asked[:2])
    assert measured["unstable_blocks"] == []
    assert measured["blocks"][again.asked[0]] == pytest.approx(1.0)


def test_blocks_on_which_the_device_fails_are_left_out_and_three_networks_in_a_row_end_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    by_block = BlockByBlock(failures=2)
    measured, told = learn_blocks(monkeypatch, folder, by_block)
    assert len(measured["blocks"]) == told == len(by_block.asked) - 2
    (folder / "latency_measured.json").unlink()
    with pytest.raises(EvaluationFailed, match="SIGSEGV"):
        learn_blocks(monkeypatch, folder, BlockByBlock(failures=3))


def test_blocks_of_which_no_file_is_made_say_nothing_of_the_device(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    by_block = BlockByBlock(failures=4, failure=Unquantizable("between signed and unsigned integers"))
    measured, told = learn_blocks(monkeypatch, folder, by_block)
    assert len(measured["blocks"]) == told == len(by_block.asked) - 4


def test_measurements_of_another_device_are_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    learn(monkeypatch, folder, Measuring())
    with pytest.raises(RunError, match="another device or runtime"):
        learn_latency(bench_on(folder, OTHER), networks=18, listener=Silent())


def test_what_was_measured_with_other_settings_of_the_runtime_is_measured_anew_and_told(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    learn(monkeypatch, folder, Measuring())
    measured = folder / "latency_measured.json"
    before = json.loads(measured.read_text())
    del before["fingerprint"]  # as files of before are
    measured.write_text(json.dumps(before | {"blocks": {"a": 1.0}, "unstable_blocks": ["a"]}))
    notes: list[str] = []
    listener: Any = Silent()
    listener.note = notes.append
    measuring = Measuring()
    monkeypatch.setattr(latency, "measure_network", measuring)
    found = learn_latency(bench_on(folder, RESET), networks=18, listener=listener)
    assert found["device"] == RESET.key
    assert found["networks"] == measuring.count == len(before["networks"])
    [note] = notes
    assert re.search(r"measured anew: .*runtime 1\) than it has now .*runtime 1 \(settings 1\)", note)
    after = json.loads(measured.read_text())
    assert (after["device"], after["blocks"]) == (RESET.key, {})
    assert "unstable_blocks" not in after


def as_reference(fingerprint: Fingerprint, latency_ms: float) -> str:
    """What `reference.json` holds."""
    told = {"key": fingerprint.key, "fingerprint": asdict(fingerprint), "latency_ms": latency_ms}
    return json.dumps(told)


@pytest.mark.parametrize(
    ("searched_on", "milliseconds"),
    [(HERE, (1.5, 1.0)), (RESET, (1.5, 1.0)), (OTHER, (2.0, 2.0)), (REPLACED, (2.0, 2.0))],
    ids=["this device", "other settings", "another device", "another reference model"],
)
def test_predictions_are_in_the_milliseconds_that_the_run_s_search_has_now(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    searched_on: Fingerprint,
    milliseconds: tuple[float, float],
) -> None:
    (folder / "reference.json").write_text(as_reference(searched_on, 1.5))
    assert learn(monkeypatch, folder, Measuring())["reference_ms"] == pytest.approx(milliseconds[0])
    (folder / "reference.json").write_text(as_reference(searched_on, 1.0))  # as `rescaled` does
    bench = bench_on(folder, HERE)
    predictor = load_predictor(bench)
    assert predictor is not None
    largest = bench.space.largest
    assert predict_latency(predictor, largest) == pytest.approx(milliseconds[1] * ratio(largest), rel=0.1)


def test_a_model_of_before_fingerprints_were_kept_follows_a_search_with_its_key(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    told = learn(monkeypatch, folder, Measuring())
    del told["fingerprint"]
    (folder / "latency_model.json").write_text(json.dumps(told))
    for searched_on, expected in ((HERE, 1.0), (RESET, 2.0)):
        (folder / "reference.json").write_text(as_reference(searched_on, 1.0))
        predictor = load_predictor(bench_on(folder, HERE))
        assert predictor is not None
        assert predictor.reference_ms == pytest.approx(expected)


def test_stable_trials_of_a_search_on_this_device_are_learnt_from_too(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    tried = [arch for arch in drawn(26) if arch not in drawn(18)]
    trials = [
        SimpleNamespace(
            arch=arch,
            state="complete",
            metrics={"latency_ratio": ratio(arch), "latency_unstable": float(number == 0)},
        )
        for number, arch in enumerate(tried)
    ]
    monkeypatch.setattr(latency, "searched", lambda _: SimpleNamespace(trials=trials))
    without = learn(monkeypatch, folder, Measuring())["networks"]
    reference = folder / "reference.json"
    reference.write_text(as_reference(HERE, 5.0))
    found = learn(monkeypatch, folder, Measuring())
    assert found["networks"] == without + len(tried) - 1
    assert found["reference_ms"] == 5.0
    reference.write_text(as_reference(OTHER, 5.0))
    assert learn(monkeypatch, folder, Measuring())["networks"] == without


def test_archs_are_spread_over_the_logarithm_of_the_cost(folder: Path) -> None:
    costs = [macs(arch) for arch in real_spread(open_run(folder), 6)]
    assert costs == sorted(costs)
    assert 4 <= len(costs) <= 6
    assert costs[-1] > 4 * costs[0]


def test_too_few_networks_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        learn_latency(open_run(folder), networks=5, listener=Silent())


@pytest.fixture(scope="module")
def learnt(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `latency_model.json` holds."""
    folder = tmp_path_factory.mktemp("learnt") / "toy"
    shutil.copytree(begun, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "measure_network", Measuring())
        patch.setattr(latency, "description", lambda _, arch, keep: described(arch) if not keep else None)
        patch.setattr(latency, "spread", lambda _, count: drawn(count))
        learn_latency(bench_on(folder, HERE), networks=18, listener=Silent())
    return dict(json.loads((folder / latency.MODEL).read_text()))


@pytest.mark.parametrize("lost", ["model", "reference_ms", "device", "told", "networks", "held_out"])
def test_a_damaged_model_is_named(folder: Path, learnt: dict[str, Any], lost: str) -> None:
    file = folder / latency.MODEL
    file.write_text(json.dumps(learnt))
    assert load_predictor(open_run(folder)) is not None
    for damaged in (
        {name: part for name, part in learnt.items() if name != lost},
        {**learnt, lost: []},
    ):
        file.write_text(json.dumps(damaged))
        with pytest.raises(RunError, match=r"latency_model\.json is damaged \(.+\); remove it"):
            load_predictor(open_run(folder))
    file.write_text('{"model": {"names"')
    with pytest.raises(RunError, match=r"latency_model\.json is damaged"):
        load_predictor(open_run(folder))


def test_a_model_is_loaded_with_how_good_it_is(folder: Path, learnt: dict[str, Any]) -> None:
    (folder / latency.MODEL).write_text(json.dumps(learnt))
    found = load_predictor(open_run(folder))
    assert found is not None
    assert found.tau == learnt["held_out"]["model"]["tau"]
    assert (found.networks, found.told) == (learnt["networks"], str(HERE))


def test_multiply_accumulates_of_the_steps_are_those_of_the_network(space: SearchSpace) -> None:
    for arch in (space.smallest, space.largest):
        found = family(space.family)
        told = steps(shapes_graph(found, arch), QuantPolicy())
        network = build_shapes(found.build, arch)
        assert sum(step.macs for step in told) == cost(network, arch.integer("resolution")).macs
        assert sum(step.weight_bytes for step in told) > 0


def test_integers_are_a_quarter_of_the_bytes_and_are_converted_once(space: SearchSpace) -> None:
    graph = shapes_graph(family(space.family), space.smallest)
    floats, integers = (steps(graph, QuantPolicy((("", name),))) for name in ("fp32", "w8a8"))
    for one, other in zip(floats, integers, strict=True):
        assert other.activation_bytes == one.activation_bytes / 4
        assert other.signature != one.signature
    assert [step.converted_bytes for step in integers] == [4.0 * 3 * 8 * 8, *[0.0] * (len(integers) - 1)]
    assert not any(step.converted_bytes for step in floats)


def test_like_operators_of_which_some_read_another_type_are_told_apart() -> None:
    alike = (nn.Conv2d(3, 3, 1) for _ in range(4))
    graph = trace(nn.Sequential(*alike, nn.Flatten()).eval(), resolution=4)
    told = steps(graph, QuantPolicy((("1", "w8a8"), ("2", "w8a8"))))
    assert [step.converted_bytes > 0 for step in told] == [False, True, False, True, False]
    assert len({step.signature for step in told[:4]}) == 4
    converted = sum(step.converted_bytes for step in told)
    assert describe(told).sums["converted bytes"] == converted == 2 * 4 * 3 * 4 * 4
    floats = steps(graph, QuantPolicy())
    assert len({step.signature for step in floats[:4]} | {told[0].signature}) == 1


def test_signatures_are_those_of_the_file_s_graph_and_tell_precisions_apart(space: SearchSpace) -> None:
    found, arch = family(space.family), space.largest
    real = untrained_graph(found, arch)
    policy = quant_policy(found, arch, real)
    signatures = tuple(block_signature(block.graph, policy) for block in blocks(real))
    assert block_signatures(found, arch, keep={}) == signatures
    kept = block_signatures(found, arch, keep={"first": "w8a8"})
    assert [a == b for a, b in zip(signatures, kept, strict=True)] == [False] + [True] * (len(kept) - 1)
    assert description(found, arch, keep={}) != description(found, arch, keep={"first": "w8a8"})


def test_networks_and_their_blocks_are_measured_without_training(
    space: SearchSpace, cpu: WorkerDevice
) -> None:
    found, arch = family(space.family), space.smallest
    assert measure_network(cpu, found, arch, keep={}, pauses=()).ratio > 0
    signatures = block_signatures(found, arch, keep={})
    rest = measure_blocks(cpu, found, arch, keep={}, known={signatures[0]}, pauses=())
    assert rest.keys() == set(signatures[1:])
    assert min(one.ratio for one in rest.values()) > 0


def test_precisions_for_research_have_no_latency(space: SearchSpace, cpu: WorkerDevice) -> None:
    with pytest.raises(ValueError, match="w2a8"):
        measure_network(cpu, family(space.family), space.smallest, keep={"first": "w2a8"})


def test_the_model_s_file_is_plain_json_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    learn(monkeypatch, folder, Measuring())
    told = json.loads((folder / "latency_model.json").read_text())
    assert told["device"] == HERE.key
    assert told["reference_ms"] == pytest.approx(2.0)
    assert told["held_out"].keys() == {"model", "macs"}
