from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nestling.config import ConfigError, TrainConfig, load_config
from nestling.pipeline.alone import recipe_alone, train_alone
from nestling.pipeline.asked import float_space, paired_indices
from nestling.pipeline.evaluation import evaluate_supernet
from nestling.pipeline.listening import Silent
from nestling.pipeline.stages import open_run
from nestling.pipeline.studies import STUDY, problem
from nestling.pipeline.training import train_supernet
from nestling.pipeline.workbench import Workbench
from nestling.run import Run, RunError
from nestling.search import search
from nestling.space import Arch, Choice, SearchSpace
from nestling.train.evaluate import recalibrate, top1
from nestling.train.loop import train
from nestling.train.quality import hits_to_text
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Alone, Progress, Sandwich

TOY = Path(__file__).parents[2] / "toy.toml"


class StoppingAt(Silent):
    """Interrupts when that many networks are scored."""

    def __init__(self, number: int) -> None:
        self.number = number

    def scored(self, name: str, number: int, total: int) -> None:
        del name, total
        if number == self.number:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose supernet is trained, and nothing more."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    settings = ["train.epochs=1", "train.checkpoint_seconds=0"]
    bench = Workbench(Run.create(folder, load_config(TOY, overrides=settings)))
    train_supernet(bench, listener=Silent())
    return folder


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, evaluated without interruption."""
    folder = tmp_path_factory.mktemp("evaluated") / "toy"
    shutil.copytree(trained, folder)
    evaluate_supernet(open_run(folder), subnets=4, alone=2, epochs=1.0, listener=Silent())
    return folder


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Workbench:
    shutil.copytree(trained, tmp_path / "toy")
    return open_run(tmp_path / "toy")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def without_seconds(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items() if name != "seconds"}
    return [without_seconds(value) for value in content] if isinstance(content, list) else content


class Stopping(Silent):
    """Interrupts training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.heard: list[int] = []

    def training(self, record: TrainingRecord, progress: Progress) -> None:  # noqa: ARG002
        self.heard.append(record.step)
        if len(self.heard) == self.steps:
            raise KeyboardInterrupt


class Rates(Silent):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    def training(self, record: TrainingRecord, progress: Progress) -> None:  # noqa: ARG002
        self.heard.append(record.lr)


def test_subnets_are_scored_as_materialized_and_recalibrated_networks_on_search_images(
    evaluated: Path,
) -> None:
    bench, found = open_run(evaluated), summary(evaluated)
    assert found["finished"]
    assert found["images"] == len(bench.data.search)
    for place, arch in ((0, bench.space.smallest), (-1, bench.space.largest)):
        told = found["subnets"][place]
        arch = bench.space.canonical({**arch, **{n: "fp32" for n in arch if n.endswith(".precision")}})
        network = recalibrate(
            bench.supernet.materialize(arch), bench.recalibration_images(bench.resolution(arch))
        )
        accuracy = top1(network, bench.data.search.at(bench.resolution(arch), batch_size=64))
        assert told["decisions"] == dict(arch)
        assert told["top1"] == accuracy.top1
        assert told["top1_interval"] == pytest.approx(accuracy.interval)
        assert told["macs"] == found["extremes_macs"][place]


def test_subnets_run_from_smallest_to_largest_and_leave_precisions_aside(evaluated: Path) -> None:
    rows = summary(evaluated)["subnets"]
    macs = [row["macs"] for row in rows]
    assert macs == sorted(set(macs))
    assert len(macs) == 4
    for row in rows:
        assert all(v == "fp32" for name, v in row["decisions"].items() if name.endswith(".precision"))


def test_a_network_trained_alone_is_what_the_loop_makes_of_a_supernet_that_visits_nothing_else(
    fresh: Workbench, tmp_path: Path
) -> None:
    supernet, config, largest = fresh.new_supernet(), fresh.config, fresh.space.largest
    train(
        supernet, fresh.data.train, strategy=Alone(), config=config.train, seed=config.seed,
        batch_size=config.data.batch_size, augment=config.data.augment, folder=tmp_path / "whole",
    )  # fmt: skip
    network = train_alone(fresh, largest, epochs=1.0, folder=tmp_path / "alone", listener=Silent())
    expected, found = supernet.materialize(largest).state_dict(), network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()


def test_networks_trained_alone_are_scored_beside_their_shared_weights(
    evaluated: Path, tmp_path: Path
) -> None:
    bench, found = open_run(evaluated), summary(evaluated)
    told = found["alone"]["networks"]
    assert [row["arch_key"] for row in told] == [row["arch_key"] for row in found["subnets"][-2:]]
    largest = bench.space.canonical(told[-1]["decisions"])
    network = train_alone(bench, largest, epochs=1.0, folder=tmp_path, listener=Silent())
    recalibrate(network, bench.recalibration_images(16))
    assert told[-1]["top1"] == top1(network, bench.data.search.at(16, batch_size=64)).top1
    result = json.loads((evaluated / "evaluation" / f"{largest.key}-alone-1.json").read_text())
    spent = json.loads((tmp_path / "training.json").read_text())["spent"]
    images = 3 * 64  # of 200, in batches of 64
    assert (spent["steps"], spent["images"]) == (3, images)
    assert spent["macs"] == 3 * images * bench.macs(largest)
    assert without_seconds(result["training"]) == without_seconds(spent)
    gap = [a["top1"] - s["top1"] for s, a in zip(told, found["subnets"][-2:], strict=True)]
    assert found["alone"]["gap"]["value"] == pytest.approx(sum(gap) / 2)


def test_training_alone_leaves_no_checkpoints_and_the_supernet_as_it_was(
    evaluated: Path, trained: Path
) -> None:
    assert {path.suffix for path in (evaluated / "evaluation").iterdir()} == {".json"}
    before, after = (open_run(folder).supernet.state_dict() for folder in (trained, evaluated))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_evaluation_that_was_interrupted_everywhere_ends_with_the_same_figures(
    fresh: Workbench, evaluated: Path
) -> None:
    folder = fresh.run.folder

    def evaluate(listener: Silent) -> dict[str, Any]:
        return evaluate_supernet(open_run(folder), subnets=4, alone=2, epochs=1.0, listener=listener)

    with pytest.raises(KeyboardInterrupt):
        evaluate(StoppingAt(2))
    seen = summary(folder)
    assert not seen["finished"]
    assert seen["area"] is None
    assert without_seconds(seen["subnets"]) == without_seconds(summary(evaluated)["subnets"][:2])

    stopped = Stopping(2)  # in the first network's training
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped)
    seen = summary(folder)
    assert not seen["finished"]
    assert seen["area"] == summary(evaluated)["area"]

    resumed = Stopping(-1)
    found = evaluate(resumed)
    # a step is kept before it is told of; it goes on, and the second network begins at the beginning
    assert stopped.heard == [1, 2]
    assert resumed.heard[0] in (2, 3)
    assert resumed.heard.count(1) == 1
    assert without_seconds(found) == without_seconds(summary(evaluated))
    assert found == summary(folder)


def test_what_was_scored_is_not_scored_again(evaluated: Path) -> None:
    stop = Stopping(1)  # any training at all would interrupt it
    before = summary(evaluated)
    assert evaluate_supernet(open_run(evaluated), subnets=4, alone=2, epochs=1.0, listener=stop) == before


def test_an_evaluation_is_finished_still_when_it_was_asked_for_again_and_interrupted(evaluated: Path) -> None:
    before = summary(evaluated)
    with pytest.raises(KeyboardInterrupt):
        evaluate_supernet(open_run(evaluated), subnets=4, alone=2, epochs=1.0, listener=StoppingAt(1))
    assert summary(evaluated) == before


def test_networks_trained_for_other_epochs_are_other_results(fresh: Workbench) -> None:
    lengths = []
    for epochs in (1.0, 2.0, 1.0):
        listener = Stopping(-1)
        evaluate_supernet(fresh, subnets=2, alone=1, epochs=epochs, listener=listener)
        lengths.append(len(listener.heard))
    assert lengths[1] == 2 * lengths[0] > 0
    assert lengths[2] == 0


def test_where_the_supernet_began_from_pretrained_weights_so_does_a_network_trained_alone(
    fresh: Workbench,
) -> None:
    def pretrained(arch: Arch) -> nn.Module:
        torch.manual_seed(99)
        return fresh.family.build(arch)

    fresh.space = fresh.space.with_constants({"pretrained": True})
    fresh.family = dataclasses.replace(fresh.family, pretrained=pretrained)
    still = fresh.config.train.model_copy(update={"lr": 1e-30})
    fresh.config = fresh.config.model_copy(update={"train": still})
    evaluate_supernet(fresh, subnets=2, alone=1, epochs=1.0, listener=Silent())
    (told,) = (fresh.run.folder / "evaluation").glob("*-alone-1.json")

    def hits(network: nn.Module) -> str:
        network = recalibrate(network, fresh.recalibration_images(16))
        with torch.no_grad():
            right = [network(b.images).argmax(1) == b.labels for b in fresh.data.search.at(16, batch_size=60)]
        return hits_to_text(torch.cat(right).numpy())

    assert json.loads(told.read_text())["hits"] == hits(pretrained(fresh.space.largest))
    assert hits(pretrained(fresh.space.largest)) != hits(fresh.supernet.materialize(fresh.space.largest))


def test_a_searched_front_is_held_against_networks_that_nobody_chose(fresh: Workbench) -> None:
    def metrics(arch: Arch) -> dict[str, float]:
        cost = float(arch.integer("s1.width") * arch.integer("resolution"))
        return {"top1": cost / 1000, "latency_ms": cost, "size_mb": 1, "mmacs": cost, "peak_mb": 1}

    search(
        problem(fresh), metrics, storage=fresh.run.study_file, name=STUDY, trials=4, strategy="random",
        population=4, seed=0, warm_start=2,
    )  # fmt: skip
    found = evaluate_supernet(fresh, subnets=3, listener=Silent())
    members = found["search"]["networks"]
    assert members
    for member in members:
        assert all(v == "fp32" for name, v in member["decisions"].items() if name.endswith(".precision"))
    by_macs = {row["macs"]: row["top1"] for row in found["subnets"]}
    ends = [m for m in members if m["macs"] in found["extremes_macs"]]
    assert len(ends) == 2  # the search begins with both, and neither is beaten
    assert all(member["top1"] == by_macs[member["macs"]] for member in ends)
    assert found["search"]["improvement"]["low"] <= found["search"]["improvement"]["value"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"subnets": 1}, "at least 2"),
        ({"subnets": 4, "alone": 5}, "alone is 5"),
        ({"alone": -1}, "alone is -1"),
        ({"alone": 1, "epochs": 0.0}, "above 0"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(
    fresh: Workbench, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_supernet(fresh, listener=Silent(), **asked)


def test_a_space_whose_networks_all_cost_the_same_is_refused(fresh: Workbench) -> None:
    _ = fresh.supernet
    constants = {name: v for name, v in fresh.space.largest.items() if not name.endswith(".precision")}
    fresh.space = fresh.space.with_constants(constants)
    with pytest.raises(ConfigError, match="needs networks that differ"):
        evaluate_supernet(fresh, listener=Silent())


def test_a_supernet_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    bench = Workbench(Run.create(tmp_path / "new", load_config(TOY)))
    with pytest.raises(RunError, match="is not finished"):
        evaluate_supernet(bench, listener=Silent())
    assert not (tmp_path / "new" / "evaluation.json").exists()


def test_a_damaged_result_is_refused_by_its_name(fresh: Workbench) -> None:
    evaluate_supernet(fresh, subnets=2, listener=Silent())
    damaged = sorted((fresh.run.folder / "evaluation").iterdir())[0]
    for content in ("{", "[]", '{"hits": "ff", "images": 60, "macs": 1, "seconds": 0}'):
        damaged.write_text(content)
        with pytest.raises(RunError, match=f"{damaged.name} is damaged"):
            evaluate_supernet(fresh, subnets=2, listener=Silent())


def test_a_space_is_cut_to_its_finest_precisions_alone() -> None:
    space = SearchSpace(
        "mobilenet",
        (Choice("width", (8, 16)), Choice("s1.precision", ("w8a8", "fp32")), Choice("precision", (1, 2))),
    )
    assert float_space(space).open_choices == (space.by_name["width"], space.by_name["precision"])
    assert float_space(space).largest == space.largest


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_paired_indices_are_different_and_hold_both_ends_and_neighbours(count: int) -> None:
    for wanted in range(count + 1):
        found = paired_indices(count, wanted)
        assert len(found) == len(set(found)) == wanted
        assert found == sorted(found)
        assert set(found) <= set(range(count))
        if wanted:
            assert found[-1] == count - 1
        if wanted > 2:
            assert found[0] == 0
        pairs = zip(found[0 : wanted - wanted % 2 : 2], found[1::2], strict=True)
        assert all(second == first + 1 for first, second in pairs)


def test_pairs_are_spread_evenly() -> None:
    assert paired_indices(20, 6) == [0, 1, 9, 10, 18, 19]
    assert paired_indices(20, 5) == [0, 1, 9, 10, 19]


def test_a_network_trained_alone_has_the_supernets_recipe_for_its_own_epochs() -> None:
    train = TrainConfig(epochs=200, warmup_epochs=5, dropout=0.2, drop_path=0.1, zero_last_norms=True)
    largest = recipe_alone(train, epochs=40, given=False, largest=True)
    assert largest == train.model_copy(update={"epochs": 40, "warmup_epochs": 1.0})
    small = recipe_alone(train, epochs=200, given=False, largest=False)
    assert small == train.model_copy(update={"dropout": 0.0, "drop_path": 0.0})


def test_weights_that_are_given_to_a_network_trained_alone_are_left_as_they_are() -> None:
    train = TrainConfig(zero_last_norms=True)
    assert not recipe_alone(train, epochs=30, given=True, largest=True).zero_last_norms
    assert recipe_alone(train, epochs=30, given=False, largest=True).zero_last_norms


def test_a_network_trained_alone_has_the_constant_tail_that_its_sandwich_has(
    fresh: Workbench, tmp_path: Path
) -> None:
    rates = []
    for tail in (True, False):
        changed = {"strategy": "sandwich", "constant_tail": tail, "warmup_epochs": 0.0}
        train = fresh.config.train.model_copy(update=changed)
        fresh.config = fresh.config.model_copy(update={"train": train})
        heard = Rates()
        train_alone(fresh, fresh.space.smallest, epochs=1.0, folder=tmp_path / str(tail), listener=heard)
        rates.append(heard.heard)
    schedules = [Sandwich(), Sandwich(constant_tail=False)]
    assert rates == [
        [s.schedule(lr=0.1, warmup_steps=0, steps=3, steps_per_epoch=3).at(step) for step in range(3)]
        for s in schedules
    ]
    assert rates[0] != rates[1]
