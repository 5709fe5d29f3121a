"""A run for another device begins with what the run that it begins from has in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nestling.config import load_config
from nestling.pipeline import stages
from nestling.pipeline.listening import Silent
from nestling.pipeline.stages import begin_from
from nestling.pipeline.workbench import OFFERED, Workbench
from nestling.run import Run, RunError
from nestling.space import load_space

TESTS = Path(__file__).parents[2]
DROPPED = {"offered": {"stem.precision": ["fp32"]}}


@pytest.fixture(autouse=True)
def _device_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "offer_precisions", lambda *_, **__: None)
    monkeypatch.setattr(stages, "data_facts", lambda bench: {"fingerprint": bench.data.fingerprint})
    monkeypatch.setattr(Workbench, "device", SimpleNamespace(fingerprint="a device"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run that looks trained, whose device could not use one of the precisions."""
    space = Path(shutil.copy(TESTS / "toy_space.toml", tmp_path / "space.toml"))
    config = load_config(TESTS / "toy.toml").model_copy(update={"space": str(space)})
    bench = Workbench(Run.create(tmp_path / "source", config))
    bench.run.write_json(OFFERED, DROPPED)
    assert bench.space.by_name["stem.precision"].values == ("fp32",)
    bench.run.write_json("data.json", {"fingerprint": bench.data.fingerprint})
    bench.run.write_json("training.json", {})
    bench.checkpoints.mkdir()
    (bench.checkpoints / "checkpoints.json").write_text('[{"sha256": "abc"}]')
    return bench.run.folder


def begun(source: Path, *overrides: str) -> Workbench:
    return begin_from(source.with_name("new"), other=source, overrides=overrides, listener=Silent())


@pytest.mark.parametrize("fate", ["kept", "gone", "changed"])
def test_it_has_the_space_that_was_given_whatever_became_of_its_file(source: Path, fate: str) -> None:
    file = source.with_name("space.toml")
    wanted = load_space(TESTS / "toy_space.toml")
    if fate == "gone":
        file.unlink()
    elif fate == "changed":
        file.write_text(file.read_text().replace("kernel = [3, 5]", "kernel = [3, 7]"))
    for _ in range(2):  # the second time what was begun goes on
        found = begun(source).space
        assert {choice.name: choice.values for choice in found.choices} == {
            **{choice.name: choice.values for choice in wanted.choices},
            "classes": (10,),
        }


def test_of_a_run_that_keeps_no_copy_the_file_is_read_and_must_be_as_it_was(source: Path) -> None:
    (source / "space_given.toml").unlink()
    file = source.with_name("space.toml")
    content = file.read_text()
    file.unlink()
    with pytest.raises(RunError, match=r"source keeps no copy .*space\.toml is gone; bring it back"):
        begun(source)
    file.write_text(content.replace("kernel = [3, 5]", "kernel = [3, 7]"))
    with pytest.raises(RunError, match=r"space\.toml was changed since .*source began, .*bring it back"):
        begun(source)
    assert not source.with_name("new").exists()
    file.write_text(content)
    assert begun(source).space.by_name["stem.precision"].values == ("w8a8", "fp32")


def test_other_images_are_refused_before_anything_is_copied(source: Path) -> None:
    (source / "data.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(RunError, match="no longer those"):
        begun(source)
    assert not (source.with_name("new") / "training").exists()


def test_a_device_is_let_go_where_a_folder_has_a_supernet_of_its_own(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = begun(source).checkpoints
    (checkpoints / "checkpoints.json").write_text('[{"sha256": "another"}]')
    closed: list[Workbench] = []
    monkeypatch.setattr(Workbench, "close", lambda bench: closed.append(bench))
    with pytest.raises(RunError, match="has a supernet of its own"):
        begun(source)
    assert len(closed) == 1
