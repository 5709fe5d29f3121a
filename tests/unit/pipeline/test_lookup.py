from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestling.config import load_config
from nestling.pipeline.lookup import find_arch
from nestling.pipeline.studies import STUDY, problem
from nestling.pipeline.workbench import Workbench
from nestling.run import Run
from nestling.search import search
from nestling.space import Arch, SpaceError

TOY = Path(__file__).parents[2] / "toy.toml"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A run with a study of two trials, an exported network and an evaluated one."""
    bench = Workbench(Run.create(tmp_path_factory.mktemp("runs") / "toy", load_config(TOY)))

    def metrics(arch: Arch) -> dict[str, float]:
        cost = float(arch.integer("s1.width"))
        return {"top1": cost / 1000, "latency_ms": cost, "size_mb": 1, "mmacs": cost, "peak_mb": 1}

    search(
        problem(bench), metrics, storage=bench.run.study_file, name=STUDY, trials=2, strategy="random",
        population=4, seed=0, warm_start=2,
    )  # fmt: skip
    (bench.run.exports / "01-known").mkdir(parents=True)
    bench.run.write_json("exports/01-known/card.json", {"decisions": dict(middle(bench))})
    (bench.run.folder / "evaluation").mkdir()
    bench.run.write_json("evaluation/abcdef.json", {"decisions": dict(middle(bench))})
    return bench


def middle(bench: Workbench) -> Arch:
    return bench.space.canonical({**bench.space.largest, "resolution": 8})


def test_an_arch_is_found_by_each_of_its_names(bench: Workbench, tmp_path: Path) -> None:
    arch = middle(bench)
    (tmp_path / "arch.json").write_text(arch.to_json())
    for name in ("01-known", "abcdef", arch.to_json(), f" {json.dumps(dict(arch), indent=2)}"):
        assert find_arch(bench, name) == arch
    assert find_arch(bench, str(tmp_path / "arch.json")) == arch
    for name, end in (("smallest", bench.space.smallest), ("largest", bench.space.largest)):
        assert find_arch(bench, name) == end
        assert find_arch(bench, end.key) == end  # the search begins with both


@pytest.mark.parametrize("name", ["0123456789ab", "nothing", "../exports/01-known", "", "01-know"])
def test_a_name_of_nothing_in_the_run_is_refused_with_what_would_do(bench: Workbench, name: str) -> None:
    with pytest.raises(SpaceError, match=r"no arch .*: give smallest, largest, a trial's key"):
        find_arch(bench, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the JSON that was given: "),
        ('{"resolution": 8}', "is not decided"),
        ('{"colour": "red"}', "colour"),
        ('{"resolution": [8]}', "an arch is a JSON object of plain values"),
    ],
)
def test_decisions_that_are_not_of_the_space_are_refused(bench: Workbench, text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        find_arch(bench, text)


def test_a_run_that_was_not_searched_has_no_study_made_by_asking(tmp_path: Path) -> None:
    bench = Workbench(Run.create(tmp_path / "toy", load_config(TOY)))
    with pytest.raises(SpaceError, match="no arch '0123456789ab'"):
        find_arch(bench, "0123456789ab")
    assert not bench.run.study_file.exists()
