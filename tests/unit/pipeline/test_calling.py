from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling.config import ConfigError, load_config
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.pipeline.calling import rounded_calls
from nestling.pipeline.workbench import Workbench
from nestling.run import Run
from nestling.space import Arch, SearchSpace, load_space
from nestling.train.loop import train
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress

TOY = Path(__file__).parents[2] / "toy.toml"


def run(folder: Path, *settings: str) -> Workbench:
    given = [
        "train.epochs=1",
        "train.switch=0",
        "train.ramp_epochs=0",
        "train.checkpoint_seconds=0",
        *settings,
    ]
    return Workbench(Run.create(folder, load_config(TOY, overrides=given)))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space(TOY.with_name("toy_space.toml")).with_constants({"classes": 10})


def supernets(space: SearchSpace, keep: dict[str, str]) -> tuple[Supernet, Supernet]:
    """One in floats, one in precisions, with the same weights."""
    known = family(space.family)
    calling = rounded_calls(known, space, keep=keep)
    torch.manual_seed(0)
    exact = Supernet(space, known.build)
    return exact, Supernet(space, known.build, largest=exact.largest, calling=calling)


def in_precision(space: SearchSpace, precision: str, *, stem: str | None = None) -> Arch:
    values = {n: precision if n.endswith(".precision") else v for n, v in space.largest.items()}
    return space.canonical(values | ({"stem.precision": stem} if stem else {}))


def logits(supernet: Supernet, arch: Arch) -> Tensor:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = supernet(images, arch)
    assert isinstance(result, Tensor)
    return result


def test_archs_in_floats_compute_as_ever_and_others_are_rounded(space: SearchSpace) -> None:
    exact, rounded = supernets(space, {})
    floats, eight = in_precision(space, "fp32"), in_precision(space, "w8a8")
    assert torch.equal(logits(rounded, floats), logits(exact, floats))
    assert torch.equal(logits(exact, eight), logits(exact, floats))
    off = (logits(rounded, eight) - logits(exact, eight)).abs().max()
    assert 0 < off < 0.2 * logits(exact, eight).abs().max()


def test_layers_that_are_kept_are_not_rounded(space: SearchSpace) -> None:
    _, kept = supernets(space, {"first": "fp32"})
    _, chosen = supernets(space, {})
    all_of_it, but_the_stem = in_precision(space, "w8a8"), in_precision(space, "w8a8", stem="fp32")
    chosen.largest.load_state_dict(kept.largest.state_dict())
    assert torch.equal(logits(kept, all_of_it), logits(chosen, but_the_stem))
    assert not torch.equal(logits(kept, all_of_it), logits(chosen, all_of_it))


def test_no_random_number_is_drawn(space: SearchSpace) -> None:
    before = torch.get_rng_state()
    rounded_calls(family(space.family), space, keep={"last": "fp32"})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_space_of_floats_is_refused(space: SearchSpace) -> None:
    floats = space.only({c.name: ["fp32"] for c in space.choices if c.name.endswith(".precision")})
    with pytest.raises(ConfigError, match="no precision of the space has weights in few bits"):
        rounded_calls(family(space.family), floats, keep={})
    calling = rounded_calls(family(space.family), floats, keep={"last": "w8a8"})
    assert calling(floats.smallest) is not None


def trained(bench: Workbench, *, until: int | None = None) -> dict[str, Tensor]:
    """The weights after the run's training, or after so many steps of it."""

    def stop(record: TrainingRecord, progress: Progress) -> None:
        del progress
        if record.step == until:
            raise KeyboardInterrupt

    supernet = bench.new_supernet()
    try:
        train(
            supernet,
            bench.data.train,
            strategy=bench.strategy,
            config=bench.config.train,
            batch_size=64,
            augment="shift",
            seed=0,
            folder=bench.checkpoints,
            on_record=stop,
        )
    except KeyboardInterrupt:
        assert until is not None
    return supernet.largest.state_dict()


def test_training_in_precisions_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(run(tmp_path / "whole", "train.quantize=true"))
    stopped = run(tmp_path / "stopped", "train.quantize=true")
    part = trained(stopped, until=2)
    resumed = trained(Workbench(stopped.run))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_run_asks_for_precisions_and_both_kinds_begin_from_the_same_weights(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", "train.quantize=true"), run(tmp_path / "other")
    rounded, exact = one.new_supernet(), other.new_supernet()
    first, second = rounded.largest.state_dict(), exact.largest.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    eight = in_precision(one.space, "w8a8")
    assert not torch.equal(logits(rounded, eight), logits(exact, eight))


def test_compiled_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="compile and quantize are both asked for"):
        load_config(TOY, overrides=["train.quantize=true", "train.compile=true"])
