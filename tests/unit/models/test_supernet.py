from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from nestling.models.compiling import call_lent
from nestling.models.lending import LendingError
from nestling.models.mobilenet import build, rebuild
from nestling.models.supernet import Supernet, at_resolution, capped, regularize
from nestling.space import Arch, Choice, SearchSpace


def plain(supernet: Supernet, arch: Arch) -> nn.Module:
    """The materialized network, normalizing by its batch."""
    return supernet.materialize(arch).train()


def lent_part(axis: int, large: int, small: int) -> slice:
    start = (large - small) // 2 if axis >= 2 else 0
    return slice(start, start + small)


def test_a_subnet_computes_the_same_with_lent_and_with_its_own_weights(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    with torch.no_grad():
        for arch in [*archs, supernet.space.smallest, supernet.space.largest]:
            shared = supernet(images, arch)
            own = plain(supernet, arch)(at_resolution(images, arch))
            assert float((shared - own).abs().max()) == 0.0, arch.to_json()


def test_the_archs_of_that_comparison_differ_in_resolution_depth_and_kernel(archs: list[Arch]) -> None:
    for name in ("resolution", "s2.depth", "s2.kernel", "s3.b1.kernel", "stem.width"):
        assert len({arch[name] for arch in archs}) > 1, name


def test_gradients_of_a_subnet_are_those_of_its_plain_network(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    arch = archs[0]
    weights = torch.linspace(-1, 1, 5)
    torch.autograd.backward((supernet(images, arch) * weights).sum())
    network = plain(supernet, arch)
    torch.autograd.backward((network(at_resolution(images, arch)) * weights).sum())
    lent = dict(supernet.largest.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None)
    for name, parameter in network.named_parameters():
        grad, expected = lent[name].grad, parameter.grad
        assert grad is not None
        assert expected is not None
        sizes = enumerate(zip(grad.shape, expected.shape, strict=True))
        index = tuple(lent_part(axis, large, small) for axis, (large, small) in sizes)
        # few positions are computed otherwise than in a plain network: equal up to rounding, which is all
        # that there is of a bias before a normalization
        most = max(float(expected.abs().max()), 1e-2 * scale)
        assert float((grad[index] - expected).abs().max()) < 1e-5 * most, name
        outside = grad.clone()
        outside[index] = 0
        assert not outside.any(), name


def test_weights_of_a_subnet_load_into_the_timm_class_that_needs_no_nestling(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    for arch in archs[:2]:
        network = supernet.materialize(arch)
        source = rebuild(arch)
        assert "nestling" not in source
        names: dict[str, Any] = {}
        exec(source, names)
        rebuilt = names["network"].to(memory_format=torch.channels_last)
        rebuilt.load_state_dict(network.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(rebuilt.eval()(images), network(images))


def test_a_materialized_network_has_its_own_weights(supernet: Supernet) -> None:
    network = supernet.materialize(supernet.space.largest)
    assert not network.training
    before = {name: tensor.clone() for name, tensor in supernet.largest.state_dict().items()}
    for parameter in network.parameters():
        assert parameter.requires_grad
        nn.init.zeros_(parameter)
    for name, tensor in supernet.largest.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_materialized_network_keeps_kernels_channels_last(supernet: Supernet) -> None:
    network = supernet.materialize(supernet.space.smallest)
    stem = network.get_submodule("conv_stem")
    assert isinstance(stem, nn.Conv2d)
    assert stem.weight.is_contiguous(memory_format=torch.channels_last)


class Shared(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.second = nn.Conv2d(3, width, 1)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images) + 2 * self.second(images)
        assert isinstance(maps, Tensor)
        return maps.mean((2, 3)) * self.frozen


def test_a_parameter_that_two_layers_share_is_lent_and_stays_shared(images: Tensor) -> None:
    space = SearchSpace("mobilenet", (Choice("width", (2, 4)),))
    supernet = Supernet(space, lambda arch: Shared(arch.integer("width")))
    network = supernet.materialize(space.smallest)
    assert network.get_parameter("second.weight") is network.get_parameter("first.weight")
    assert not network.get_parameter("frozen").requires_grad
    with torch.no_grad():
        assert torch.equal(supernet(images, space.smallest), network(images))


def test_training_changes_no_running_statistics(supernet: Supernet, images: Tensor) -> None:
    before = {name: buffer.clone() for name, buffer in supernet.largest.named_buffers()}
    supernet.train()
    for arch in (supernet.space.largest, supernet.space.smallest):
        torch.autograd.backward(supernet(images, arch).sum())
    assert all(torch.equal(b, before[name]) for name, b in supernet.largest.named_buffers())


def test_evaluation_normalizes_by_the_batch(supernet: Supernet, images: Tensor) -> None:
    arch = supernet.space.smallest
    with torch.no_grad():
        assert torch.equal(supernet.eval()(images, arch), supernet.train()(images, arch))


def test_weights_of_the_plain_largest_network_load_as_they_are(supernet: Supernet) -> None:
    state = {f"largest.{k}": v for k, v in build(supernet.space.largest).state_dict().items()}
    supernet.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in supernet.state_dict().items())


def test_images_are_resized_to_the_resolution_of_the_arch_only_where_they_differ(images: Tensor) -> None:
    assert at_resolution(images, Arch((("resolution", 16),))).shape == (6, 3, 16, 16)
    assert torch.equal(at_resolution(images, Arch((("resolution", 24),))), images)
    assert torch.equal(at_resolution(images, Arch(())), images)


def test_dropout_and_drop_path_are_for_the_largest_network_in_training_only(
    space: SearchSpace, images: Tensor
) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space, build, dropout=0.5, drop_path=0.5)

    def varies(arch: Arch) -> bool:
        with torch.no_grad():
            return not torch.equal(supernet(images, arch), supernet(images, arch))

    almost = space.canonical({**space.largest, "s2.kernel": 5})
    assert varies(space.largest)
    assert not varies(almost)
    assert not varies(space.smallest)
    supernet.eval()
    assert not varies(space.largest)


def test_drop_path_rises_linearly_to_its_value_in_the_last_block(space: SearchSpace) -> None:
    network = build(space.largest)
    regularize(network, dropout=0.0, drop_path=0.3)
    found = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    assert found == pytest.approx([0.3 * i / (len(found) - 1) for i in range(len(found))])
    assert len(found) == 7


@pytest.mark.parametrize("asked", [{"dropout": 0.1, "drop_path": 0.0}, {"dropout": 0.0, "drop_path": 0.1}])
def test_a_network_without_a_place_for_regularization_is_refused(asked: dict[str, float]) -> None:
    name = next(key for key, value in asked.items() if value)
    with pytest.raises(ValueError, match=f"{name} is 0.1, but Linear"):
        regularize(nn.Linear(2, 2), **asked)


def test_a_subnet_larger_than_the_largest_is_refused(supernet: Supernet, images: Tensor) -> None:
    larger = Arch(tuple({**supernet.space.largest, "s2.width": 32}.items()))
    with pytest.raises(LendingError, match="cannot be cut"):
        supernet(images, larger)
    with pytest.raises(LendingError, match="cannot be cut"):
        supernet.materialize(larger)


def test_shapes_are_built_once_for_an_arch_and_forgotten_when_there_are_too_many(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestling.models.supernet.CACHED_SHAPES", 4)
    built: list[Arch] = []

    def counting(arch: Arch) -> nn.Module:
        built.append(arch)
        return nn.Sequential(nn.Conv2d(3, arch.integer("width"), 1), nn.Flatten())

    widths = (1, 2, 3, 4, 5, 6)
    space = SearchSpace("mobilenet", (Choice("width", widths),))
    supernet = Supernet(space, counting)
    built.clear()
    with torch.no_grad():
        first = space.canonical({"width": 1})
        for _ in range(3):
            supernet(images[:1, :, :1, :1], first)
        assert len(built) == 1
        for width in (2, 3, 4, 5):
            supernet(images[:1, :, :1, :1], space.canonical({"width": width}))
            supernet(images[:1, :, :1, :1], space.largest)
        assert len(built) == 5  # the largest was in use all along
        supernet(images[:1, :, :1, :1], first)
        assert built[-1] == first


class Indexed(nn.Module):
    """Picks channels by a table that its constructor makes of the width."""

    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.register_buffer("table", torch.arange(width).flip(0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv(images)
        return maps[:, self.table].mean((2, 3))


def test_a_subnet_has_the_tables_that_its_own_constructor_makes(images: Tensor) -> None:
    space = SearchSpace("user", (Choice("width", (2, 3, 5)),))
    supernet = Supernet(space, lambda arch: Indexed(arch.integer("width")))
    for arch in space.walk():
        network = supernet.materialize(arch)
        assert network.get_buffer("table").tolist() == list(range(arch.integer("width")))[::-1]
        with torch.no_grad():
            assert torch.equal(supernet(images, arch), network(images))


def test_a_network_that_is_given_lends_its_own_weights(space: SearchSpace, images: Tensor) -> None:
    given = build(space.largest)
    supernet = Supernet(space, build, largest=given)
    assert supernet.largest is given
    with torch.no_grad():
        network = given.eval().to(memory_format=torch.channels_last)
        assert torch.equal(supernet.materialize(space.largest)(images), network(images))


def test_a_given_network_keeps_its_own_tables() -> None:
    space = SearchSpace("user", (Choice("width", (2, 3)),))
    given = Indexed(3)
    given.table.copy_(torch.tensor([0, 0, 0]))
    supernet = Supernet(space, lambda arch: Indexed(arch.integer("width")), largest=given)
    assert supernet.materialize(space.largest).get_buffer("table").tolist() == [0, 0, 0]
    assert supernet.materialize(space.smallest).get_buffer("table").tolist() == [1, 0]


def test_a_given_network_of_other_shapes_is_refused_with_the_tensor(space: SearchSpace) -> None:
    with pytest.raises(ValueError, match=r"conv_stem\.weight is \(8, 3, 3, 3\), not \(16, 3, 3, 3\)"):
        Supernet(space, build, largest=build(space.smallest))


TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    "convnext_atto": {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 8)},
    "efficientnet_lite0": {},
}


@pytest.mark.parametrize("name", TIMM)
def test_dropout_and_drop_path_reach_what_the_network_computes(name: str, images: Tensor) -> None:
    network = timm.create_model(name, num_classes=5, **TIMM[name])
    for parameter in network.parameters():
        if parameter.ndim == 1:  # timm begins with residual branches that give nothing
            nn.init.uniform_(parameter, 0.5, 1.5)
    images = F.interpolate(images, (32, 32))

    def differs() -> bool:
        with torch.no_grad():
            return not torch.equal(network(images), network(images))

    network.eval()
    assert not differs()
    network.train()
    for asked in ({"dropout": 0.9, "drop_path": 0.0}, {"dropout": 0.0, "drop_path": 0.5}):
        regularize(network, **asked)
        assert differs(), asked
        regularize(network, dropout=1e-9, drop_path=1e-9)
        assert not differs(), asked


class TwoNames(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.again = self.conv

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv(images) * self.again(images)
        return maps.mean((2, 3))


def test_a_layer_with_two_names_gives_back_what_it_was_lent(images: Tensor) -> None:
    space = SearchSpace("user", (Choice("width", (2, 4)),))
    supernet = Supernet(space, lambda arch: TwoNames(arch.integer("width")))
    for _ in range(2):
        network = supernet.materialize(space.smallest)
        with torch.no_grad():
            assert torch.equal(supernet(images, space.smallest), network(images))
            supernet.largest.get_parameter("conv.weight").add_(1)


def test_an_arch_of_a_larger_resolution_runs_at_the_most_that_is_asked_for(
    supernet: Supernet, images: Tensor
) -> None:
    space = supernet.space
    large, small = space.largest, space.only({"resolution": [16]}).largest
    coarse = torch.nn.functional.interpolate(images, (20, 20))
    with torch.no_grad():
        plain_logits = plain(supernet, large)(at_resolution(coarse, capped(large, 20)))
        assert torch.equal(supernet(coarse, large, at_most=20), plain_logits)
        assert torch.equal(supernet(coarse, small, at_most=20), supernet(coarse, small))
        assert not torch.equal(supernet(coarse, large), plain_logits)


def test_the_largest_is_regularised_at_any_resolution_and_another_arch_is_not(space: SearchSpace) -> None:
    supernet = Supernet(space, build, dropout=0.5).train()
    images, lower = torch.randn(4, 3, 16, 16), space.only({"resolution": [16]}).largest
    with torch.no_grad():
        dropped = [supernet(images, space.largest, at_most=16) for _ in range(2)]
        kept = [supernet(images, lower) for _ in range(2)]
    assert not torch.equal(*dropped)
    assert torch.equal(*kept)


def test_an_arch_is_called_as_its_call_says(supernet: Supernet, images: Tensor) -> None:
    supernet.calls[supernet.space.smallest] = lambda network, lent, images: (
        call_lent(network, lent, images) + 1
    )
    with torch.no_grad():
        logits = supernet(images, supernet.space.smallest)
        supernet.calls.clear()
        assert torch.equal(logits, supernet(images, supernet.space.smallest) + 1)
