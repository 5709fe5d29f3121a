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
from torch import Tensor, nn

from nestling.config import ConfigError, load_config
from nestling.export import load_onnx
from nestling.file_keys import file_key
from nestling.pipeline.alone import alone_with, recipe_alone, train_alone
from nestling.pipeline.finetuning import Tuning, finetune, finetuned_name, tuning
from nestling.pipeline.listening import Silent
from nestling.pipeline.stages import open_run
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.profile import Device, connect
from nestling.run import Run, RunError
from nestling.space import Arch
from nestling.train.evaluate import recalibrate, top1
from nestling.train.loop import train
from nestling.train.losses import soft_label_loss
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Alone, Progress
from nestling.train.teachers import SoftLabels, Teacher

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


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in load_onnx(path).metadata_props}


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
    """The smallest float network, fine-tuned without interruption, and its card."""
    folder = tmp_path_factory.mktemp("tuned") / "toy"
    shutil.copytree(trained, folder)
    bench = opened(folder, device)
    arch = small(bench)
    return bench, finetune(bench, arch, tuning(bench, arch, epochs=2), listener=Silent())


def small(bench: Workbench, precision: str = "fp32") -> Arch:
    """The space's smallest network, in one precision throughout."""
    values = {n: precision if n.endswith(".precision") else v for n, v in bench.space.smallest.items()}
    return bench.space.canonical(values)


def handed_over(bench: Workbench, card: dict[str, Any]) -> nn.Module:
    """The network that the files of `card` rebuild."""
    network = bench.family.build(Arch(tuple(card["decisions"].items())))
    network.load_state_dict(load_file(bench.run.exports / card["name"] / "weights.safetensors"))
    return network.eval()


def recalibrated(bench: Workbench, network: nn.Module, arch: Arch) -> nn.Module:
    return recalibrate(network, bench.recalibration_images(bench.resolution(arch)))


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(second[n], t) for n, t in first.items())


class Stopping(Silent):
    """Interrupts training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.heard: list[int] = []

    def training(self, record: TrainingRecord, progress: Progress) -> None:  # noqa: ARG002
        self.heard.append(record.step)
        if len(self.heard) == self.steps:
            raise KeyboardInterrupt


def test_the_file_that_is_handed_over_computes_what_the_trained_network_computes(
    tuned: tuple[Workbench, dict[str, Any]],
) -> None:
    bench, card = tuned
    network, path = handed_over(bench, card), bench.run.exports / card["name"] / "model.onnx"
    assert card["sha256"] == card["finetuning"]["after"]["sha256"] == file_key(path)
    images = torch.from_numpy(bench.data.search.array(card["resolution"]))
    with torch.no_grad():
        expected = network(images)
    got = torch.from_numpy(bench.device.predict(path, images.numpy()))
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert not same(network, recalibrated(bench, bench.supernet.materialize(small(bench)), small(bench)))


def test_accuracies_before_and_after_are_those_of_the_two_networks_on_search_and_test_images(
    tuned: tuple[Workbench, dict[str, Any]],
) -> None:
    bench, card = tuned
    arch = small(bench)
    lent = recalibrated(bench, bench.supernet.materialize(arch), arch)
    for key, network in (("before", lent), ("after", handed_over(bench, card))):
        told = card["finetuning"][key]
        for split, images in (("search", bench.data.search), ("test", bench.data.test())):
            found = top1(network, images.at(card["resolution"], batch_size=60))
            assert (told[f"{split}_correct"], told[f"{split}_total"]) == (found.correct, found.total)
            assert told[f"{split}_top1"] == found.top1
            assert told[f"{split}_top1_interval"] == pytest.approx(found.interval)
    assert card["test_correct"] == card["finetuning"]["after"]["test_correct"]
    assert card["search_top1"] == card["finetuning"]["after"]["search_top1"]


def test_it_is_handed_over_as_a_member_of_the_front_is(tuned: tuple[Workbench, dict[str, Any]]) -> None:
    bench, card = tuned
    folder = bench.run.exports / card["name"]
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "model_before.onnx", "weights.safetensors", "rebuild.py", "card.json", "training.jsonl",
    }  # fmt: skip
    assert json.loads((folder / "card.json").read_text()) == card
    assert card["latency_ms"] > 0
    assert card["device"] == bench.device.name
    told = metadata(folder / "model.onnx")
    asked = json.loads(told["nestling.finetuned"])
    assert asked == {name: card["finetuning"][name] for name in asked}
    assert told["nestling.arch_key"] == card["arch_key"] == small(bench).key
    lines = (folder / "training.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == card["finetuning"]["spent"]["steps"]


def test_a_training_that_was_interrupted_ends_with_the_same_file_to_the_bit(
    fresh: Workbench, tuned: tuple[Workbench, dict[str, Any]], device: Device
) -> None:
    arch, card = small(fresh), tuned[1]
    asked = tuning(fresh, arch, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, arch, asked, listener=Stopping(3))
    assert not (fresh.run.exports / card["name"] / "card.json").exists()
    resumed = Stopping(-1)
    found = finetune(opened(fresh.run.folder, device), arch, asked, listener=resumed)
    # a step is kept before it is told of
    assert resumed.heard[0] in (3, 4)
    assert resumed.heard[-1] == card["finetuning"]["spent"]["steps"]
    assert found["sha256"] == card["sha256"]
    told = [dict(each["finetuning"]) for each in (found, card)]
    spent, whole = (each.pop("spent") for each in told)
    assert all(spent[key] == whole[key] for key in ("steps", "images", "macs"))
    assert told[0] == told[1]
    assert not any((fresh.run.folder / "finetuning").iterdir())


def test_what_is_finished_is_not_done_again(tuned: tuple[Workbench, dict[str, Any]]) -> None:
    bench, card = tuned
    arch = small(bench)
    stop = Stopping(1)  # any training at all would interrupt it
    assert finetune(bench, arch, tuning(bench, arch, epochs=2), listener=stop) == card


def test_a_file_that_is_no_longer_that_of_its_card_is_made_again(
    fresh: Workbench, tuned: tuple[Workbench, dict[str, Any]]
) -> None:
    arch, card = small(fresh), tuned[1]
    shutil.copytree(tuned[0].run.exports / card["name"], fresh.run.exports / card["name"])
    (fresh.run.exports / card["name"] / "model.onnx").write_bytes(b"cut")
    finetune(fresh, arch, tuning(fresh, arch, epochs=2), listener=Silent())
    assert file_key(fresh.run.exports / card["name"] / "model.onnx") == card["sha256"]


def test_learning_from_the_largest_alone_brings_a_network_closer_to_it(fresh: Workbench) -> None:
    arch, largest = small(fresh), fresh.space.largest
    teacher = recalibrated(fresh, fresh.supernet.materialize(largest), largest)
    before = recalibrated(fresh, fresh.supernet.materialize(arch), arch)
    asked = tuning(fresh, arch, epochs=4, labels_weight=0.0)
    after = handed_over(fresh, finetune(fresh, arch, asked, listener=Silent()))
    with torch.no_grad():
        soft = torch.cat([teacher(images) for images in fresh.recalibration_images(16)])
        losses = [
            float(soft_label_loss(torch.cat([n(i) for i in fresh.recalibration_images(8)]), soft))
            for n in (before, after)
        ]
    assert losses[1] < losses[0]


def test_labels_of_weight_0_are_not_learnt_from(fresh: Workbench, device: Device) -> None:
    asked = tuning(fresh, small(fresh), epochs=1, labels_weight=0.0)
    first = finetune(fresh, small(fresh), asked, listener=Silent())
    shutil.rmtree(fresh.run.exports)
    other = opened(fresh.run.folder, device)
    smoothed = other.config.train.model_copy(update={"label_smoothing": 1.0})
    other.config = other.config.model_copy(update={"train": smoothed})
    assert finetune(other, small(fresh), asked, listener=Silent())["sha256"] == first["sha256"]
    with_labels = dataclasses.replace(asked, labels_weight=1.0)
    assert finetune(other, small(fresh), with_labels, listener=Silent())["sha256"] != first["sha256"]


def test_the_largest_teaches_as_it_is_recalibrated_whatever_else_is_in_the_batch(
    fresh: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[SoftLabels] = []

    def keep(_: Workbench, __: Arch, **given: Any) -> nn.Module:
        held.append(given["teachers"])
        raise KeyboardInterrupt

    monkeypatch.setattr("nestling.pipeline.finetuning.train_network", keep)
    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, small(fresh), tuning(fresh, small(fresh)), listener=Silent())
    images = torch.from_numpy(fresh.data.search.array(16)[:8])
    largest = recalibrated(fresh, fresh.supernet.materialize(fresh.space.largest), fresh.space.largest)
    with torch.no_grad():
        expected = largest(images).softmax(1)
    assert torch.allclose(held[0](images), expected, atol=1e-6)
    assert torch.allclose(held[0](images[:1]), expected[:1], atol=1e-5)


def test_a_network_goes_on_from_the_supernet_s_weights_and_not_from_a_beginning(fresh: Workbench) -> None:
    config = fresh.config.train.model_copy(update={"zero_last_norms": True, "curriculum": "efficienttrain"})
    fresh.config = fresh.config.model_copy(update={"train": config})
    arch = small(fresh)
    card = finetune(fresh, arch, tuning(fresh, arch, epochs=1, lr=1e-30), listener=Silent())
    assert same(handed_over(fresh, card), recalibrated(fresh, fresh.supernet.materialize(arch), arch))
    before, after = card["finetuning"]["before"], card["finetuning"]["after"]
    assert before["test_correct"] == after["test_correct"]


def test_from_scratch_without_a_teacher_is_training_alone(fresh: Workbench, tmp_path: Path) -> None:
    arch = small(fresh)
    asked = tuning(fresh, arch, from_scratch=True, teacher="none")
    card = finetune(fresh, arch, asked, listener=Silent())
    alone = train_alone(fresh, arch, epochs=fresh.config.train.epochs, folder=tmp_path, listener=Silent())
    assert same(handed_over(fresh, card), recalibrated(fresh, alone, arch))


def test_from_scratch_the_learning_rate_falls_as_that_of_the_run_s_sandwich(
    fresh: Workbench, tmp_path: Path
) -> None:
    arch, cosine = small(fresh), tuning(fresh, small(fresh), from_scratch=True, teacher="none", epochs=1)
    sandwich = fresh.config.train.model_copy(update={"strategy": "sandwich"})
    fresh.config = fresh.config.model_copy(update={"train": sandwich})
    asked = tuning(fresh, arch, from_scratch=True, teacher="none", epochs=1)
    assert finetuned_name(arch, asked) != finetuned_name(arch, cosine)
    card = finetune(fresh, arch, asked, listener=Silent())
    alone = train_alone(fresh, arch, epochs=1, folder=tmp_path, listener=Silent())
    assert same(handed_over(fresh, card), recalibrated(fresh, alone, arch))
    assert tuning(fresh, arch) == dataclasses.replace(tuning(fresh, arch), constant_tail=False)


def test_precisions_are_those_of_the_arch(fresh: Workbench) -> None:
    arch = small(fresh, "w8a8")
    card = finetune(fresh, arch, tuning(fresh, arch, epochs=1), listener=Silent())
    assert card["quantized"]
    assert set(card["precisions"].values()) == {"w8a8"}
    folder = fresh.run.exports / card["name"]
    for name in ("model.onnx", "model_before.onnx"):
        operators = {node.op_type for node in load_onnx(folder / name).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    plain = folder / "model_fp32.onnx"
    assert "QuantizeLinear" not in {node.op_type for node in load_onnx(plain).graph.node}
    assert json.loads(metadata(plain)["nestling.finetuned"])["epochs"] == 1


def test_what_is_not_asked_for_is_the_papers_or_the_run_s(fresh: Workbench) -> None:
    arch, own = small(fresh), fresh.config.train
    assert tuning(fresh, arch) == Tuning(False, 25.0, 0.1 * own.lr, "largest", 1.0, 1.0)
    scratch = tuning(fresh, arch, from_scratch=True)
    assert scratch == Tuning(True, own.epochs, own.lr, "largest", 1.0, 1.0)
    for precision in ("fp32", "w8a8"):  # it would teach itself
        stem = {"stem.precision": precision}
        largest = fresh.space.canonical({**fresh.space.largest, **stem})
        assert tuning(fresh, largest).teacher == "none"
        assert tuning(fresh, largest).teacher_weight == 0.0
    assert tuning(fresh, fresh.space.largest, from_scratch=True).teacher == "largest"


def test_other_settings_are_another_network(fresh: Workbench) -> None:
    arch = small(fresh)
    asked = [
        tuning(fresh, arch, **given)
        for given in ({}, {"epochs": 2.0}, {"lr": 0.5}, {"teacher": "none"}, {"from_scratch": True})
    ]
    names = {finetuned_name(arch, each) for each in asked}
    assert len(names) == 5
    assert all(name.startswith(arch.key) for name in names)
    assert finetuned_name(arch, asked[0]) != finetuned_name(fresh.space.largest, asked[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0.0}, "epochs is 0; it must be above 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"teacher_weight": 0.0}, "teacher_weight is 0; it must be above 0"),
        ({"teacher_weight": 1.0, "teacher": "none"}, "there is no teacher; leave it out"),
        ({"labels_weight": -1.0}, "labels_weight is -1; it must be 0 or above"),
        ({"labels_weight": 0.0, "teacher": "none"}, "is none, so there is nothing to learn"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    fresh: Workbench, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tuning(fresh, small(fresh), **given)


def test_the_largest_cannot_learn_from_itself_alone(fresh: Workbench) -> None:
    with pytest.raises(ConfigError, match="is that network itself, so there is nothing to learn"):
        tuning(fresh, fresh.space.largest, teacher="largest", labels_weight=0.0)
    assert tuning(fresh, fresh.space.largest, teacher="largest").labels_weight == 1.0


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnet81", "teacher is 'resnet81': timm has no model"),
        ("resnet18", "knows 1000 classes"),
        ("test_resnet=nowhere.pth", "teacher is 'test_resnet=nowhere.pth'"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_refused_before_anything_is_written(
    fresh: Workbench, teacher: str, message: str
) -> None:
    arch = small(fresh)
    with pytest.raises(ConfigError, match=message):
        finetune(fresh, arch, tuning(fresh, arch, teacher=teacher), listener=Silent())
    assert not fresh.run.exports.exists()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that a teacher is read from."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"what it knew")

    def load(_: str, *, classes: int) -> Teacher:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))
        return Teacher(network, None, (0.5,) * 3, (0.5,) * 3)

    monkeypatch.setattr("nestling.pipeline.finetuning.load_teacher", load)
    monkeypatch.setattr("nestling.pipeline.workbench.load_teacher", load)
    return path


def test_a_teacher_s_file_that_has_changed_is_refused_when_training_goes_on(
    fresh: Workbench, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = small(fresh)
    asked = tuning(fresh, arch, epochs=1, teacher=f"resnet18={weights}")
    name = finetuned_name(arch, asked)
    with monkeypatch.context() as cut_off:
        cut_off.setattr("nestling.pipeline.finetuning.write_candidate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(fresh, arch, asked, listener=Silent())
    before = weights.read_bytes()
    weights.write_bytes(b"what it knows now")
    with pytest.raises(RunError, match=f"in {weights} are no longer those that .*{name} began with") as told:
        finetune(fresh, arch, asked, listener=Silent())
    assert "bring that file back, or remove" in str(told.value)
    weights.write_bytes(before)
    card = finetune(fresh, arch, asked, listener=Silent())
    assert card["finetuning"]["teacher_files"] == {str(weights): file_key(weights)}
    weights.write_bytes(b"what it knows now")
    with pytest.raises(RunError, match=f"exports/{name} began with"):
        finetune(fresh, arch, asked, listener=Silent())
    weights.unlink()  # what is finished needs it no longer
    assert finetune(fresh, arch, asked, listener=Silent()) == card


def test_a_teacher_s_file_that_has_changed_is_refused_when_a_supernet_s_training_goes_on(
    fresh: Workbench, weights: Path, device: Device
) -> None:
    def again() -> Workbench:
        bench = opened(fresh.run.folder, device)
        taught = bench.config.train.model_copy(update={"teachers": (f"resnet18={weights}",)})
        bench.config = bench.config.model_copy(update={"train": taught})
        return bench

    assert again().teachers is not None
    assert again().teachers is not None
    weights.write_bytes(b"what it knows now")
    with pytest.raises(RunError, match=f"in {weights} are no longer those"):
        _ = again().teachers


def test_a_supernet_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    bench = Workbench(Run.create(tmp_path / "new", load_config(TOY)))
    arch = bench.space.smallest
    with pytest.raises(RunError, match="is not finished"):
        finetune(bench, arch, tuning(bench, arch), listener=Silent())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), Alone()),
        (("strategy='alone'", "teachers=['a']", "teacher_weight=2.0"), Alone(teacher=2.0, labels=0.0)),
        (("strategy='alone'", "teachers=['a']", "teacher_labels=0.5"), Alone(teacher=1.0, labels=0.5)),
        (("strategy='progressive-shrinking'", "teachers=['a']"), Alone(teacher=1.0, labels=1.0)),
    ],
)
def test_training_alone_weighs_the_run_s_teachers_as_its_subnets_do(
    settings: tuple[str, ...], expected: Alone
) -> None:
    assert alone_with(load_config(TOY, overrides=[f"train.{each}" for each in settings]).train) == expected


class Favourite(nn.Module):
    """Holds the first class for likely, whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([9.0] + [0.0] * 9).repeat(len(images), 1)


def test_a_network_trained_alone_learns_from_the_teachers_that_the_supernet_learnt_from(
    fresh: Workbench, tmp_path: Path
) -> None:
    config = fresh.config.train.model_copy(
        update={"strategy": "progressive-shrinking", "teachers": ("favourite",), "teacher_weight": 3.0}
    )
    fresh.config = fresh.config.model_copy(update={"train": config})
    fresh.teachers = SoftLabels([Teacher(Favourite(), None, fresh.data.mean, fresh.data.std)],
                                mean=fresh.data.mean, std=fresh.data.std)  # fmt: skip
    alone = train_alone(fresh, fresh.space.largest, epochs=1.0, folder=tmp_path / "a", listener=Silent())
    supernet = fresh.new_supernet()
    train(
        supernet, fresh.data.train, strategy=Alone(teacher=3.0, labels=1.0), teachers=fresh.teachers,
        config=recipe_alone(config, epochs=1.0, given=False, largest=True), seed=fresh.config.seed,
        batch_size=fresh.config.data.batch_size, augment=fresh.config.data.augment, folder=tmp_path / "b",
    )  # fmt: skip
    assert same(alone, supernet.materialize(fresh.space.largest))
