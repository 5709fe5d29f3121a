from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nestling.run import write_atomically
from nestling.train import checkpoint as module
from nestling.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def at(step: int) -> Checkpoint:
    return Checkpoint(
        step, {"w": torch.full((2, 3), float(step)), "count": torch.tensor(step)}, {"loss": 0.5}
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def loaded_step(folder: Path) -> int:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    assert torch.equal(checkpoint.tensors["w"], at(checkpoint.step).tensors["w"])
    return checkpoint.step


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new", at(5))
    checkpoint = load_checkpoint(tmp_path / "new")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (5, {"loss": 0.5})
    newest = load_newest(tmp_path / "new")
    assert newest is not None
    assert (newest.step, newest.state) == (5, {"loss": 0.5})
    assert torch.equal(checkpoint.tensors["w"], torch.full((2, 3), 5.0))
    assert int(checkpoint.tensors["count"]) == 5


def test_a_folder_without_checkpoints_holds_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None
    assert load_newest(tmp_path) is None


def test_two_generations_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, at(step))
    assert files(tmp_path) == {"checkpoints.json", "step-00000002.safetensors", "step-00000003.safetensors"}
    assert loaded_step(tmp_path) == 3


@pytest.mark.parametrize("how", ["damaged", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, how: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, at(step))
    newest = tmp_path / "step-00000002.safetensors"
    if how == "damaged":
        damage(newest)
    elif how == "cut":
        newest.write_bytes(newest.read_bytes()[:20])
    else:
        newest.unlink()
    with pytest.warns(
        RuntimeWarning, match=r"step-00000002\.safetensors is damaged; the checkpoint of step 1"
    ):
        assert loaded_step(tmp_path) == 1
    with pytest.raises(CheckpointError, match=r"newest .*step-00000002\.safetensors, is damaged or gone"):
        load_newest(tmp_path)


def test_after_going_back_the_good_checkpoint_outlives_the_damaged_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, at(step))
    damage(tmp_path / "step-00000020.safetensors")
    save_checkpoint(tmp_path, at(15))
    assert files(tmp_path) == {"checkpoints.json", "step-00000010.safetensors", "step-00000015.safetensors"}
    damage(tmp_path / "step-00000015.safetensors")
    with pytest.warns(RuntimeWarning):
        assert loaded_step(tmp_path) == 10


def test_when_none_is_whole_all_are_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, at(step))
        damage(tmp_path / f"step-{step:08d}.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000002.*step-00000001.*remove the folder"):
        load_checkpoint(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(1))
    index = tmp_path / "checkpoints.json"
    index.write_text(index.read_text()[:30])
    with pytest.raises(CheckpointError, match=r"checkpoints\.json.*is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("write", [1, 2])
def test_a_save_that_is_killed_leaves_the_checkpoints_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, at(step))
    written: list[Path] = []

    def killed(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == write:
            (path.parent / f".{path.name}.abc").write_bytes(data[:9])  # what is left of a killed process
            raise KeyboardInterrupt
        write_atomically(path, data)

    monkeypatch.setattr(module, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, at(3))
    assert loaded_step(tmp_path) == 2
    monkeypatch.undo()
    save_checkpoint(tmp_path, at(4))
    assert files(tmp_path) == {"checkpoints.json", "step-00000002.safetensors", "step-00000004.safetensors"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_never_holds_what_is_not_a_number(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path, at(1))
    bad = Checkpoint(2, {"largest/stem.bias": torch.tensor([0.0, value])}, {})
    with pytest.raises(ValueError, match=r"largest/stem\.bias holds numbers that are not finite"):
        save_checkpoint(tmp_path, bad)
    assert files(tmp_path) == {"checkpoints.json", "step-00000001.safetensors"}
    assert loaded_step(tmp_path) == 1


def test_the_files_are_safetensors_and_an_index_that_a_person_can_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(7))
    (entry,) = json.loads((tmp_path / "checkpoints.json").read_text())
    assert set(entry) == {"file", "step", "sha256", "state"}
    assert (entry["file"], entry["step"]) == ("step-00000007.safetensors", 7)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adamw"])
def test_a_restored_optimizer_takes_the_same_step(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    network.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    images = torch.randn(2, 2, 5, 5)

    def optimizer() -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        if kind == "rmsprop":
            return torch.optim.RMSprop(network.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(network.parameters(), lr=0.1)

    def step(chosen: torch.optim.Optimizer) -> None:
        chosen.zero_grad()
        torch.autograd.backward((network(images) * network.get_parameter("scale")).square().sum())
        chosen.step()

    parameters = dict(network.named_parameters())
    first = optimizer()
    step(first)
    saved = {
        name: tensor.contiguous().clone() for name, tensor in optimizer_tensors(first, parameters).items()
    }
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step(first)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    network.load_state_dict(weights)
    second = optimizer()
    restore_optimizer(second, saved, parameters)
    for state in second.state.values():
        for value in state.values():
            assert value.ndim < 4 or value.is_contiguous(memory_format=torch.channels_last)
    step(second)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
