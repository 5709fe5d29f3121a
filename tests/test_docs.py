"""What the documents and data files say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nestling.config import load_config
from nestling.models.building import build_shapes
from nestling.models.families import family
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


def test_every_file_that_the_readme_links_to_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if "://" not in target:
            assert (ROOT / target).exists(), target
