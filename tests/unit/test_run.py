from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nestling import run as module
from nestling.config import ConfigError, RunConfig, override_config
from nestling.pipeline.latency import MEASURED, MODEL
from nestling.pipeline.teaching import TEACHERS
from nestling.pipeline.workbench import OFFERED
from nestling.run import Run, RunError, provenance, write_atomically

CONFIG = RunConfig(name="toy", space="/spaces/toy.toml")


def test_a_file_is_written_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["fsync", "replace", "write"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(os, "fsync" if fails == "fsync" else "fdopen", full)
    with pytest.raises(OSError, match=r"could not write .*file \(2,000 bytes\): No space left") as caught:
        write_atomically(path, b"x" * 2000)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*missing/file \(3 bytes\): No such file"):
        write_atomically(tmp_path / "missing" / "file", b"new")


def test_a_run_is_found_again_with_its_configuration_and_provenance(tmp_path: Path) -> None:
    made = Run.create(tmp_path / "deep" / "run", CONFIG)
    found = Run.open(tmp_path / "deep" / "run")
    assert found == made
    assert found.config() == CONFIG
    assert set(found.read_json("provenance.json")) == {
        "command", "python", "packages", "machine", "system", "cores", "commit",
    }  # fmt: skip


def test_a_run_with_the_same_configuration_is_continued_and_keeps_its_provenance(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    run.write_json("provenance.json", {"python": "then"})
    assert Run.create(tmp_path, CONFIG) == run
    assert run.read_json("provenance.json") == {"python": "then"}


def test_before_training_a_configuration_is_replaced_with_all_that_came_of_it(
    tmp_path: Path,
) -> None:
    run = Run.create(tmp_path, CONFIG)
    old = [run.space_file.name, run.given_space_file.name, "data.json", OFFERED, TEACHERS, MEASURED, MODEL]
    for name in (*old, "measurements.db"):
        (tmp_path / name).write_text("of the old one")
    other = CONFIG.model_copy(update={"seed": 2})
    assert Run.create(tmp_path, other).config() == other
    assert [name for name in old if (tmp_path / name).exists()] == []
    assert (tmp_path / "measurements.db").exists()  # of files, whatever configuration they are of


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["search.trials=200"], True),
        (["data.workers=1", "profile.timeout_seconds=9.0", "export.members=2"], True),
        (["search.trials=200", 'search.objectives=["top1"]'], False),
        (["search.limits.latency_ms=5"], False),  # precisions that have no latency are dropped
        (["data.source=/elsewhere"], False),
        (["profile.device=ssh://pi@board/ort:cpu"], False),
    ],
)
def test_before_training_no_more_is_forgotten_than_came_of_what_changed(
    tmp_path: Path, overrides: list[str], kept: bool
) -> None:
    other = override_config(CONFIG, overrides)
    assert other != CONFIG
    run = Run.create(tmp_path, CONFIG)
    files = [run.space_file, tmp_path / "data.json", tmp_path / MEASURED, tmp_path / MODEL]
    for file in files:
        file.write_text("of the old one")
    assert Run.create(tmp_path, other).config() == other
    assert [file.exists() for file in files] == [kept] * 4


def test_a_search_may_be_extended_after_training_has_begun(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG)
    (tmp_path / "training").mkdir()
    for change in ({"trials": 7}, {"limits": {"size_mb": 1.0}}, {"workers": 3}, {"strategy": "random"}):
        other = CONFIG.model_copy(update={"search": CONFIG.search.model_copy(update=change)})
        assert Run.create(tmp_path, other).config() == other


def test_later_commands_are_told_beside_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["nestling", "train", "toy.toml"])
    run = Run.create(tmp_path, CONFIG)
    began = run.read_json("provenance.json")
    (tmp_path / "training").mkdir()
    for trials in ("7", "8", "8"):
        monkeypatch.setattr(sys, "argv", ["nestling", "search", "--set", f"search.trials={trials}"])
        search = CONFIG.search.model_copy(update={"trials": int(trials)})
        run.keep(CONFIG.model_copy(update={"search": search}))
    found = run.read_json("provenance.json")
    later = found.pop("later")
    assert found == began
    assert [told["command"][-1] for told in later] == ["search.trials=7", "search.trials=8"]
    assert all(told.keys() == began.keys() for told in later)


def test_a_slower_file_may_be_waited_for_after_training_has_begun(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG)
    (tmp_path / "training").mkdir()
    profile = CONFIG.profile.model_copy(update={"timeout_seconds": 300.0})
    other = CONFIG.model_copy(update={"profile": profile})
    assert Run.create(tmp_path, other).config() == other


def test_a_run_with_another_configuration_is_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG)
    (tmp_path / "training").mkdir()
    train = CONFIG.train.model_copy(update={"lr": 0.5})
    search = CONFIG.search.model_copy(update={"objectives": ("size_mb",), "trials": 7})
    other = CONFIG.model_copy(update={"seed": 2, "train": train, "search": search})
    message = r"differs in search\.objectives, seed, train\.lr\); choose another folder"
    with pytest.raises(RunError, match=message):
        Run.create(tmp_path, other)
    assert Run.open(tmp_path).config() == CONFIG


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run .*nestling run CONFIG"):
        Run.open(tmp_path)


def test_a_configuration_that_was_damaged_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    run.config_file.write_text(run.config_file.read_text()[:40])
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        run.config()
    run.config_file.write_text(json.dumps({"name": "x", "space": "y", "sed": 1}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown key 'sed'; did you mean 'seed'"):
        Run.create(tmp_path, CONFIG)


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.read_json("facts.json") is None
    assert run.write_json("facts.json", {"a": [1, 2.5, None]}) == tmp_path / "facts.json"
    assert run.read_json("facts.json") == {"a": [1, 2.5, None]}


def test_provenance_is_told_without_git_and_without_an_installed_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    found = provenance()
    assert found["commit"] is None
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["torch"]


def test_the_commit_is_that_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance()["commit"] is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    assert len(provenance()["commit"]) == 40
