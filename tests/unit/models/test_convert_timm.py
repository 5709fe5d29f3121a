from __future__ import annotations

import random
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.models import convert
from nestling.models.building import build_shapes
from nestling.models.supernet import Supernet
from nestling.space import Arch
from nestling.space.files import load_space, save_space

SIDE = 32
MODEL = "test_resnet"
"""timm's own tiny network for tests."""


@pytest.fixture(scope="module")
def converted() -> convert.Conversion:
    torch.manual_seed(0)
    return convert.convert_timm(MODEL, resolution=SIDE, classes=5)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_a_space_file_says_all_that_build_needs(converted: convert.Conversion, tmp_path: Path) -> None:
    save_space(converted.space, tmp_path / "space.toml")
    space = load_space(tmp_path / "space.toml")
    assert space == converted.space
    rng = random.Random(0)
    for arch in (space.smallest, space.largest, space.sample(rng), space.sample(rng)):
        from_arch, from_conversion = build_shapes(convert.build, arch), build_shapes(converted.build, arch)
        assert shapes(from_arch) == shapes(from_conversion)
        assert convert.layout(from_arch, arch) == converted.layout(from_conversion, arch)


def test_a_supernet_of_the_family_lends_what_it_materializes(
    converted: convert.Conversion, images: Tensor
) -> None:
    supernet = Supernet(converted.space, convert.build, layout=convert.layout).train()
    rng = random.Random(0)
    for arch in (supernet.space.smallest, supernet.space.sample(rng)):
        with torch.no_grad():
            assert torch.equal(supernet(images, arch), supernet.materialize(arch).train()(images))


def test_rebuild_needs_timm_and_torch_alone(converted: convert.Conversion, images: Tensor) -> None:
    arch = converted.space.smallest
    source = convert.rebuild(arch)
    assert "nestling" not in source
    made: dict[str, nn.Module] = {}
    exec(source, made)
    subnet = converted.build(arch).eval()
    made["network"].load_state_dict(subnet.state_dict())
    assert torch.equal(made["network"].eval()(images), subnet(images))


def test_a_first_build_leaves_the_random_numbers_alone(converted: convert.Conversion) -> None:
    arch = converted.space.smallest
    numbers = []
    for _ in range(2):  # the first converts, the second remembers
        torch.manual_seed(3)
        build_shapes(convert.build, arch)
        numbers.append(torch.rand(1))
    assert torch.equal(*numbers)


def test_weights_from_a_file_are_the_largest_networks(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(5)
    given = timm.create_model(MODEL, num_classes=5).eval()
    path = tmp_path / "weights.pth"
    torch.save(given.state_dict(), path)
    for sort in (False, True):
        converted = convert.convert_timm(
            MODEL, resolution=SIDE, classes=5, pretrained=str(path), sort=sort, depth=False
        )
        largest = convert.pretrained(converted.space.largest).eval()
        torch.testing.assert_close(largest(images), given(images), atol=1e-5, rtol=1e-4)
        weights, first = largest.state_dict(), next(iter(given.state_dict()))
        assert torch.equal(weights[first], given.state_dict()[first]) == (not sort)
        assert all(torch.equal(weights[name], t) for name, t in converted.network.state_dict().items())


def test_what_cannot_be_made_is_refused(converted: convert.Conversion) -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'test_resnot'; did you mean 'test_resnet'"):
        convert.convert_timm("test_resnot", resolution=SIDE)
    with pytest.raises(FileNotFoundError, match=r"pretrained is '/nowhere\.pth'; there is no such file"):
        convert.convert_timm(MODEL, resolution=SIDE, pretrained="/nowhere.pth")
    strange = Arch((*converted.space.largest.decisions, ("conv9.width", 8)))
    with pytest.raises(ValueError, match=r"\'conv9\.width\' is no choice of the converted test_resnet"):
        convert.build(strange)
    with pytest.raises(ValueError, match="pretrained is False"):
        convert.pretrained(converted.space.largest)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
