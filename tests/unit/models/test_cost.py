from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.mobilenet import build
from nestling.space import Arch, SearchSpace, Value

FLOAT = 4


class Functional(nn.Module):
    """Every product that is counted, none of them a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2) @ self.weight  # (1, 16, 8)
        queries = tokens.unsqueeze(1)
        tokens = F.scaled_dot_product_attention(queries, queries, queries).squeeze(1)
        return torch.einsum("nlc,nmc->nlm", tokens, tokens)


def plain_macs(network: nn.Module, resolution: int) -> int:
    """Half of the flops that PyTorch's own counter finds in a real run."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(torch.zeros(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def test_macs_of_a_convolution_and_a_classifier_are_their_closed_forms() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False),
        nn.Conv2d(16, 32, 3, padding=1, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    found = cost(network, 8)
    maps = 4 * 4
    assert found.macs == maps * (16 * 3 * 9 + 16 * 25 + 32 * (16 // 4) * 9) + 32 * 10
    assert found.params == (16 * 27 + 16) + 16 * 25 + 32 * 4 * 9 + (32 * 10 + 10)
    assert found.activation_bytes == FLOAT * (maps * (16 + 16 + 32) + 10)


def test_macs_of_a_transposed_convolution_count_what_it_reads() -> None:
    layer = nn.ConvTranspose2d(3, 6, 2, stride=2, bias=False)
    assert cost(layer, 4).macs == 4 * 4 * 3 * 6 * 4


class Applied(nn.Module):
    """A function of the image, and of the layers that it is given."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images, *self.layers)


def tokens(images: Tensor) -> Tensor:
    """The 16 pixels of an image of 4 x 4, as tokens (1, 16, 3)."""
    return images.flatten(2).transpose(1, 2)


PRODUCTS: dict[str, tuple[nn.Module, int]] = {
    "a convolution in one dimension": (
        Applied(lambda x, layer: layer(x.flatten(2)), nn.Conv1d(3, 6, 3, padding=1)),
        16 * 9 * 6,
    ),
    "one in three": (Applied(lambda x, layer: layer(x[:, :, None]), nn.Conv3d(3, 6, 1)), 16 * 3 * 6),
    "a padding given by name": (nn.Conv2d(3, 6, 3, padding="same"), 16 * 27 * 6),
    "a transposed one in groups": (nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3), 16 * 4 * 6),
    "patches that are unfolded": (
        Applied(lambda x, layer: layer(F.unfold(x, 3, padding=1).transpose(1, 2)), nn.Linear(27, 4)),
        16 * 27 * 4,
    ),
    "a linear layer without a bias, on tokens": (
        Applied(lambda x, layer: layer(tokens(x)), nn.Linear(3, 8, bias=False)),
        16 * 3 * 8,
    ),
    "a bilinear layer": (
        Applied(lambda x, layer: layer(tokens(x), tokens(x)), nn.Bilinear(3, 3, 5)),
        16 * 5 * 3 * 3,
    ),
    "an LSTM": (
        Applied(lambda x, layer: layer(tokens(x))[0], nn.LSTM(3, 5, batch_first=True)),
        16 * 4 * 5 * (3 + 5),
    ),
    "a transformer's layer": (
        Applied(
            lambda x, embed, layer: layer(embed(tokens(x))),
            nn.Linear(3, 8),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ),
        16 * 3 * 8 + 4 * 16 * 8 * 8 + 2 * 16 * 16 * 8 + 2 * 16 * 8 * 16,
    ),
    "an outer product": (Applied(lambda x: torch.einsum("bchw,bdhw->bcd", x, x)), 3 * 3 * 16),
    "a contraction": (Applied(lambda x: torch.tensordot(x, x, dims=([1], [1]))), 16 * 16 * 3),
    "a batch of products, summed": (Applied(lambda x: torch.addbmm(x[0, 0], x[0], x[0])), 3 * 4 * 4 * 4),
    "a matrix and a vector": (Applied(lambda x: x[0].flatten(1) @ x[0, 0].flatten()), 3 * 16),
    "a vector added to both": (
        Applied(lambda x: torch.addmv(x[0, :, 0, 0], x[0].flatten(1), x[0, 0].flatten())),
        3 * 16,
    ),
    "two vectors": (Applied(lambda x: x.flatten() @ x.flatten()), 48),
    "attention, causal": (
        Applied(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        2 * 3 * 4 * 4 * 4,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_macs_of_every_kind_of_product_are_their_closed_forms(name: str) -> None:
    network, expected = PRODUCTS[name]
    assert cost(network, 4).macs == expected


def test_outputs_of_matrix_products_are_activations() -> None:
    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(images, images, images)

    # for each channel 4 x 4 weights of attention, then 4 x 4 outputs
    assert cost(Attention(), 4).activation_bytes == FLOAT * 3 * (16 + 16)


def test_products_that_are_no_layers_count() -> None:
    tokens, channels = 16, 8
    expected = tokens * 3 * channels + 2 * tokens * tokens * channels + tokens * tokens * channels
    assert cost(Functional(), 4).macs == expected


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("resnet10t", 32),
        ("vit_tiny_patch16_224", 32),
        ("tinynet_e", 32),
        ("test_convnext", 32),
        ("test_mambaout", 32),
    ],
)
def test_macs_agree_with_the_counter_of_pytorch(name: str, resolution: int) -> None:
    size: dict[str, Any] = {"img_size": resolution, "depth": 2} if name.startswith("vit") else {}
    network = timm.create_model(name, num_classes=10, **size)
    assert cost(network, resolution).macs == plain_macs(network, resolution)


def test_macs_of_subnets_agree_with_the_counter_of_pytorch(space: SearchSpace, archs: list[Arch]) -> None:
    for arch in (archs[0], space.largest):
        network = build(arch)
        assert cost(network, arch.integer("resolution")).macs == plain_macs(
            network, arch.integer("resolution")
        )


def test_the_largest_network_of_once_for_all_takes_566_million_macs() -> None:
    decisions: list[tuple[str, Value]] = [
        ("classes", 1000), ("stem.width", 16), ("head.width", 1280), ("head.kind", "mobilenetv3"),
        ("act", "hard_swish"), ("s1.block", "ds"), ("s1.width", 16),
    ]  # fmt: skip
    swish = "hard_swish"
    stages = [(24, 2, 0, "relu"), (40, 2, 0.25, "relu"), (80, 2, 0, swish), (112, 1, 0.25, swish)]
    stages.append((160, 2, 0.25, swish))
    for stage, (width, stride, se, act) in enumerate(stages, 2):
        columns: dict[str, Value] = {
            "width": width, "stride": stride, "depth": 4, "expand": 6, "kernel": 7, "se": se, "act": act,
        }  # fmt: skip
        decisions += [(f"s{stage}.{column}", value) for column, value in columns.items()]
    decisions += [("s7.block", "conv"), ("s7.kernel", 1), ("s7.width", 960)]
    found = cost(build_shapes(build, Arch(tuple(decisions))), 224)
    assert found.macs == 566_163_744
    assert found.params == 7_659_112


def test_peak_memory_of_a_chain_is_its_largest_pair_of_maps() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 64 pixels: reads 3, writes 8
        nn.BatchNorm2d(8),
        nn.Hardswish(),  # both write over what they read
        nn.Conv2d(8, 16, 3, stride=2, padding=1),  # reads 8 x 64, writes 16 x 16
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 4, 1),
    )
    assert cost(network, 8).peak_bytes == FLOAT * (8 * 64 + 16 * 16)


def test_peak_memory_ends_with_the_last_reader_not_with_the_last_name() -> None:
    class Names(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            kept = F.max_pool2d(images, 2)  # 3 x 4 x 4, read once and named until the end
            wide = kept.repeat(1, 10, 1, 1)
            wider = wide.repeat(1, 2, 1, 1)
            del wide
            return wider

    assert cost(Names(), 8).peak_bytes == FLOAT * 16 * (30 + 60)


def test_peak_memory_holds_what_a_residual_connection_still_needs() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand = nn.Conv2d(3, 12, 1)
            self.project = nn.Conv2d(12, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            # the activation cannot write over the image, which is read again
            maps: Tensor = self.project(self.expand(images.relu())) + images
            return maps

    # image, its activation, the expanded map; then image, expanded map, projected map
    assert cost(Residual(), 4).peak_bytes == FLOAT * 16 * (3 + 3 + 12)


def test_views_take_no_memory_and_weights_are_no_activations() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1000, 48))

        def forward(self, images: Tensor) -> Tensor:
            halves = images.flatten(1).view(1, 3, 16).chunk(2, dim=2)
            return halves[0] + halves[1] + (self.table * 2).sum()

    # the image in two halves, then their sum beside them
    assert cost(Views(), 4).peak_bytes == FLOAT * (48 + 24)


def test_a_result_that_nobody_reads_takes_memory_only_while_it_is_made() -> None:
    class Unread(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            images.repeat(1, 5, 1, 1)
            return images.repeat(1, 2, 1, 1).repeat(1, 2, 1, 1)

    # the image and its unread copies; then two images and four
    assert cost(Unread(), 4).peak_bytes == FLOAT * 48 * (1 + 5)


def test_the_cost_is_the_same_whatever_memory_was_given_back_before() -> None:
    network = build(Arch((("classes", 3), ("stem.width", 8), ("head.width", 16), ("s1.width", 8))))
    assert len({cost(network, 32) for _ in range(5)}) == 1


def test_counting_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cost(network, 8)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_counting_leaves_a_layer_that_has_two_names_as_it_was() -> None:
    shared = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    found = cost(network, 4)
    assert found.macs == 2 * 16 * 9
    assert found.params == 12
    assert not shared.weight.is_meta
    assert not shared.weight.isnan().any()


def test_tensors_that_are_neither_parameters_nor_buffers_are_no_obstacle() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = torch.arange(3.0)

        def forward(self, images: Tensor) -> Tensor:
            maps: Tensor = images * self.scales.view(1, 3, 1, 1) + torch.linspace(0, 1, 4)
            return maps.flatten(2) @ maps.flatten(2).mT

    assert cost(Holding(), 4).macs == 3 * 3 * 16


def test_weights_of_half_precision_cost_what_whole_ones_do() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = cost(network, 8)
    assert cost(network.to(torch.bfloat16), 8) == expected


def test_a_network_that_fails_is_left_in_training_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError):
        cost(network, 8)
    assert network.training
