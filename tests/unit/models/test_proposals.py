from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nestling.models import timm_family
from nestling.models.building import build_shapes
from nestling.models.cost import Cost, cost
from nestling.models.proposals import Argument, Proposal, _together, propose
from nestling.models.supernet import Supernet
from nestling.space import Value, load_space

SMALL: dict[str, Value] = {"embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def proposal() -> Proposal:
    """Of a small vision transformer."""
    return propose("vit_tiny_patch16_224", resolution=32, classes=4, given=SMALL)


def test_width_depth_and_ratio_of_a_transformer_can_be_elastic(proposal: Proposal) -> None:
    values = {argument.name: argument.values for argument in proposal.elastic}
    assert values["depth"] == (1, 2)
    assert values["mlp_ratio"] == (2.0, 3.0, 4.0)
    assert values["embed_dim"][-1] == 24
    assert all(int(width) % 3 == 0 for width in values["embed_dim"])


def test_an_argument_that_does_not_fit_is_named_with_the_reason(proposal: Proposal) -> None:
    [heads] = [argument for argument in proposal.arguments if argument.name == "num_heads"]
    assert not heads.elastic
    assert "qkv.weight" in heads.reason


def test_the_effect_on_cost_is_that_of_the_smallest_value(proposal: Proposal) -> None:
    [depth] = [argument for argument in proposal.arguments if argument.name == "depth"]
    space = proposal.space()
    one = space.canonical({**space.largest, "depth": 1})
    large, small = (cost(build_shapes(timm_family.build, arch), 32) for arch in (space.largest, one))
    assert depth.macs == pytest.approx(small.macs / large.macs)
    assert depth.params == pytest.approx(small.params / large.params)


def test_the_file_of_a_proposal_is_its_space(proposal: Proposal, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(proposal.to_toml())
    assert load_space(path) == proposal.space()
    assert "# num_heads = 3: 1:" in path.read_text()


def test_random_subnets_of_a_proposed_space_lend_what_they_compute(proposal: Proposal) -> None:
    supernet = Supernet(proposal.space(), timm_family.build).train()
    images = torch.randn(2, 3, 32, 32)
    for seed in range(3):
        arch = proposal.space().sample(random.Random(seed))
        with torch.no_grad():
            assert torch.equal(supernet(images, arch), supernet.materialize(arch).train()(images))


def test_of_arguments_that_only_fail_together_one_is_given_up() -> None:
    def run(changed: Mapping[str, Value]) -> Cost:
        if {"a", "c"} <= set(changed):
            raise ValueError("a and c end in one sum")
        return Cost(1, 1, 1, 1)

    tried = [Argument(name, (1, 2)) for name in "abc"]
    found = {argument.name: argument for argument in _together("resnet18", {}, tried, run=run)}
    assert [name for name, argument in found.items() if argument.elastic] == ["a", "b"]
    assert found["c"].values == (2,)
    assert found["c"].reason == "not with other arguments: a and c end in one sum"


def test_enough_elastic_arguments_end_the_search() -> None:
    found = propose("vit_tiny_patch16_224", resolution=32, given=SMALL, enough=1)
    assert [argument.name for argument in found.elastic] == ["embed_dim"]


def test_odd_kernels_stay_odd() -> None:
    found = propose("convmixer_768_32", resolution=28, given={"dim": 16, "depth": 1, "kernel_size": 7})
    [kernel] = [argument for argument in found.elastic if argument.name == "kernel_size"]
    assert kernel.values == (3, 5, 7)


def test_a_model_that_does_not_run_at_a_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not run at 3 px|cannot be made"):
        propose("swin_tiny_patch4_window7_224", resolution=3)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        propose("vit_tiny_patch16_224", given={"deph": 2})
