from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.models.convert import Conversion, convert
from nestling.models.cost import cost
from nestling.models.layouts import Kept
from nestling.space import Arch

SIDE = 16


class Block(nn.Module):
    """A residual block with a grouped and a depthwise convolution, a group norm and a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 32, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, 32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.gate = nn.Conv2d(32, 32, 1)
        self.conv3 = nn.Conv2d(32, width, 1)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.depthwise(self.conv2(y))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return torch.relu(x + self.norm3(self.conv3(y)))


class Everything(nn.Module):
    """Concatenation, residual blocks, flattening into a linear layer, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.right = nn.Conv2d(3, 24, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.mix = nn.Conv2d(40, 16, 1)
        self.stage = nn.Sequential(Block(16), Block(16), Block(16))
        self.hidden = nn.Linear(16 * 4, 32)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.left(images), self.right(images)], 1)))
        x = torch.max_pool2d(self.stage(self.mix(x)), 2).flatten(1)
        x = torch.relu(self.hidden(x))
        return self.head(self.twice(torch.relu(self.twice(x))))  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """Channels of two halves take turns, which the dependency graph does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.second = nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = x.reshape(len(x), 2, 16, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]


class FixedWidth(nn.Module):
    """A network in which it is written how many channels it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(
            self.second(torch.relu(self.first(images)) * torch.ones(16, 1, 1, device=images.device))
        )
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def randomized(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            positive = name.endswith(("running_var", "weight"))
            tensor.uniform_(0.5, 1.5) if positive else tensor.uniform_(-0.5, 0.5)
    return network.eval()


def tiny_vit() -> nn.Module:
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5
    )
    return network.eval()


@pytest.fixture(scope="module")
def everything() -> nn.Module:
    return randomized(Everything)


@pytest.fixture(scope="module")
def conversion(everything: nn.Module) -> Conversion:
    return convert(everything, resolution=SIDE)


@pytest.fixture(scope="module")
def vit() -> Conversion:
    return convert(tiny_vit(), resolution=SIDE)


@pytest.fixture(scope="module")
def some_images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def archs(conversion: Conversion, count: int = 5) -> list[Arch]:
    rng = random.Random(0)
    return [conversion.space.smallest, *(conversion.space.sample(rng) for _ in range(count))]


def arch_with(conversion: Conversion, **changed: int) -> Arch:
    names = {name.replace(".", "_"): name for name in conversion.space.by_name}
    return conversion.space.canonical(
        {**conversion.space.largest, **{names[name]: value for name, value in changed.items()}}
    )


def test_every_kind_of_coupled_channels_gets_a_choice(conversion: Conversion) -> None:
    assert {name: c.values for name, c in conversion.space.by_name.items() if len(c.values) > 1} == {
        "stage.depth": (2, 3),
        "left.width": (8, 16),
        "right.width": (16, 24),
        "mix.width": (8, 16),
        "stage.0.conv1.width": (16, 24, 32),
        "stage.1.conv1.width": (16, 24, 32),
        "stage.2.conv1.width": (16, 24, 32),
        "hidden.width": (16, 24, 32),
    }


def test_the_largest_network_computes_what_the_given_one_does(
    conversion: Conversion, everything: nn.Module, some_images: Tensor
) -> None:
    supernet = conversion.supernet()
    with torch.no_grad():
        largest = supernet.materialize(supernet.space.largest)(some_images)
        assert (largest - everything(some_images)).abs().max() <= 1e-5 * largest.abs().max()


def test_a_subnet_with_lent_weights_computes_what_it_computes_alone(
    conversion: Conversion, vit: Conversion, some_images: Tensor
) -> None:
    for converted in (conversion, vit):
        supernet = converted.supernet().train()
        for arch in archs(converted):
            alone = supernet.materialize(arch).train()
            with torch.no_grad():
                assert torch.equal(supernet(some_images, arch), alone(some_images))


def test_build_cuts_the_weights_that_a_supernet_lends(conversion: Conversion, some_images: Tensor) -> None:
    supernet = conversion.supernet()
    for arch in archs(conversion):
        built, lent = conversion.build(arch).eval(), supernet.materialize(arch)
        torch.testing.assert_close(built(some_images), lent(some_images))


def test_a_cut_group_computes_as_if_the_rest_were_zero(some_images: Tensor) -> None:
    # without a norm over them, channels that are zero are as good as channels that are not there
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.Flatten(), nn.Linear(16 * 144, 5)
    )
    conversion = convert(network, resolution=SIDE)
    (name,) = (choice.name for choice in conversion.space.open_choices)
    assert name == "0.width"
    small = conversion.build(conversion.space.smallest)
    with torch.no_grad():
        for parameter in network[2].parameters():
            parameter[8:] = 0
    torch.testing.assert_close(small(some_images), network(some_images))


def test_a_transposed_convolution_is_cut_along_its_own_axes(some_images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 5)
    )
    conversion = convert(network, resolution=SIDE)
    assert [choice.name for choice in conversion.space.open_choices] == ["0.width", "1.width"]
    arch = conversion.space.canonical({**conversion.space.largest, "0.width": 8})
    small = conversion.build(arch)
    assert dict(small.named_parameters())["1.weight"].shape == (8, 16, 3, 3)
    with torch.no_grad():
        for parameter in network[0].parameters():
            parameter[8:] = 0
    torch.testing.assert_close(small(some_images), network(some_images))


def test_channels_behind_a_concatenation_are_kept_from_both_sides(conversion: Conversion) -> None:
    arch = arch_with(conversion, left_width=8)
    part = conversion.layout(conversion.build(arch), arch)["mix.weight", 1]
    assert part == Kept((*range(8), *range(16, 40)))


def test_whole_groups_of_a_convolution_stay_or_go(conversion: Conversion) -> None:
    small = conversion.build(arch_with(conversion, stage_0_conv1_width=16))
    grouped, norm = small.get_submodule("stage.0.conv2"), small.get_submodule("stage.0.norm1")
    assert isinstance(grouped, nn.Conv2d)
    assert isinstance(norm, nn.GroupNorm)
    assert (grouped.groups, grouped.weight.shape) == (2, (16, 8, 3, 3))
    assert (norm.num_groups, norm.num_channels) == (2, 16)


def test_an_attention_loses_whole_heads(vit: Conversion) -> None:
    small = vit.build(arch_with(vit, blocks_0_attn_heads=2))
    attention = small.get_submodule("blocks.0.attn")
    assert vars(attention)["num_heads"] == 2
    arch = arch_with(vit, blocks_0_attn_heads=2)
    kept = vit.layout(small, arch)["blocks.0.attn.qkv.weight", 0]
    assert kept == Kept((*range(16), *range(32, 48), *range(64, 80)))


def test_the_smallest_network_has_at_most_half_the_macs(conversion: Conversion, vit: Conversion) -> None:
    for converted in (conversion, vit):
        small, large = (
            cost(converted.build(arch), SIDE).macs
            for arch in (converted.space.smallest, converted.space.largest)
        )
        assert small <= large / 2


def test_choices_of_a_dropped_block_are_idle(conversion: Conversion) -> None:
    shallow = arch_with(conversion, stage_depth=2, stage_2_conv1_width=24)
    assert shallow["stage.2.conv1.width"] == 16
    assert isinstance(conversion.build(shallow).get_submodule("stage.2"), nn.Identity)


def test_sorted_channels_compute_the_same_and_the_important_ones_come_first(
    everything: nn.Module, some_images: Tensor
) -> None:
    scores = torch.tensor([float(n % 5) for n in range(16)])
    conversion = convert(everything, resolution=SIDE, sort=True, importance={"left.width": scores})
    with torch.no_grad():
        torch.testing.assert_close(conversion.network(some_images), everything(some_images))
    order = torch.argsort(-scores, stable=True)
    given = dict(everything.named_parameters())["left.weight"]
    assert torch.equal(dict(conversion.network.named_parameters())["left.weight"], given[order])
    made = dict(conversion.network.named_parameters())["hidden.weight"].abs().sum(1)
    read = dict(conversion.network.named_parameters())["twice.weight"].abs().sum((0,))
    twice = dict(conversion.network.named_parameters())["twice.weight"].abs().sum(1)
    norm = made + read + twice + dict(conversion.network.named_parameters())["head.weight"].abs().sum(0)
    assert torch.equal(torch.argsort(-norm, stable=True), torch.arange(32))


def test_channels_that_are_mixed_unseen_are_left_alone() -> None:
    conversion = convert(randomized(Shuffled), resolution=SIDE)
    assert [choice.name for choice in conversion.space.open_choices] == ["second.width"]
    assert "mixed" in conversion.coverage.refused["first.width"]


def test_a_network_that_does_not_run_smaller_keeps_its_width() -> None:
    conversion = convert(randomized(FixedWidth), resolution=SIDE)
    assert [choice.name for choice in conversion.space.open_choices] == ["second.width"]
    assert (
        "mixed" in conversion.coverage.refused["first.width"]
        or "run" in conversion.coverage.refused["first.width"]
    )


def test_the_coverage_names_each_layer_with_weights_and_why_not(conversion: Conversion) -> None:
    rows = {row.layer: row for row in conversion.coverage.rows}
    assert rows["norm"].choices == ("left.width", "right.width")
    assert rows["stage.2.conv3"].choices == ("mix.width", "stage.2.conv1.width", "stage.depth")
    assert conversion.coverage.refused["head.width"] == "it makes the network's output"
    text = str(conversion.coverage)
    assert len(text.splitlines()) == len(rows) + 2
    assert "of the weights" in text


def test_rebuild_makes_the_same_network_from_source(vit: Conversion, some_images: Tensor) -> None:
    source = (
        "import timm\nnetwork = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, "
        "embed_dim=32, depth=3, num_heads=4, num_classes=5)"
    )
    for arch in archs(vit, 2):
        made: dict[str, nn.Module] = {}
        exec(vit.rebuild(arch, source), made)
        subnet = vit.build(arch).eval()
        made["network"].load_state_dict(subnet.state_dict())
        assert torch.equal(made["network"].eval()(some_images), subnet(some_images))


def test_two_layers_that_share_a_weight_still_do() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
            self.second.weight = self.first.weight
            self.head = nn.Linear(16, 5)

        def forward(self, images: Tensor) -> Tensor:
            x = torch.relu(self.first(torch.relu(self.stem(images))))
            return self.head(torch.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]

    conversion = convert(Tied(), resolution=SIDE)
    small = conversion.build(conversion.space.smallest)
    first, second = small.get_submodule("first"), small.get_submodule("second")
    assert first._parameters["weight"] is second._parameters["weight"]
    assert [choice.name for choice in conversion.space.open_choices] == ["stem.width"]


def test_the_given_network_stays_as_it_is(everything: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in everything.state_dict().items()}
    everything.train()
    convert(everything, resolution=SIDE, sort=True)
    assert everything.training
    everything.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything.state_dict().items())


@pytest.mark.parametrize("ratios", [(), (0.5,), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_ratios_that_do_not_ascend_to_one_are_refused(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ratios are"):
        convert(nn.Linear(1, 1), resolution=SIDE, ratios=ratios)


def test_a_network_without_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 14, 14\)"):
        convert(nn.Conv2d(3, 4, 3), resolution=SIDE)
    with pytest.raises(ValueError, match="does not run on an image of 16 x 16 px"):
        convert(nn.Conv2d(1, 4, 3), resolution=SIDE)


def test_a_width_that_the_network_cannot_have_is_refused(conversion: Conversion) -> None:
    arch = Arch((("left.width", 17),))
    with pytest.raises(ValueError, match=r"left\.width is 17; the network has 16"):
        conversion.build(arch)
    with pytest.raises(ValueError, match="multiple of 8"):
        conversion.build(Arch((("stage.0.conv1.width", 12),)))
    with pytest.raises(ValueError, match="1 to 3 blocks"):
        conversion.build(Arch((("stage.depth", 0),)))


class Chained(nn.Module):
    """Blocks in a row of one shape: residual ones, or ones that hand over new channels."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(*(ChainedBlock(residual=residual) for _ in range(3)))
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.stem(images).relu())
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class ChainedBlock(nn.Module):
    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.residual = residual

    def forward(self, maps: Tensor) -> Tensor:
        new: Tensor = self.conv(maps)
        return ((new + maps) if self.residual else new).relu()


@pytest.mark.parametrize("residual", [True, False])
def test_only_residual_blocks_can_be_dropped(residual: bool) -> None:
    conversion = convert(Chained(residual=residual), resolution=8)
    assert ("blocks.depth" in conversion.space.by_name) is residual
    widths = [c for c in conversion.space.open_choices if c.name.endswith(".width")]
    assert len(widths) == (1 if residual else 4)
    supernet = conversion.supernet().eval()
    images = torch.randn(2, 3, 8, 8)
    for arch in archs(conversion):
        with torch.no_grad():
            assert torch.isfinite(supernet.materialize(arch)(images)).all()
