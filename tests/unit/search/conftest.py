"""A toy search whose outcome is known: the metrics of an arch are a formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from nestling.search import Metrics, Problem
from nestling.space import Arch, Choice, Need, SearchSpace


def toy_metrics(arch: Arch) -> Metrics:
    """Deeper, wider and larger is better and dearer; the kernel costs and brings little."""
    cost = arch.integer("depth") * arch.integer("width") * (1 + 0.1 * arch.integer("b2.kernel"))
    cost *= 2 if arch["precision"] == "fp32" else 1
    cost *= arch.integer("resolution") / 16
    top1 = 1 - 1 / (1 + cost) - 0.03 * (arch.integer("width") == 3) - 0.02 * (arch["precision"] == "fp32")
    return {"top1": top1, "latency_ms": cost, "size_mb": float(arch.integer("width"))}


@pytest.fixture
def space() -> SearchSpace:
    """144 archs."""
    return SearchSpace(
        "toy",
        (
            Choice("resolution", (16, 24, 32)),
            Choice("depth", (1, 2, 3)),
            Choice("width", (1, 2, 3, 4)),
            Choice("b2.kernel", (3, 5), (Need("depth", 2),)),
            Choice("precision", ("w8a8", "fp32")),
            Choice("classes", (10,)),
        ),
    )


@pytest.fixture
def problem(space: SearchSpace) -> Problem:
    return Problem.parse(space, objectives=["top1", "latency_ms"], limits={})


@pytest.fixture
def toy() -> Callable[[Arch], Metrics]:
    return toy_metrics


@pytest.fixture(scope="session")
def empty_study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with Optuna's tables, which take longer to make than most tests."""
    path = tmp_path_factory.mktemp("study") / "empty.db"
    RDBStorage(f"sqlite:///{path}")
    return path


@pytest.fixture
def file(empty_study_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_study_file, tmp_path / "study.db"))
