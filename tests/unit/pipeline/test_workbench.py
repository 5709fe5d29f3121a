"""A run keeps the images that it began with."""

from __future__ import annotations

from pathlib import Path

from nestling.config import load_config
from nestling.data import load_data
from nestling.pipeline.summary import data_facts
from nestling.pipeline.workbench import Workbench
from nestling.run import Run

TOY = Path(__file__).parents[2] / "toy.toml"
FEWER = ["data.search_images=6", "search.calibration_images=4"]  # than the ten classes


def open_bench(folder: Path) -> Workbench:
    return Workbench(Run.create(folder, load_config(TOY, overrides=FEWER)))


def calibrated_on(bench: Workbench) -> set[int]:
    return set(map(int, bench.data.train.calibration(4).labels))


def test_a_run_begun_with_the_first_classes_opens_and_goes_on_with_them(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    data = bench.config.data.model_copy(update={"size": bench.data.size})
    before = load_data(data, seed=bench.config.seed, few="first")
    assert before.fingerprint != bench.data.fingerprint
    bench.run.write_json("data.json", {"fingerprint": before.fingerprint})  # `few` was not written down
    again = open_bench(tmp_path)
    assert again.data.fingerprint == before.fingerprint
    assert again.data.search.key == before.search.key
    assert calibrated_on(again) == {0, 1, 2, 3}
    assert data_facts(again)["few"] == "first"


def test_a_run_begun_now_draws_the_classes_of_few_images_and_finds_them_again(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    bench.run.write_json("data.json", data_facts(bench))
    again = open_bench(tmp_path)
    assert again.data.search.key == bench.data.search.key
    assert calibrated_on(again) == calibrated_on(bench) != {0, 1, 2, 3}


def test_files_are_checked_on_the_same_images_whenever_they_are_asked_for(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    assert bench.checked_images is bench.checked_images  # or they would be resized for each file
    assert bench.checked_images.key == bench.data.search.take(6).key
