from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.models.initialization import zero_last_norms


def zeroed(network: nn.Module) -> set[str]:
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not bool(module.weight.any())
    }


def test_blocks_with_their_input_as_shortcut_begin_as_the_identity() -> None:
    network = timm.create_model("mobilenetv3_small_050")
    count = zero_last_norms(network)
    found = zeroed(network)
    assert count == len(found) > 0
    seen = 0
    for name, block in network.get_submodule("blocks").named_modules():
        if "." in name and name.count(".") == 1 and isinstance(vars(block).get("has_skip"), bool):
            ends = {n for n in found if n.startswith(f"blocks.{name}.")}
            assert bool(ends) == vars(block)["has_skip"], name
            if ends:
                maps = torch.randn(
                    2,
                    block.get_submodule("conv_pw" if "conv_pwl" in block._modules else "conv_dw")
                    .get_parameter("weight")
                    .shape[1],
                    4,
                    4,
                )
                assert torch.equal(block(maps), maps)
                seen += 1
    assert seen == count


def test_residual_blocks_of_resnets_with_squeeze_and_excitation_are_found() -> None:
    network = timm.create_model("seresnet18", zero_init_last=False)
    assert not zeroed(network)
    zero_last_norms(network)
    # the first block of each stage but the first has a convolution in its shortcut
    assert zeroed(network) == {f"layer{s}.{b}.bn2" for s, b in ((1, 0), (1, 1), (2, 1), (3, 1), (4, 1))}


class Plain(nn.Module):
    """Two blocks: only the first one's branch ends with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.1))
        self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images) + images
        summed: Tensor = self.second(maps).add(maps)
        return summed


def test_a_norm_behind_which_an_activation_would_stop_its_gradient_is_left_alone() -> None:
    network = Plain()
    assert zero_last_norms(network) == 1
    assert zeroed(network) == {"first.1"}
    torch.autograd.backward(network.train()(torch.randn(2, 3, 4, 4)).square().sum())
    gradient = network.first[1].get_parameter("weight").grad
    assert gradient is not None
    assert bool(gradient.any())


def test_a_network_without_such_a_block_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert zero_last_norms(network) == 0
    assert not zeroed(network)


class Branching(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > 0 else images


def test_a_network_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="the data flow of Branching cannot be followed"):
        zero_last_norms(Branching())
