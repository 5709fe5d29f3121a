from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nestling"
STAGES = {"train", "quant", "export", "profile", "search", "report"}
OTHERS = {
    "config",
    "run",
    "energy",
    "memory",
    "owners",
    "file_keys",
    "space",
    "models",
    "data",
    "pipeline",
    "console",
    "cli",
}
EVERY_PART = OTHERS | STAGES

MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "config": set(),
    "run": {"config"},
    "energy": set(),
    "memory": set(),
    "owners": set(),
    "file_keys": set(),
    "space": set(),
    "models": {"space"},
    "data": {"config"},
    "train": {"models", "data", "space", "config", "run", "energy"},
    "quant": {"models", "data"},
    "export": {"models", "run", "file_keys"},
    "profile": {"owners", "file_keys"},
    "search": {"space", "owners"},
    "report": {"search", "profile", "space", "run"},
    "pipeline": EVERY_PART - {"memory", "pipeline", "console", "cli"},
    "console": {"pipeline"},
    "cli": {"pipeline", "config", "console", "run", "space", "profile", "memory"},
}
"""Part of the package -> the other parts that it may import."""

ONLY_IN: dict[str, set[str]] = {
    "optuna": {"search"},
    "sqlalchemy": {"search"},
    "onnxruntime": {"profile"},
    "onnx": {
        "export",
        "quant.qdq",
        "quant.blocks",
        "quant.gates",
        "quant.protos",
        "profile.torch_runtime",
    },
    "timm": {"models"},
    "torch_pruning": {"models.convert"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"console"},
    "datasets": {"data.tables"},
    "matplotlib": {"report"},
    "pynvml": {"energy", "profile.worker"},
    "asyncssh": {"profile.transport_ssh"},
    "openvino": {"profile.openvino_runtime"},
}
"""Library -> the parts or modules that alone may import it."""

NEVER_IN: dict[str, set[str]] = {
    "torch": {"space", "config", "run", "energy", "profile", "search", "report", "console", "cli"},
}
"""Library -> the parts that must run, or start, without it."""

SENT = {"profile.openvino_runtime", "profile.torch_runtime"}
"""Modules that are sent to a worker, and imported nowhere else: a runtime of which each needs the library."""


@dataclass(frozen=True)
class Import:
    module: str  # who imports, such as `train.loop`
    name: str  # what, such as `nestling.space`
    line: int

    @property
    def part(self) -> str:
        return self.module.split(".")[0]

    @property
    def library(self) -> str:
        return self.name.split(".")[0]

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.name}"


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import of `source`, also within functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute"
            assert node.module is not None
            # `from nestling import pipeline` imports a part
            names = [f"nestling.{a.name}" for a in node.names] if node.module == "nestling" else [node.module]
            for name in names:
                yield Import(module, name, node.lineno)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            hidden = called in ("__import__", "importlib.import_module", "import_module")
            assert not hidden, f"{module}, line {node.lineno}: an import that cannot be checked"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


ALL_IMPORTS = [i for name, path in modules().items() for i in imports_of(path.read_text("utf-8"), name)]


def forbidden(found: Import) -> bool:
    """Whether the tables above forbid an import."""
    if found.library == "nestling":
        part = [*found.name.split("."), "__init__"][1]
        return part != found.part and part not in MAY_IMPORT[found.part]
    here = {".".join(found.module.split(".")[:n]) for n in (1, 2)}
    banned = found.part in NEVER_IN.get(found.library, set()) and found.module not in SENT
    return not here & ONLY_IN.get(found.library, here) or banned


def test_every_part_of_the_package_is_in_the_table() -> None:
    assert {name.split(".")[0] for name in modules()} == set(MAY_IMPORT)


def test_parts_import_only_what_the_table_allows() -> None:
    assert [str(found) for found in ALL_IMPORTS if forbidden(found)] == []


def test_stages_meet_only_in_the_pipeline() -> None:
    for stage in STAGES - {"report"}:
        assert not MAY_IMPORT[stage] & STAGES


def test_arrows_between_parts_point_one_way() -> None:
    order: list[str] = []
    left = dict(MAY_IMPORT)
    while left:
        ready = sorted(part for part, needed in left.items() if needed <= set(order))
        assert ready, f"these import each other: {sorted(left)}"
        order += ready
        left = {part: needed for part, needed in left.items() if part not in ready}


def test_the_worker_needs_nothing_but_python_numpy_and_the_runtime() -> None:
    libraries = {i.library for i in ALL_IMPORTS if i.module == "profile.worker"}
    optional = {"pynvml"}  # looked for before it is imported: GPUs tell their energy by it
    assert libraries - sys.stdlib_module_names - optional == {"numpy", "onnxruntime"}


def test_modules_that_are_sent_to_a_worker_import_nothing_of_ours() -> None:
    sent = [i for i in ALL_IMPORTS if i.module in SENT]
    assert {i.module for i in sent} == SENT
    assert [str(i) for i in sent if i.library == "nestling"] == []
    assert [str(i) for i in ALL_IMPORTS if i.name.removeprefix("nestling.") in SENT] == []


def test_the_command_line_starts_with_light_imports_alone() -> None:
    # what stands at the top of a module is imported by `nestling --help`
    for module in ("__init__", "cli"):
        for node in ast.parse(modules()[module].read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                libraries = {i.library for i in imports_of(ast.unparse(node), module)}
                assert libraries <= {*sys.stdlib_module_names, "typer", "click"}, ast.unparse(node)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("space.arch", "import torch"),
        ("space.arch", "from nestling.config import Part"),
        ("profile.worker", "import torch.nn"),
        ("train.loop", "from nestling.quant import observe"),
        ("models.cost", "import onnx"),
        ("quant.fake", "import onnx.helper"),
        ("pipeline.stages", "import optuna"),
        ("pipeline.stages", "from nestling import console"),
        ("console", "from nestling.run import Run"),
        ("train.loop", "if TYPE_CHECKING:\n    from timm.data import Mixup"),
        ("search.study", "def f():\n    from nestling.models.cost import cost"),
        ("report.page", "from nestling import models"),
    ],
)
def test_the_check_finds_what_is_forbidden(module: str, line: str) -> None:
    assert [found for found in imports_of(line, module) if forbidden(found)]


def test_the_check_finds_hidden_and_relative_imports() -> None:
    for line in ("import importlib\nimportlib.import_module('torch')", "from . import arch"):
        with pytest.raises(AssertionError):
            list(imports_of(line, "space.files"))
