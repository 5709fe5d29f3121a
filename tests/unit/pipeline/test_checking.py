from __future__ import annotations

import pytest
from torch import Tensor, nn

from nestling.models.families import Family, family
from nestling.pipeline.checking import check_space
from nestling.space import Arch, Choice, Need, SearchSpace, SpaceError


def space(name: str, *choices: Choice) -> SearchSpace:
    return SearchSpace(name, (Choice("classes", (5,)), Choice("resolution", (32,)), *choices))


def test_a_timm_space_that_lends_channels_of_other_maps_is_refused() -> None:
    grown = space("timm", Choice("model", ("densenet121",)), Choice("growth_rate", (8, 16)))
    with pytest.raises(SpaceError, match="growth_rate = 8 lends what means something else"):
        check_space(grown, family("timm"))


def test_a_function_of_the_users_that_may_do_so_is_a_warning() -> None:
    class Grouped(nn.Sequential):
        def __init__(self, width: int) -> None:
            conv = nn.Conv2d(width, width, 1, groups=2)
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
            super().__init__(nn.Conv2d(3, width, 1), conv, head)

    users = Family(lambda arch: Grouped(arch.integer("width")), lambda stage: (stage,), str)
    with pytest.warns(UserWarning, match="width = 8 lends what means something else"):
        check_space(space("mine:build", Choice("width", (8, 16))), users)


@pytest.mark.parametrize(
    ("stage", "hint"),
    [("layer9", r"did you mean layer\d\."), ("zzz", "its layers begin with conv1")],
)
def test_a_precision_of_no_layer_is_refused_with_the_nearest_one(stage: str, hint: str) -> None:
    with pytest.raises(SpaceError, match=f"{stage}.precision is the precision of no layer.*{hint}"):
        check_space(
            space("timm", Choice("model", ("test_resnet",)), Choice(f"{stage}.precision", ("w8a8", "fp32"))),
            family("timm"),
        )


def test_a_precision_of_a_layer_within_a_stage_passes() -> None:
    inner = Choice("layer1.0.conv1.precision", ("w8a8", "fp32"))
    check_space(space("timm", Choice("model", ("test_resnet",)), inner), family("timm"))


def test_a_function_that_gives_no_network_is_told() -> None:
    users = Family(lambda arch: arch["classes"], lambda stage: (stage,), str)  # type: ignore[arg-type, return-value]
    with pytest.raises(SpaceError, match="build returned 5; it must return"):
        check_space(space("mine:build"), users)


def test_the_arch_that_a_builder_gets_is_a_mapping() -> None:
    seen: list[Arch] = []

    def build(arch: Arch) -> nn.Module:
        seen.append(arch)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, arch.integer("classes")))

    check_space(space("mine:build"), Family(build, lambda stage: (stage,), str))
    assert all(isinstance(arch, Arch) for arch in seen)


MIXED = ("w8a8", "fp32")


class Gated(nn.Module):
    """Gated layers, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.fc = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.mean((2, 3))
        for gate, up in zip(self.gates, self.ups, strict=True):
            rows = gate(rows).sigmoid() * up(rows)
        logits: Tensor = self.fc(rows)
        return logits


def check_gated(*choices: Choice) -> None:
    gated = Family(lambda arch: Gated(arch.integer("depth")), lambda stage: (stage,), str)
    check_space(space("mine:build", Choice("depth", (1, 2)), *choices), gated)


def test_a_precision_of_layers_that_a_smaller_network_lacks_asks_for_a_need() -> None:
    with pytest.raises(SpaceError, match=r'needs = \[{ choice = "depth", at_least = 2 }\]'):
        check_gated(Choice("*.1.precision", MIXED))
    check_gated(Choice("*.1.precision", MIXED, (Need("depth", 2),)))


def test_a_precision_whose_layers_others_name_more_exactly_is_refused() -> None:
    inner = Choice("gates|ups.*.precision", MIXED)
    with pytest.raises(SpaceError, match=r"gates\|ups.precision decides nothing"):
        check_gated(Choice("gates|ups.precision", MIXED), inner)
    check_gated(Choice("*.precision", MIXED), Choice("gates|ups.0.precision", MIXED))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            [Choice("gates.precision", MIXED)],
            "gates.0 is decided by gates.precision and ups.0 is always fp32",
        ),
        ([Choice("gates.precision", MIXED), Choice("ups.precision", MIXED)], "ups.0 is decided by ups.prec"),
        ([Choice("gates.precision", ("w8a8",))], "gates.0 is always w8a8 and ups.0 is always fp32"),
    ],
)
def test_layers_that_read_the_same_numbers_have_one_precision(choices: list[Choice], said: str) -> None:
    with pytest.raises(SpaceError, match=f"gates.0, ups.0 read the same numbers.*{said}"):
        check_gated(*choices)
    check_gated(Choice("gates|ups.precision", MIXED))
    check_gated(Choice("gates.precision", ("w8a8",)), Choice("ups.precision", ("w8a8",)))
