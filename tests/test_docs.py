"""What the documents and data files say is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from nestling.cli import app
from nestling.config import READ_BY, QuantConfig, TrainConfig, load_config
from nestling.models.building import build_shapes
from nestling.models.families import family
from nestling.models.soundness import check
from nestling.quant import PRECISIONS
from nestling.space import load_space

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_opens_with_what_to_expect(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    opening = path.read_text().split("\n\n")[0]
    assert opening.startswith("#")
    assert f"nestling run configs/{path.name}" in opening


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.toml")), ids=lambda path: path.stem)
def test_every_space_loads_and_its_ends_can_be_built(path: Path) -> None:
    space = load_space(path).with_constants({"classes": 10})
    build = family(space.family).build
    sizes = [
        sum(p.numel() for p in build_shapes(build, arch).parameters())
        for arch in (space.smallest, space.largest)
    ]
    assert sizes[0] < sizes[1]


def test_the_readme_says_where_it_runs_and_no_code_is_for_other_systems() -> None:
    told = (ROOT / "README.md").read_text().split("## Two minutes\n")[1].split("\n## ")[0]
    assert "on Windows it does not" in told
    package = ROOT / "src" / "nestling"
    # the worker is a program by itself, for boards
    others = {path.name for path in package.rglob("*.py") if "win32" in path.read_text()} - {"worker.py"}
    assert others == set()


def test_the_readme_s_map_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    told = re.search(r"```text\nsrc/nestling/\n(.*?)```", readme, re.DOTALL)
    assert told is not None
    names = {line.split()[0].rstrip("/") for line in told[1].splitlines() if line.strip()}
    there = {
        path.name
        for path in (ROOT / "src" / "nestling").iterdir()
        if path.name not in {"__pycache__", "__init__.py", "py.typed"}
    }
    assert names == there


def test_every_strategy_is_told_and_only_keys_that_there_are() -> None:
    part = (ROOT / "docs" / "training.md").read_text()
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
    strategies = {row[0].split("`")[1]: row[2] for row in rows if len(row) == 3}
    options = [row[0] for row in rows if len(row) == 2]
    assert strategies.keys() == READ_BY.keys()
    assert options
    keys = set(re.findall(r"`([a-z_]+)[` ]", " ".join([*strategies.values(), *options]))) - {"false"}
    assert keys <= TrainConfig.model_fields.keys()


def test_every_precision_and_every_key_of_quantization_is_told() -> None:
    part = (ROOT / "docs" / "search_spaces.md").read_text().split("\n## Precisions\n")[1]
    precisions, keys = (
        [line for line in table.splitlines() if line.startswith("| `")]
        for table in part.split("| precision |")[1].split("| key |")
    )
    named, told = (
        set(re.findall(r"`([^`]+)`", " ".join(row.split(" | ")[0] for row in rows)))
        for rows in (precisions, keys)
    )
    assert named == PRECISIONS.keys()
    assert told == QuantConfig.model_fields.keys()
    for key in ("calibration", "weights", "rounding"):
        row = next(row for row in keys if row.startswith(f"| `{key}`"))
        assert set(get_args(QuantConfig.model_fields[key].annotation)) <= set(re.findall(r"`([^`]+)`", row))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem
)
def test_every_file_that_a_document_links_to_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_benchmark_is_told_or_is_a_part_of_one() -> None:
    told = (ROOT / "docs" / "measured.md").read_text() + (ROOT / "docs" / "training.md").read_text()
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "Benchmark(" in path.read_text()}
    assert {name for name in scripts if f"({name})" not in told and f"/{name})" not in told} == set()


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert commands
    for command in commands:
        assert f"| `nestling {command}" in readme, command


def test_the_walk_through_of_your_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "your_network.md").read_text()
    module, usage = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (toml,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    (tmp_path / "my_network.py").write_text(module)
    (tmp_path / "my_space.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(usage, names)
    assert names["network"](torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    space = load_space(tmp_path / "my_space.toml").with_constants({"classes": 10})
    users = family(space.family)
    check(space, users.build, layout=users.layout)
    assert space.only({"resolution": [32]}).size == names["space"].size


def test_a_function_of_the_walk_through_has_twenty_lines() -> None:
    document = (ROOT / "docs" / "your_network.md").read_text()
    first = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[0]
    assert len(first.splitlines()) <= 21
