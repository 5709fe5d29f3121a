from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.config import ConfigError, load_config
from nestling.models.graph import Graph
from nestling.pipeline import Silent, offering
from nestling.pipeline.offering import layer_kinds, offer_precisions
from nestling.pipeline.precisions import Finding
from nestling.pipeline.workbench import OFFERED, Workbench
from nestling.quant import QuantPolicy, Unquantizable, check_policy, quantize
from nestling.run import Run
from nestling.space import load_space

TESTS = Path(__file__).parents[2]


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class NoDevice:
    """A device that is asked for nothing but what it is."""

    name = fingerprint = "a device"


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    bench = Workbench(Run.create(tmp_path / "run", load_config(TESTS / "toy.toml")))
    vars(bench)["device"] = NoDevice()
    return bench


def _refusing(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    def probe(*_: Any, **__: Any) -> tuple[Finding, ...]:
        executed = Finding("w8a8", "Gemm", "executed", "so")
        return (*(replace(executed, kind=kind, status="refused") for kind in kinds), executed)

    monkeypatch.setattr(offering, "probe", probe)


def test_what_the_device_refuses_is_dropped_from_the_choices_that_it_concerns(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refusing(monkeypatch, "depthwise Conv")
    listener = Notes()
    offer_precisions(bench, listener=listener)
    [note] = listener.notes
    assert note == "dropped w8a8 from s1.precision: depthwise Conv is refused (so)"
    fitted = bench.fitted(bench.given_space)
    assert fitted.by_name["s1.precision"].values == ("fp32",)
    assert fitted.by_name["head.precision"].values == ("w8a8", "fp32")
    assert bench.fitted(fitted) == fitted


def test_what_is_executed_stays(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(monkeypatch)
    listener = Notes()
    offer_precisions(bench, listener=listener)
    assert listener.notes == []
    assert bench.run.read_json(OFFERED)["dropped"] == {}


def test_a_choice_without_a_precision_left_is_named(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refusing(monkeypatch, "Conv", "Gemm")
    space = load_space(TESTS / "toy_space.toml").only({"stem.precision": ["w8a8"]})
    vars(bench)["_bare_space"] = space
    with pytest.raises(ConfigError, match=r"no precision of stem\.precision .*Conv is refused"):
        offer_precisions(bench, listener=Silent())


def test_a_space_in_floats_asks_no_device(bench: Workbench) -> None:
    space = load_space(TESTS / "toy_space.toml")
    floats = {choice.name: ["fp32"] for choice in space.choices if choice.name.endswith(".precision")}
    vars(bench)["_bare_space"] = space.only(floats)
    offer_precisions(bench, listener=Silent())  # a device without a worker would fail
    assert bench.run.read_json(OFFERED) is None


def test_the_kinds_of_layers_of_each_choice_are_those_of_the_largest_network(bench: Workbench) -> None:
    kinds = layer_kinds(bench, bench.given_space, ["stem.precision", "s1.precision", "head.precision"])
    assert kinds["stem.precision"] == {"Conv"}
    assert kinds["s1.precision"] == {"Conv", "depthwise Conv"}
    assert "Gemm" in kinds["head.precision"]


def test_a_convolution_in_groups_of_several_channels_is_no_depthwise_one(bench: Workbench) -> None:
    def build(_: object) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 32, 3, groups=16)
        )

    vars(bench)["family"] = replace(bench.family, build=build, layers=lambda _: ("1",))
    assert layer_kinds(bench, bench.given_space, ["s1.precision"])["s1.precision"] == {"grouped Conv"}


def test_choices_whose_layers_are_all_kept_have_that_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refusing(monkeypatch)
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep=["first", "last"]'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    offer_precisions(bench, listener=Silent())
    values = {choice.name: choice.values for choice in bench.fitted(bench.given_space).choices}
    assert values["stem.precision"] == ("fp32",)
    assert values["s1.precision"] == values["head.precision"] == ("w8a8", "fp32")


def test_a_kept_precision_that_the_device_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refusing(monkeypatch, "Gemm", "Conv")
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep={first = "w8a8"}'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    with pytest.raises(ConfigError, match=r"quant.keep: a device cannot use 'w8a8' for 'first': .*refused"):
        offer_precisions(bench, listener=Silent())


class Waves(nn.Module):
    """What no translation covers, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(self.stem(images)).mean((2, 3))


def test_of_networks_that_cannot_be_traced_all_but_fp32_is_dropped(bench: Workbench) -> None:
    vars(bench)["family"] = replace(bench.family, build=lambda _: Waves())
    listener = Notes()
    offer_precisions(bench, listener=listener)
    [note] = listener.notes
    assert note.startswith("dropped w8a8 from stem.precision, head.precision, s1.precision: ")
    assert "sin cannot be traced" in note
    fitted = bench.fitted(bench.given_space)
    assert fitted.by_name["s1.precision"].values == ("fp32",)


def test_a_network_that_cannot_be_traced_needs_fp32(bench: Workbench) -> None:
    vars(bench)["family"] = replace(bench.family, build=lambda _: Waves())
    vars(bench)["_bare_space"] = load_space(TESTS / "toy_space.toml").only({"stem.precision": ["w8a8"]})
    with pytest.raises(ConfigError, match=r"no precision of stem\.precision .*sin .*add 'fp32'"):
        offer_precisions(bench, listener=Silent())


def test_of_networks_that_cannot_be_traced_layers_may_be_kept_in_floats(tmp_path: Path) -> None:
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep=["first"]'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    vars(bench)["family"] = replace(bench.family, build=lambda _: Waves())
    listener = Notes()
    offer_precisions(bench, listener=listener)
    [note] = listener.notes
    assert note.startswith("dropped w8a8 from stem.precision, head.precision, s1.precision: ")


def test_of_networks_that_cannot_be_traced_no_layer_is_kept_in_few_bits(tmp_path: Path) -> None:
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep={first = "w8a8"}'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    vars(bench)["family"] = replace(bench.family, build=lambda _: Waves())
    with pytest.raises(ConfigError, match=r"quant\.keep: first is 'w8a8', but .*sin cannot be traced"):
        offer_precisions(bench, listener=Silent())


@pytest.mark.parametrize(("kept", "refused"), [("first", False), ("conv_stem", False), ("blocks", True)])
def test_a_kept_layer_is_judged_by_layers_of_its_own_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, refused: bool
) -> None:
    _refusing(monkeypatch, "depthwise Conv", "grouped Conv")
    config = load_config(TESTS / "toy.toml", overrides=[f'quant.keep={{{kept} = "w8a8"}}'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    if refused:
        with pytest.raises(ConfigError, match=r"cannot use 'w8a8' for 'blocks': depthwise Conv is refused"):
            offer_precisions(bench, listener=Silent())
    else:
        offer_precisions(bench, listener=Silent())
        assert "stem.precision" in bench.run.read_json(OFFERED)["kept"]


def test_of_kept_layers_only_the_kinds_that_there_are_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def probe(*_: Any, kinds: list[str], **__: Any) -> tuple[Finding, ...]:
        tried.extend(kinds)
        return tuple(Finding("w8a8", kind, "executed", "so") for kind in kinds)

    monkeypatch.setattr(offering, "probe", probe)
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep=["first"]'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    offer_precisions(bench, listener=Silent())
    assert tried == ["Conv", "depthwise Conv", "Gemm"]


def _offering(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stem: list[str],
    s1: list[str],
    head: list[str],
    refused: tuple[str, ...] = (),
    act: str = "relu",
) -> tuple[Workbench, list[str]]:
    """The run after its precisions were settled on a device that refuses only `refused`, and the notes."""
    executed = [Finding("w8a8", kind, "executed", "so", 0.0) for kind in ("Conv", "depthwise Conv", "Gemm")]
    findings = [*executed, *(Finding(name, "Conv", "refused", "so") for name in refused)]
    monkeypatch.setattr(offering, "probe", lambda *_, **__: tuple(findings))
    bench = Workbench(Run.create(folder, load_config(TESTS / "toy.toml")))
    values = {"stem.precision": stem, "s1.precision": s1, "head.precision": head}
    given = folder.parent / "given.toml"
    given.write_text((TESTS / "toy_space.toml").read_text().replace('act = "relu"', f'act = "{act}"'))
    space = load_space(given)
    choices = tuple(
        replace(choice, values=tuple(values[choice.name])) if choice.name in values else choice
        for choice in space.choices
    )
    vars(bench).update(device=NoDevice(), _bare_space=replace(space, choices=choices))
    listener = Notes()
    offer_precisions(bench, listener=listener)
    return bench, listener.notes


SIGNED, UNSIGNED, BOTH = ["w8a8-signed", "fp32"], ["w8a8", "fp32"], ["w8a8", "w8a8-signed", "fp32"]


def test_signed_beside_unsigned_activations_are_told_where_some_mixes_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, [note] = _offering(tmp_path / "run", monkeypatch, stem=BOTH, s1=BOTH, head=BOTH)
    failed = int(note.partition(" of 64")[0])
    assert 16 < failed < 60  # 12 of 27 keep to a sign, and fp32 between may part them
    assert "would be between signed integers" in note
    assert bench.fitted(bench.given_space).by_name["s1.precision"].values == tuple(BOTH)


def test_signed_and_unsigned_activations_with_floats_between_are_no_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _offering(tmp_path / "run", monkeypatch, stem=SIGNED, s1=["fp32"], head=UNSIGNED)[1] == []


def test_a_space_of_which_every_mix_puts_signed_beside_unsigned_activations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"64 of 64 drawn mixes .* offer signed or unsigned activations"):
        _offering(tmp_path / "run", monkeypatch, stem=["w8a8-signed"], s1=["w8a8"], head=UNSIGNED)


def test_hard_swishes_are_tried_as_the_products_that_they_are_in_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, unsigned = SIGNED[:1], UNSIGNED[:1]
    with pytest.raises(ConfigError, match=r"64 of 64 drawn mixes"):
        _offering(tmp_path / "run", monkeypatch, stem=signed, s1=unsigned, head=unsigned, act="hard_swish")


@pytest.mark.parametrize("act", ["relu", "hard_swish"])
def test_mixes_that_are_told_are_those_of_which_no_candidate_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    tried: list[tuple[Graph, QuantPolicy]] = []

    def keep(graph: Graph, policy: QuantPolicy) -> None:
        tried.append((graph, policy))
        check_policy(graph, policy)

    monkeypatch.setattr(offering, "check_policy", keep)
    monkeypatch.setattr(offering, "DRAWN_MIXES", 12)
    _, [note] = _offering(tmp_path / "run", monkeypatch, stem=BOTH, s1=BOTH, head=BOTH, act=act)
    assert {operator.kind for operator in tried[0][0].operators} >= {
        {"relu": "Relu", "hard_swish": "HardSwish"}[act]
    }
    refused = 0
    for graph, policy in tried:
        try:
            quantize(graph, policy, [torch.randn(1, 3, graph.resolution, graph.resolution)])
        except Unquantizable:
            refused += 1
    assert note.startswith(f"{refused} of 12 ")
    assert 0 < refused < 12


def test_a_precision_that_the_device_drops_is_beside_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, [note] = _offering(
        tmp_path / "run", monkeypatch, stem=BOTH, s1=BOTH, head=UNSIGNED, refused=("w8a8-signed",)
    )
    assert bench.fitted(bench.given_space).by_name["stem.precision"].values == tuple(UNSIGNED)
    assert note.startswith("dropped w8a8-signed from stem.precision, s1.precision")


def test_a_kept_precision_of_the_other_sign_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(monkeypatch)
    config = load_config(TESTS / "toy.toml", overrides=['quant.keep={first = "w8a8-signed"}'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench)["device"] = NoDevice()
    listener = Notes()
    offer_precisions(bench, listener=listener)
    [note] = listener.notes
    assert "cannot be had: " in note
