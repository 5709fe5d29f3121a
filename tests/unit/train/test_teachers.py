from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace
from nestling.train.teachers import Frozen, SoftLabels, Teacher, load_teacher, refrozen

OURS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
THEIRS = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


class Colours(nn.Module):
    """Gives as logits the mean of each channel of what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_teacher_sees_the_images_in_the_colours_that_it_knows() -> None:
    pixels = torch.rand(4, 3, 6, 6)
    ours, theirs = ((pixels - column(mean)) / column(std) for mean, std in (OURS.values(), THEIRS))
    soft = SoftLabels([Teacher(Colours(), None, *THEIRS)], **OURS)(ours)
    assert torch.allclose(soft, theirs.mean((2, 3)).softmax(1), atol=1e-6)


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


class Side(nn.Module):
    """Gives as the first logit the side of what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([[float(images.shape[-1]) / 10, 0.0, 0.0]]).repeat(len(images), 1)


@pytest.mark.parametrize(("side", "seen"), [(None, 6), (9, 9)])
def test_a_teacher_sees_the_images_at_the_size_that_it_knows(side: int | None, seen: int) -> None:
    soft = SoftLabels([Teacher(Side(), side, *OURS.values())], **OURS)(torch.rand(2, 3, 6, 6))
    assert torch.allclose(soft[0], torch.tensor([seen / 10, 0.0, 0.0]).softmax(0))


def test_soft_labels_are_the_mean_of_all_teachers_probabilities() -> None:
    class Negative(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return -super().forward(images)

    images = torch.randn(3, 3, 2, 2)
    known = tuple(OURS.values())
    soft = SoftLabels([Teacher(network, None, *known) for network in (Colours(), Negative())], **OURS)(images)
    logits = images.mean((2, 3))
    assert torch.allclose(soft, (logits.softmax(1) + (-logits).softmax(1)) / 2, atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(3))


def test_soft_labels_need_a_teacher() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        SoftLabels([], **OURS)


def test_teachers_neither_learn_nor_drop_nor_take_statistics() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), Colours()).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    soft_labels = SoftLabels([Teacher(network, None, *OURS.values())], **OURS)
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    first = soft_labels(images)
    assert torch.equal(first, soft_labels(images))
    assert not first.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_teacher_of_timm_is_loaded_from_a_file(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=5)
    path = tmp_path / "teacher.pth"
    torch.save(network.state_dict(), path)
    teacher = load_teacher(f"resnet10t={path}", classes=5)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.side is None
    assert len(teacher.mean) == len(teacher.std) == 3
    assert torch.equal(teacher.network(images), network.eval()(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "the teacher resnet18 knows 1000 classes with timm's weights, the data have 5"),
        ("resnet81", "timm has no model 'resnet81'; did you mean"),
    ],
)
def test_a_teacher_that_cannot_teach_these_classes_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(name, classes=5)


def test_a_teacher_whose_file_is_not_there_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such file"):
        load_teacher("resnet10t=nowhere.pth", classes=5)


def build(arch: Arch) -> nn.Module:
    layers = [nn.Conv2d(3, arch.integer("hidden"), 1), nn.BatchNorm2d(arch.integer("hidden"))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(arch.integer("hidden"), 3))


def test_a_frozen_teacher_says_what_the_largest_network_said_then(space: SearchSpace) -> None:
    supernet = Supernet(space, build)
    images = torch.randn(4, 3, 5, 5)
    expected = supernet(images, space.largest).softmax(1)
    soft_labels = Frozen(supernet)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(1.0)
    assert torch.equal(soft_labels(images), expected)
    again = refrozen(supernet, soft_labels.tensors())
    assert again is not None
    assert torch.equal(again(images), expected)
    assert refrozen(supernet, {"largest/x": torch.ones(1)}) is None
    assert not soft_labels(images).requires_grad
