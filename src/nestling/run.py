"""A run's folder: its files by name, where they came from, and the one way in which files are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nestling.config import ConfigError, RunConfig, parse_config

PACKAGES = ("nestling", "torch", "torchvision", "timm", "optuna", "onnx", "onnxruntime", "numpy")


OF_A_MACHINE = {"torch_device", "data.source", "data.workers"}
"""What a copy of a run on another machine may need otherwise: images are the same wherever they lie."""
CHANGEABLE = OF_A_MACHINE | {
    "search.trials", "search.strategy", "search.population", "search.batch", "search.warm_start",
    "search.sensitivity", "search.race", "search.warm_from", "search.stop_below", "search.workers",
    "search.study", "search.limits", "export.members", "train.checkpoint_seconds",
    "profile.timeout_seconds",
}  # fmt: skip
"""What may change after training has begun: it alters nothing that was measured."""
FORGETS_NOTHING = CHANGEABLE - {"data.source", "search.limits"}
"""What may change before training while all that was found stays.

Other images may have other classes, and whether latency is limited decides which precisions are offered.
"""
DERIVED = (
    "space.toml", "space_given.toml", "data.json", "precisions.json", "teachers.json",
    "latency_measured.json", "latency_model.json",
)  # fmt: skip
"""What comes of a configuration before training: one that differs in what it came of begins without it.

Times of files are in the measurement store all the same.
"""


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message names the folder and what would do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names the path and the size.
    """
    try:
        _write(path, data)
    except OSError as error:
        size = f"{len(data):,} bytes"
        raise OSError(error.errno, f"could not write {path} ({size}): {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class Run:
    """One run's folder. `Run.create` makes it, `Run.open` finds it again."""

    folder: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.json"

    @property
    def space_file(self) -> Path:
        """The search space, with the constants that the data decided."""
        return self.folder / "space.toml"

    @property
    def given_space_file(self) -> Path:
        """The search space before data and device had their say; runs of before have none."""
        return self.folder / "space_given.toml"

    @property
    def study_file(self) -> Path:
        """Optuna's study, in SQLite."""
        return self.folder / "study.db"

    @property
    def exports(self) -> Path:
        """The folder of exported networks."""
        return self.folder / "exports"

    @classmethod
    def create(cls, folder: Path, config: RunConfig) -> Run:
        """The run in `folder`, made if need be, holding `config` and its provenance.

        Before training has begun any configuration takes the place of the one that is there, afterwards one
        that differs only in what alters nothing that was measured.

        Raises:
            RunError: the folder holds a run with another configuration.
        """
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        if run.has_begun:
            run.check_changes(config)
            run.keep(config)
            return run
        if run.config_file.exists():
            changed = run.changes(config)
            if not changed:
                return run
            if changed - FORGETS_NOTHING:
                run.forget_derived()
        run.write_json("provenance.json", provenance())
        run._write_config(config)
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run that `folder` holds.

        Raises:
            RunError: there is none.
        """
        run = cls(folder)
        if not run.config_file.exists():
            raise RunError(f"{folder} holds no run (it has no config.json); `nestling run CONFIG` makes one")
        return run

    def config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            ConfigError: the file was changed to something that is no configuration.
        """
        try:
            content = json.loads(self.config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.config_file} is not JSON: {error}") from None
        return parse_config(content, origin=str(self.config_file))

    @property
    def has_begun(self) -> bool:
        """Whether the training of a configuration has begun here."""
        return self.config_file.exists() and (self.folder / "training").exists()

    def changes(self, config: RunConfig) -> set[str]:
        """The dotted names of what differs between the run's configuration and `config`."""
        return differences(self.config().model_dump(), config.model_dump())

    def check_changes(self, config: RunConfig) -> None:
        """Refuses a configuration that differs in what was measured by.

        Raises:
            RunError: it does.
        """
        fixed = self.changes(config) - CHANGEABLE
        if fixed:
            raise RunError(
                f"{self.folder} holds a run with another configuration (it differs in "
                f"{', '.join(sorted(fixed))}); choose another folder with --output, or remove this one"
            )

    def keep(self, config: RunConfig) -> None:
        """Makes `config` the run's configuration, where it differs; provenance tells of it under `later`."""
        if self.changes(config):
            first = self.read_json("provenance.json") or {}
            later = [*first.get("later", []), provenance()]
            self.write_json("provenance.json", {**first, "later": later})
            self._write_config(config)

    def forget_derived(self) -> None:
        """Removes what came of a configuration and its space before training, so that it is found anew."""
        for name in DERIVED:
            (self.folder / name).unlink(missing_ok=True)

    def _write_config(self, config: RunConfig) -> None:
        write_atomically(self.config_file, config.model_dump_json(indent=2).encode())

    def write_json(self, name: str, content: Any) -> Path:
        """The path of `name` in the folder, now holding `content` as JSON."""
        path = self.folder / name
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        return path

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where there is no such file."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def provenance() -> dict[str, Any]:
    """Where and with what a run is made: versions, machine, the command, the commit of the working folder."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a folder of sources
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of what differs between two configurations; all limits count as one."""
    found: set[str] = set()
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping) and key != "limits":
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.add(f"{prefix}{key}")
    return found
