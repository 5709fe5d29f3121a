from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nestling.models.families import FAMILIES, family
from nestling.models.supernet import Supernet
from nestling.space import Choice, SearchSpace

SOURCE = """
from torch import nn

NOT_A_FUNCTION = 3


def build(arch):
    width = arch["width"]
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, arch["classes"]))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a user's package in the current folder."""
    (tmp_path / "my_networks").mkdir()
    (tmp_path / "my_networks" / "small.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    yield "my_networks.small"
    for name in ("my_networks.small", "my_networks"):
        sys.modules.pop(name, None)


def test_a_users_function_is_a_family(package: str) -> None:
    space = SearchSpace(f"{package}:build", (Choice("width", (4, 8)), Choice("classes", (3,))))
    supernet = Supernet(space, family(space.family).build).eval()
    images = torch.randn(2, 3, 8, 8)
    for arch in space.walk():
        with torch.no_grad():
            assert torch.equal(supernet(images, arch), supernet.materialize(arch)(images))


def test_a_network_of_a_users_function_is_rebuilt_by_that_function_alone(package: str) -> None:
    users = family(f"{package}:build")
    arch = SearchSpace("x", (Choice("width", (4,)), Choice("classes", (3,)))).largest
    source = users.rebuild(arch)
    assert "nestling" not in source
    names: dict[str, torch.nn.Module] = {}
    exec(source, names)
    shapes = {name: tensor.shape for name, tensor in names["network"].state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in users.build(arch).state_dict().items()}


def test_a_users_stage_is_the_layer_of_that_name(package: str) -> None:
    assert family(f"{package}:build").layers("0") == ("0",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_networks.large:build",
            r"'my_networks\.large:build' cannot be imported: ModuleNotFoundError: ",
        ),
        ("my_networks.small:make", "cannot be imported: .*has no attribute 'make'"),
        ("my_networks.small:NOT_A_FUNCTION", "is 3; it must be a function"),
        ("my networks:build", "cannot be imported"),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_function_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(name)


def test_an_unknown_family_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no family 'mobilnet'; did you mean 'mobilenet'"):
        family("mobilnet")
    with pytest.raises(ValueError, match=f"known: {', '.join(FAMILIES)}; a function of your own"):
        family("zzz")


@pytest.mark.usefixtures("package")
def test_a_network_that_the_user_converted_is_a_family(tmp_path: Path) -> None:
    (tmp_path / "my_networks" / "converted.py").write_text(
        "import timm, torch\n"
        "from nestling.models.convert import convert\n"
        "torch.manual_seed(0)\n"
        "network = timm.create_model('densenet121', block_config=(1, 1, 1, 1), num_classes=3)\n"
        "mine = convert(network, resolution=32, family='my_networks.converted:mine')\n"
    )
    users = family("my_networks.converted:mine")
    conversion = sys.modules["my_networks.converted"].mine
    assert conversion.space.family == "my_networks.converted:mine"
    assert users.pretrained is not None
    space = conversion.space
    supernet = Supernet(space, users.build, layout=users.layout, largest=users.pretrained(space.largest))
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    arch = space.sample(random.Random(0))
    with torch.no_grad():
        lent, own = supernet.materialize(arch)(images), conversion.build(arch).eval()(images)
    assert torch.allclose(lent, own, atol=1e-5)
    source = users.rebuild(arch)
    names: dict[str, torch.nn.Module] = {}
    exec(source, names)
    shapes = {name: tensor.shape for name, tensor in names["network"].state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in users.build(arch).state_dict().items()}
    sys.modules.pop("my_networks.converted")
