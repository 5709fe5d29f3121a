from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.models import timm_family
from nestling.models.layouts import find_layout
from nestling.models.meaning import ALIKE, Meaning, complaints
from nestling.space import Arch, Choice, SearchSpace

SIDE = Choice("resolution", (8,))


class SideBySide(nn.Module):
    """Two maps that one convolution reads together, or each by itself."""

    def __init__(self, width: int, *, together: bool, norm: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, width, 3), nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(1, width) if norm else nn.Identity()
        self.mix = nn.Conv2d(width + 8 if together else width, 8, 1)
        self.head = nn.Linear(8, 5)
        self.together = together

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.norm(self.left(images)).relu(), self.right(images)
        maps = self.mix(torch.cat((left, right), 1)) if self.together else self.mix(left) + right
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_layer_that_reads_maps_side_by_side_is_lent_the_channels_of_others(
    together: bool, norm: bool
) -> None:
    space = SearchSpace("user", (SIDE, Choice("width", (8, 16))))
    told = complaints(space, lambda arch: SideBySide(arch.integer("width"), together=together, norm=norm))
    assert len(told) == together
    assert all(sentence.startswith("width = 8 lends what means something else") for sentence in told)


def of_timm(model: str, name: str, values: tuple[int, ...], *, resolution: int = 32) -> SearchSpace:
    constants = (Choice("model", (model,)), Choice("classes", (5,)), Choice("resolution", (resolution,)))
    return SearchSpace("timm", (*constants, Choice(name, values)))


@pytest.mark.parametrize(
    ("model", "name", "values", "right"),
    [
        ("test_resnet", "channels.1", (16, 32), True),
        ("test_vit", "embed_dim", (32, 64), True),
        ("test_convnext", "dims.1", (16, 32), True),
        ("test_efficientnet", "num_features", (128, 256), True),
        # a residual connection is there where the stem is as wide as the first block
        ("test_efficientnet", "stem_size", (8, 16), False),
        ("densenet121", "growth_rate", (8, 16), False),
        ("regnety_002", "cfg.group_size", (4, 8), False),
    ],
)
def test_timm_models_lend_what_they_mean_or_are_found_out(
    model: str, name: str, values: tuple[int, ...], right: bool
) -> None:
    space = of_timm(model, name, values, resolution=160 if model == "test_vit" else 32)
    assert (complaints(space, timm_family.build) == []) is right


def test_a_swin_transformer_merges_neighbours_four_by_four() -> None:
    constants: list[Choice] = [
        Choice("model", ("swin_tiny_patch4_window7_224",)),
        Choice("classes", (5,)),
        Choice("resolution", (56,)),
        *(Choice(f"depths.{i}", (1,)) for i in range(4)),
        *(Choice(f"num_heads.{i}", (1,)) for i in range(4)),
    ]
    space = SearchSpace("timm", (*constants, Choice("embed_dim", (8, 16))))
    assert complaints(space, timm_family.build) == []


def test_what_cannot_be_told_is_not_told() -> None:
    space = of_timm("test_resnet", "layers.1", (1, 2))
    meaning = Meaning(timm_family.build, layout=find_layout, largest=space.largest)
    assert meaning.difference(space.smallest) is None  # it lacks layers
    same = meaning.difference(space.largest)
    assert same is not None
    assert same < ALIKE
    coarse = Arch(tuple({**space.largest, "resolution": 16}.items()))
    assert meaning.difference(coarse) is None


def test_trying_changes_no_random_numbers() -> None:
    space = SearchSpace("user", (SIDE, Choice("width", (8, 16))))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    complaints(space, lambda arch: SideBySide(arch.integer("width"), together=False, norm=False))
    assert torch.equal(torch.rand(3), expected)
