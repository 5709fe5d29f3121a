from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nestling.config import load_config
from nestling.models.graph import Graph, Untraceable
from nestling.pipeline import seeding
from nestling.pipeline.listening import Silent
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.seeding import PARTS, SENSITIVITY, Mix, kept_sensitivity, seeds, spread, trade_off
from nestling.pipeline.studies import problem
from nestling.pipeline.workbench import Workbench
from nestling.quant import Unquantizable, check_policy
from nestling.quant.equalization import equalize
from nestling.quant.sensitivity import Sensitivity
from nestling.run import Run
from nestling.search import Problem
from nestling.space import Value

TESTS = Path(__file__).parents[2]
LOSS: Mapping[str, Mapping[Value, float]] = {
    "a": {"w2": 9.0, "w4": 1.0, "fp": 0.0},
    "b": {"w2": 0.3, "w4": 0.2, "fp": 0.0},
    "c": {"w2": 0.5, "w4": 3.0, "fp": 0.0},
}
COST: Mapping[str, Mapping[Value, float]] = {
    name: {"w2": 2.0 * size, "w4": 4.0 * size, "fp": 32.0 * size}
    for name, size in zip("abc", (1, 2, 3), strict=True)
}
CHOICES = {name: tuple(values) for name, values in LOSS.items()}
DEAREST: Mapping[str, Value] = dict.fromkeys(CHOICES, "fp")


def loss(values: Mapping[str, Value]) -> float:
    return sum(LOSS[name][value] for name, value in values.items())


def cost(values: Mapping[str, Value]) -> float:
    return sum(COST[name][value] for name, value in values.items())


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A run of the toy, its supernet untrained, that asks for sensitivity."""
    config = load_config(TESTS / "toy.toml", overrides=["search.sensitivity=true"])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["supernet"] = bench.new_supernet().eval()
    vars(bench)["device"] = SimpleNamespace(fingerprint=SimpleNamespace(int8_saturates=False))
    return bench


def interrupted(_: Workbench) -> None:
    raise KeyboardInterrupt


def test_no_mix_that_costs_as_much_loses_less_than_one_on_the_path() -> None:
    path = trade_off(CHOICES, start=DEAREST, loss=loss, cost=cost)
    every = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    for mix in path:
        assert mix.cost == cost(mix.values)
        assert loss(mix.values) == min(loss(other) for other in every if cost(other) <= mix.cost)
    assert dict(path[0].values) == DEAREST
    assert path[-1].cost == min(map(cost, every))
    assert len({mix.cost for mix in path}) == len(path)


def test_a_value_that_loses_more_and_saves_less_than_another_is_passed_over() -> None:
    path = trade_off(CHOICES, start=DEAREST, loss=loss, cost=cost)
    assert all(mix.values["c"] != "w4" for mix in path)
    assert [mix.values["a"] for mix in path][-2:] == ["w4", "w2"]


def test_steps_to_mixes_that_there_are_not_are_left_out() -> None:
    def possible(values: Mapping[str, Value]) -> bool:
        return values["b"] != "w4" and not (values["a"] == "w2" and values["c"] == "w2")

    path = trade_off(CHOICES, start=DEAREST, loss=loss, cost=cost, possible=possible)
    assert all(possible(mix.values) for mix in path)
    assert {mix.values["b"] for mix in path} == {"w2", "fp"}
    assert dict(path[-1].values) == {"a": "w4", "b": "w2", "c": "w2"}
    assert trade_off(CHOICES, start=DEAREST, loss=loss, cost=cost, possible=lambda _: False) == []
    assert spread([], 3) == []


def test_mixes_are_spread_over_the_costs_and_end_with_the_cheapest() -> None:
    path = [Mix({"a": index}, 100.0 - index) for index in (0, 1, 2, 30, 52, 70, 90)]
    assert [mix.cost for mix in spread(path, 3)] == [70.0, 48.0, 10.0]
    assert spread(path, 1) == path[-1:]
    assert spread(path[:1], 3) == []
    assert spread(path[:2], 3) == path[1:2]


def test_seeds_are_the_largest_networks_in_mixes_that_end_with_all_quantized(bench: Workbench) -> None:
    found = seeds(bench, problem(bench))
    space = bench.space
    largest = space.largest
    quantized = {c.name: "w8a8" for c in space.open_choices if c.name.endswith(".precision")}
    assert space.canonical({**largest, **quantized}) in found
    assert len(set(found)) == len(found) > 1
    changed = {name for arch in found for name in arch if arch[name] != largest[name]}
    assert changed == set(quantized)
    facts = bench.run.read_json(SENSITIVITY)
    assert facts is not None
    assert facts["arch_key"] == largest.key
    assert {name.split(".")[0] for name in facts["layers"]} >= {"conv_stem", "blocks", "classifier"}
    assert all(told["w8a8"] > 0 for told in facts["layers"].values())
    costs = [mix["cost"] for mix in facts["mixes"]]
    assert costs == sorted(costs, reverse=True)


def test_a_search_that_goes_on_gets_the_same_seeds_without_measuring_again(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seeds(bench, problem(bench))
    monkeypatch.delattr(seeding, "measure_sensitivity")
    assert seeds(bench, problem(bench)) == found


def test_seeds_put_no_signed_beside_unsigned_activations(bench: Workbench) -> None:
    mixing = {"stem.precision": ("w4a4", "fp32"), "s1.precision": ("w8a8-signed", "fp32")}
    choices = tuple(replace(c, values=mixing.get(c.name, c.values)) for c in bench.space.choices)
    vars(bench)["space"] = replace(bench.space, choices=choices)
    vars(bench)["supernet"] = bench.new_supernet().eval()
    found = seeds(bench, problem(bench))
    assert found
    graph = kept_sensitivity(bench).graph
    for arch in found:
        check_policy(graph, quant_policy(bench.family, arch, graph))
    facts = bench.run.read_json(SENSITIVITY)
    assert facts is not None
    assert all(mix["divergence"] > 0 for mix in facts["mixes"])


def test_a_search_killed_before_its_mixes_goes_on_with_what_was_measured(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = seeds(bench, problem(bench))
    facts = bench.run.read_json(SENSITIVITY)
    (bench.run.folder / SENSITIVITY).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(seeding, "mixes", lambda *_, **__: interrupted(bench))
        with pytest.raises(KeyboardInterrupt):
            seeds(bench, problem(bench))
    kept = bench.run.read_json(SENSITIVITY)
    assert kept is not None
    assert "classifier" in kept["layers"]
    monkeypatch.delattr(seeding, "measure_sensitivity")
    assert seeds(bench, problem(bench)) == wanted
    assert bench.run.read_json(SENSITIVITY) == facts


@pytest.mark.parametrize("damaged", [b"", b"junk", slice(0, -9)])
def test_a_sensitivity_that_is_damaged_is_measured_again(bench: Workbench, damaged: bytes | slice) -> None:
    wanted = seeds(bench, problem(bench))
    (bench.run.folder / SENSITIVITY).unlink()
    kept = bench.run.folder / PARTS
    whole = kept.read_bytes()
    kept.write_bytes(whole[damaged] if isinstance(damaged, slice) else damaged)
    assert seeds(bench, problem(bench)) == wanted
    assert kept.read_bytes() == whole


def test_mixes_save_what_the_search_weighs_now(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def weighing(*metrics: str) -> Problem:
        return Problem.parse(bench.space, objectives=["top1", *metrics], limits={})

    def costs() -> list[float]:
        facts = bench.run.read_json(SENSITIVITY)
        assert facts is not None
        return [mix["cost"] for mix in facts["mixes"]]

    seeds(bench, weighing("size_mb"))
    of_weights = costs()
    monkeypatch.delattr(seeding, "measure_sensitivity")
    seeds(bench, weighing("latency_ms"))
    of_products = costs()
    assert min(of_products) > max(of_weights)
    seeds(bench, weighing("latency_ms", "size_mb"))
    assert costs() == of_products
    seeds(bench, weighing())
    assert costs() == of_weights


def test_mixes_of_before_serve_again_where_those_for_other_limits_cannot_be_had(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weighing(metric: str) -> Problem:
        return Problem.parse(bench.space, objectives=["top1", metric], limits={})

    def refuse(*_: object, **__: object) -> None:
        raise Unquantizable("no kernel between them")

    found = seeds(bench, weighing("size_mb"))
    monkeypatch.setattr(seeding, "mixes", refuse)
    with pytest.raises(Unquantizable, match="no kernel"):
        seeds(bench, weighing("latency_ms"))
    assert seeds(bench, weighing("size_mb")) == found


def test_mixes_that_do_not_tell_what_they_save_are_kept(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seeds(bench, problem(bench))
    facts = bench.run.read_json(SENSITIVITY)
    assert facts is not None
    del facts["timed"]  # as runs of before have it
    bench.run.write_json(SENSITIVITY, facts)
    monkeypatch.delattr(seeding, "mixes")
    assert seeds(bench, problem(bench)) == found


@pytest.mark.parametrize("error", [Untraceable, Unquantizable])
@pytest.mark.parametrize("name", ["mixes", "measure_sensitivity"])
def test_what_cannot_be_quantized_is_found_once_and_told_to_every_worker(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, error: type[ValueError], name: str
) -> None:
    asked: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        asked.append(name)
        raise error("no kernel between them")

    monkeypatch.setattr(seeding, name, refuse)
    with pytest.raises(error, match="no kernel"):
        seeds(bench, problem(bench))
    with pytest.raises(Unquantizable, match="no kernel"):
        seeds(bench, problem(bench))
    assert asked == [name]
    facts = bench.run.read_json(SENSITIVITY)
    assert facts is not None
    assert ("layers" in facts) == (name == "mixes")


def test_a_search_that_does_not_ask_has_no_seeds(tmp_path: Path) -> None:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    assert seeds(bench, problem(bench)) == []
    assert not (bench.run.folder / SENSITIVITY).exists()


def test_what_is_measured_is_the_largest_network_on_the_calibration_images(bench: Workbench) -> None:
    largest = bench.space.largest
    found = kept_sensitivity(bench)
    assert isinstance(found, Sensitivity)
    resolution = bench.resolution(largest)
    assert found.graph.resolution == resolution
    assert found.precisions == ("w8a8",)
    count = sum(len(batch) for batch in bench.calibration_images(resolution))
    assert all(len(moved) == seeding.DRAWS * count for moved in found.parts.values())


def test_layers_kept_in_a_precision_that_no_choice_has_are_measured_in_it(tmp_path: Path) -> None:
    overrides = ["search.sensitivity=true", 'quant.keep={last = "w8"}']
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml", overrides=overrides)))
    vars(bench)["supernet"] = bench.new_supernet().eval()
    vars(bench)["device"] = SimpleNamespace(fingerprint=SimpleNamespace(int8_saturates=False))
    assert seeds(bench, problem(bench))
    facts = bench.run.read_json(SENSITIVITY)
    assert facts is not None
    assert facts["precisions"] == ["w8a8", "w8"]
    assert facts["layers"]["classifier"]["w8"] > 0


def test_channels_are_equalized_and_scales_shared_as_a_candidate_s_are(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Graph, Any]] = []

    def keep(graph: Graph, *_: Any, **settings: Any) -> Any:
        given.append((graph, settings["shared"]))
        return SimpleNamespace(to_bytes=lambda: b"nothing that could be read again")

    monkeypatch.setattr(seeding, "measure_sensitivity", keep)
    kept_sensitivity(bench)
    quant = bench.config.quant.model_copy(update={"equalize": True, "shared": ("Add",)})
    bench.config = bench.config.model_copy(update={"quant": quant})
    kept_sensitivity(bench)
    (plain, alone), (equal, together) = given
    wanted = {operator.name: operator.weight for operator in equalize(plain).operators}
    for operator in equal.operators:
        if operator.weight is not None:
            assert torch.equal(operator.constant(), torch.as_tensor(wanted[operator.name]))
    assert any(
        operator.weight is not None and not torch.equal(operator.constant(), other.constant())
        for operator, other in zip(equal.operators, plain.operators, strict=True)
    )
    assert (alone, together) == ((), ("Add",))


def test_what_sensitivity_leaves_out_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(seeding, "measure_sensitivity", lambda *_, **__: interrupted(bench))
    for changed in ({}, {"rounding": "moments", "correct_biases": True}):
        quant = bench.config.quant.model_copy(update=changed)
        bench.config = bench.config.model_copy(update={"quant": quant})
        with pytest.raises(KeyboardInterrupt):
            seeds(bench, problem(bench), listener=Noting())
    assert len(notes) == 1
    assert "leaves out what rounding and correct_biases of [quant] mend" in notes[0]
