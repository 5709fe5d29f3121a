from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nestling.config import ConfigError, load_config
from nestling.export import load_onnx
from nestling.file_keys import file_key
from nestling.models.graph import trace
from nestling.models.operators import Operator
from nestling.pipeline.candidate import write_candidate
from nestling.pipeline.finetuning import Tuning, finetune, finetuned_name, tuning
from nestling.pipeline.listening import Silent
from nestling.pipeline.quantized_training import (
    EPOCHS,
    EPOCHS_8_BITS,
    LR_PART,
    LR_PART_8_BITS,
    begin,
    defaults,
    macs,
)
from nestling.pipeline.stages import open_run
from nestling.pipeline.summary import report_content
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.profile import Device, connect
from nestling.run import Run
from nestling.space import Arch
from nestling.train.evaluate import recalibrate
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress

TOY = Path(__file__).parents[2] / "toy.toml"


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """One worker for all tests."""
    with connect("ort:cpu?threads=1", seconds=0.02) as connected:
        yield connected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose supernet is trained, and nothing more."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    settings = ["train.epochs=2", "train.lr=0.05", "train.checkpoint_seconds=0"]
    bench = Workbench(Run.create(folder, load_config(TOY, overrides=settings)))
    train_supernet(bench, listener=Silent())
    return folder


def opened(folder: Path, device: Device) -> Workbench:
    bench = open_run(folder)
    bench.device = device
    return bench


@pytest.fixture
def fresh(trained: Path, tmp_path: Path, device: Device) -> Workbench:
    shutil.copytree(trained, tmp_path / "toy")
    return opened(tmp_path / "toy", device)


@pytest.fixture(scope="module")
def tuned(
    trained: Path, device: Device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workbench, dict[str, Any]]:
    """The smallest network, trained in 8 bits by LSQ, and its card."""
    folder = tmp_path_factory.mktemp("tuned") / "toy"
    shutil.copytree(trained, folder)
    bench = opened(folder, device)
    asked = tuning(bench, small(bench), qat="lsq", epochs=2, lr=0.01)
    return bench, finetune(bench, small(bench), asked, listener=Silent())


def small(bench: Workbench, precision: str = "w8a8") -> Arch:
    """The space's smallest network, in one precision throughout."""
    values = {n: precision if n.endswith(".precision") else v for n, v in bench.space.smallest.items()}
    return bench.space.canonical(values)


def test_layers_that_a_network_does_not_have_count_nothing_for_its_epochs(tmp_path: Path) -> None:
    rows = TOY.with_name("toy_space.toml").read_text()
    rows = rows.replace(
        'precision = ["w8a8", "fp32"], per_block = ["kernel"]',
        'precision = ["w2a8", "w8a8"], per_block = ["kernel", "precision"]',
    )
    (tmp_path / "space.toml").write_text(rows)
    config = load_config(TOY, overrides=[f'space="{tmp_path / "space.toml"}"'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    space = bench.space
    precisions = {c.name: "w8a8" for c in space.choices if c.name.endswith(".precision")}
    shallow = space.canonical({**space.smallest, **precisions})
    assert "w2a8" in shallow.values()  # an idle block's
    assert defaults(bench, shallow) == (EPOCHS_8_BITS, LR_PART_8_BITS)
    deep = space.canonical({**space.largest, **precisions})
    assert defaults(bench, deep) == (EPOCHS_8_BITS, LR_PART_8_BITS)
    few = space.canonical({**space.largest, **precisions, "s1.b2.precision": "w2a8"})
    assert defaults(bench, few) == (EPOCHS, LR_PART)


class Stopping(Silent):
    """Interrupts training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.heard: list[int] = []

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        del progress
        self.heard.append(record.step)
        if len(self.heard) == self.steps:
            raise KeyboardInterrupt


def test_a_network_trained_in_its_precisions_is_handed_over(tuned: tuple[Workbench, dict[str, Any]]) -> None:
    bench, card = tuned
    folder = bench.run.exports / card["name"]
    assert card["name"].startswith(f"{small(bench).key}-qat-")
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "model_before.onnx", "model_fp32.onnx", "weights.safetensors", "rebuild.py",
        "card.json", "training.jsonl",
    }  # fmt: skip
    assert card["quantized"]
    assert report_content(bench, None).tuned[0].qat == "lsq"
    assert card["finetuning"]["qat"] == "lsq"
    assert card["finetuning"]["teacher"] == "parent"
    assert card["sha256"] == card["finetuning"]["after"]["sha256"] == file_key(folder / "model.onnx")
    assert card["sha256"] != card["finetuning"]["before"]["sha256"]
    metadata = {entry.key: entry.value for entry in load_onnx(folder / "model.onnx").metadata_props}
    assert json.loads(metadata["nestling.finetuned"])["qat"] == "lsq"
    assert metadata["nestling.arch_key"] == card["arch_key"]


def test_the_scales_of_its_file_are_learned_and_its_layers_run_on_integers(
    tuned: tuple[Workbench, dict[str, Any]],
) -> None:
    bench, card = tuned
    folder = bench.run.exports / card["name"]
    scales = []
    for name in ("model_before.onnx", "model.onnx"):
        constants = {c.name: c for c in load_onnx(folder / name).graph.initializer}
        scales.append({key: c.raw_data for key, c in constants.items() if key.endswith(".scale")})
    assert scales[0].keys() == scales[1].keys()
    assert all(scales[0][name] != scales[1][name] for name in scales[0])
    computed = {node.op for node in bench.device.optimized_ops(folder / "model.onnx") or ()}
    assert any(op.endswith("QLinearConv") for op in computed)
    assert "Conv" not in computed


def test_its_plain_weights_stay_those_of_the_parent(tuned: tuple[Workbench, dict[str, Any]]) -> None:
    bench, card = tuned
    arch = small(bench)
    parent = recalibrate(
        bench.supernet.materialize(arch), bench.recalibration_images(bench.resolution(arch))
    ).state_dict()
    kept = load_file(bench.run.exports / card["name"] / "weights.safetensors")
    assert all(torch.equal(parent[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("method", ["lsq", pytest.param("ofq", marks=pytest.mark.slow)])
def test_a_training_that_was_interrupted_ends_with_the_same_file_to_the_bit(
    method: Any, fresh: Workbench, device: Device, tmp_path: Path
) -> None:
    arch = small(fresh)
    asked = tuning(fresh, arch, qat=method, epochs=2, lr=0.01)
    copy = tmp_path / "other"
    shutil.copytree(fresh.run.folder, copy)
    whole = Stopping(-1)
    card = finetune(opened(copy, device), arch, asked, listener=whole)
    steps = len(whole.heard)
    # the last step of OFQ's is one of its second part
    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, arch, asked, listener=Stopping(steps if method == "ofq" else 3))
    resumed = Stopping(-1)
    found = finetune(opened(fresh.run.folder, device), arch, asked, listener=resumed)
    assert len(resumed.heard) < steps
    assert found["sha256"] == card["sha256"]
    spent, expected = (each["finetuning"]["spent"] for each in (found, card))
    assert all(spent[key] == expected[key] for key in ("steps", "images", "macs"))
    assert spent["steps"] == steps
    folder = fresh.run.exports / found["name"]
    assert len((folder / "training.jsonl").read_text().splitlines()) >= (2 if method == "ofq" else 1)


def test_with_next_to_no_learning_rate_it_is_the_network_of_before(fresh: Workbench) -> None:
    arch = small(fresh)
    card = finetune(fresh, arch, tuning(fresh, arch, qat="lsq", epochs=1, lr=1e-30), listener=Silent())
    before, after = card["finetuning"]["before"], card["finetuning"]["after"]
    assert before["search_correct"] == after["search_correct"]
    assert before["test_correct"] == after["test_correct"]


def test_layers_in_floats_and_in_groups_are_trained_beside_those_on_integers(fresh: Workbench) -> None:
    arch = fresh.space.canonical({**small(fresh), "head.precision": "fp32"})
    config = fresh.config.quant.model_copy(update={"keep": {"classifier": "w4"}})
    fresh.config = fresh.config.model_copy(update={"quant": config})
    card = finetune(fresh, arch, tuning(fresh, arch, qat="lsq", epochs=1), listener=Silent())
    assert card["policy"]["classifier"] == "w4"
    assert {layer["precision"] for layer in card["layers"]} >= {"fp32", "w8a8", "w4"}


def test_weights_are_rounded_as_the_configuration_says(fresh: Workbench) -> None:
    quant = fresh.config.quant.model_copy(update={"weights": "mse"})
    fresh.config = fresh.config.model_copy(update={"quant": quant})
    candidate = write_candidate(fresh, small(fresh), fresh.run.folder / "model.onnx")
    assert begin(fresh, candidate, method="ofq").learning.weights == "mse"


def test_what_is_not_asked_for_goes_by_the_bits(fresh: Workbench) -> None:
    arch, own = small(fresh), fresh.config.train
    assert tuning(fresh, arch, qat="lsq") == Tuning(False, 1.0, 0.01 * own.lr, "parent", 1.0, 1.0, "lsq")
    config = fresh.config.quant.model_copy(update={"keep": {"last": "w4a4"}})
    fresh.config = fresh.config.model_copy(update={"quant": config})
    assert tuning(fresh, arch, qat="ofq") == Tuning(False, 25.0, 0.1 * own.lr, "parent", 1.0, 1.0, "ofq")


def test_names_of_what_was_trained_in_floats_stay(fresh: Workbench) -> None:
    arch = small(fresh)
    asked = tuning(fresh, arch)
    assert "qat" not in finetuned_name(arch, asked)
    names = {finetuned_name(arch, dataclasses.replace(asked, qat=qat)) for qat in (None, "lsq", "ofq")}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"qat": "lsq", "from_scratch": True}, "few bits begin from a trained network"),
        ({"teacher": "parent"}, "which is for qat"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    fresh: Workbench, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tuning(fresh, small(fresh), **given)


def test_a_network_in_floats_is_refused(fresh: Workbench) -> None:
    with pytest.raises(ConfigError, match="no layers in integers"):
        tuning(fresh, small(fresh, "fp32"), qat="lsq")


def test_multiply_accumulates_of_a_graph_are_those_of_its_layers(fresh: Workbench) -> None:
    arch = small(fresh)
    network = fresh.supernet.materialize(arch)
    graph = trace(network, resolution=fresh.resolution(arch))
    assert macs(graph) == fresh.macs(arch)
    (product,) = [o for o in graph.operators if o.kind == "Gemm"]
    row = Operator("MatMul", "product", (product.inputs[0], product.inputs[0]), "")
    more = dataclasses.replace(
        graph, operators=(*graph.operators, row), shapes={**graph.shapes, "product": (1, 7)}
    )
    assert macs(more) == macs(graph) + 7 * graph.shapes[product.inputs[0]][-1]
