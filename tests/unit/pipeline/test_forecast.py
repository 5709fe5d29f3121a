from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.config import load_config
from nestling.data.curriculum import CURRICULA
from nestling.models.supernet import Supernet, capped
from nestling.pipeline.evaluation import _forecast
from nestling.pipeline.forecast import forecast, run_macs
from nestling.pipeline.workbench import Workbench
from nestling.run import Run
from nestling.space import Arch
from nestling.train.distributed import ALONE, Ranks
from nestling.train.strategies import Alone
from nestling.train.strategies.accounting import BACKWARD

TOY = Path(__file__).parents[2] / "toy.toml"
STEPS, PER_EPOCH, BATCH = 6, 3, 64


def bench(folder: Path, *settings: str, ranks: Ranks = ALONE) -> Workbench:
    return Workbench(Run.create(folder, load_config(TOY, overrides=settings)), ranks=ranks)


class Noting(Supernet):
    """Notes how many images run, and in which precision."""

    seen: list[tuple[int, bool]]

    def forward(self, images: torch.Tensor, arch: Arch, *, at_most: int | None = None) -> torch.Tensor:
        self.seen.append((len(images), torch.is_autocast_enabled("cpu")))
        return super().forward(images, arch, at_most=at_most)


def noting(of: Workbench) -> Noting:
    supernet = Noting(of.space, of.family.build, layout=of.family.layout)
    supernet.seen = []
    return supernet


def clock(seconds: float) -> Any:
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def test_a_forecast_is_what_the_visits_of_all_steps_cost_at_the_speed_of_a_trial_pass(tmp_path: Path) -> None:
    of = bench(tmp_path, "train.strategy=alone")
    supernet = noting(of)
    before = {name: tensor.clone() for name, tensor in supernet.largest.state_dict().items()}
    found = forecast(of, supernet, of.strategy, clock=clock(0.5))
    macs = of.macs(of.space.largest)
    assert (found.steps, found.images) == (STEPS, STEPS * BATCH)
    assert found.macs == pytest.approx(STEPS * BATCH * macs * BACKWARD)
    assert found.seconds == pytest.approx(STEPS * 0.5)
    assert all(torch.equal(supernet.largest.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in supernet.parameters())


@pytest.mark.parametrize("name", ["efficienttrain", "efficienttrain++"])
def test_under_a_curriculum_each_period_is_counted_at_its_side(tmp_path: Path, name: str) -> None:
    of = bench(tmp_path, f"train.curriculum={name}", "train.strategy=alone")
    steps, largest, curriculum = 200, of.space.largest, CURRICULA[name]
    found = run_macs(of, Alone(), of.config.train, steps=steps, steps_per_epoch=PER_EPOCH)
    sides = [curriculum.side(curriculum.period(s, steps=steps), full=16) for s in range(steps)]
    assert found == pytest.approx(BACKWARD * sum(of.macs(capped(largest, side)) for side in sides))
    full = BACKWARD * steps * of.macs(largest)
    assert found / full == pytest.approx(curriculum.compute(full=16, steps=steps), abs=0.1)
    assert len(set(sides)) > 2


def test_networks_trained_alone_are_forecast_under_the_curriculum_too(tmp_path: Path) -> None:
    told = []
    for settings in ([], ["train.curriculum=efficienttrain++"]):
        of = bench(tmp_path / str(len(settings)), *settings)
        told.append(float(_forecast(of, [of.space.largest], 2.0).split(": ")[1].split()[0]))
    assert told[1] < 0.7 * told[0]


def test_on_two_ranks_this_ones_part_is_timed_in_the_precision_of_training(tmp_path: Path) -> None:
    settings = ("train.strategy=alone", "train.amp=bf16")
    alone, shared = bench(tmp_path / "a", *settings), bench(tmp_path / "b", *settings)
    shared.ranks = Ranks(rank=0, world=2, device=torch.device("cpu"))
    found = []
    for of, images in ((alone, BATCH), (shared, BATCH // 2)):
        supernet = noting(of)
        found.append(forecast(of, supernet, of.strategy, clock=clock(0.5)))
        assert supernet.seen == [(images, True)] * 3
    assert found[0] == found[1]  # half the images take as long here as all of them
