from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.data import Batch
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace
from nestling.train.lessons import LessonError, Taught, remember, teach
from nestling.train.losses import alpha_divergence_loss, soft_target_loss
from nestling.train.optimization import Precision
from nestling.train.strategies import Visit

CLASSES = 4


class Network(nn.Module):
    """A few linear layers: no norm, no chance, so that each loss can be computed again."""

    def __init__(self, hidden: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, hidden)
        self.middle = nn.Sequential(*(nn.Linear(hidden, hidden) for _ in range(depth - 1)))
        self.last = nn.Linear(hidden, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(torch.tanh(self.first(images.flatten(1)))))
        return logits


def build(arch: Arch) -> nn.Module:
    return Network(arch.integer("hidden"), arch.integer("depth"))


@pytest.fixture
def supernet(space: SearchSpace) -> Supernet:
    torch.manual_seed(1)
    return Supernet(space, build).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(6, 3, 2, 2, generator=generator)
    return Batch(images, torch.randint(CLASSES, (6,), generator=generator))


def arch(space: SearchSpace, hidden: int, depth: int = 1) -> Arch:
    return space.canonical({"hidden": hidden, "depth": depth})


def taught(supernet: Supernet, visits: Sequence[Visit], **changes: Any) -> Taught:
    supernet.zero_grad(set_to_none=True)
    return teach(
        supernet, batch(), visits, smoothing=0.1, precision=Precision("off", torch.device("cpu")), **changes
    )


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in supernet.largest.named_parameters() if p.grad is not None}


def gradients_of(supernet: Supernet, loss: Tensor) -> dict[str, Tensor]:
    supernet.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    return gradients(supernet)


def alike(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[n], right[n], atol=1e-7) for n in left)


def label_losses(supernet: Supernet, archs: Sequence[Arch]) -> list[float]:
    return [
        F.cross_entropy(supernet(batch().images, a), batch().labels, label_smoothing=0.1).item()
        for a in archs
    ]


def uniform(images: Tensor) -> Tensor:
    return torch.full((len(images), CLASSES), 1 / CLASSES)


def test_labels_teachers_and_a_subnets_soft_labels_add_up_with_their_weights(supernet: Supernet) -> None:
    space = supernet.space
    small, images = arch(space, 3), batch().images
    visit = Visit(small, learns_from=space.largest, weight=0.5, labels=0.25, teacher=2.0, divergence="alpha")
    found = taught(supernet, [Visit(space.largest, weight=0.0), visit], teachers=uniform)
    mine = gradients(supernet)

    logits = supernet(images, small)
    loss = alpha_divergence_loss(logits, supernet(images, space.largest))
    loss = loss + 2.0 * soft_target_loss(logits, uniform(images))
    loss = loss + 0.25 * F.cross_entropy(logits, batch().labels, label_smoothing=0.1)
    assert found.losses[1] == pytest.approx(loss.item(), rel=1e-6)
    assert alike(mine, gradients_of(supernet, 0.5 * loss))


@pytest.mark.parametrize(
    ("visit", "weight"),
    [
        ({}, 1.0), ({"teacher": 1.0}, 0.0), ({"learns": True}, 0.0), ({"teacher": 1.0, "labels": 1.0}, 1.0),
        ({"labels": 0.5}, 0.5), ({"learns": True, "labels": 2.0}, 2.0),
    ],
)  # fmt: skip
def test_labels_count_where_nothing_softer_is_learnt_from_or_where_it_is_said(
    space: SearchSpace, visit: dict[str, Any], weight: float
) -> None:
    teaches = space.largest if visit.pop("learns", False) else None
    assert Visit(space.smallest, learns_from=teaches, **visit).labels_weight == weight


def test_a_visit_without_weight_teaches_and_learns_nothing(supernet: Supernet) -> None:
    space = supernet.space
    found = taught(supernet, [Visit(space.largest, weight=0.0)])
    assert gradients(supernet) == {}
    assert found.losses == pytest.approx(label_losses(supernet, [space.largest]))


@pytest.mark.parametrize("keeps", ["best", "worst"])
def test_of_rivals_the_one_that_does_best_or_worst_on_the_batch_learns_alone(
    supernet: Supernet, keeps: Any
) -> None:
    space = supernet.space
    rivals = [arch(space, 5), arch(space, 3), arch(space, 8), arch(space, 5, 2)]
    losses = label_losses(supernet, rivals)
    assert losses.index(min(losses)) != 0
    assert losses.index(max(losses)) != 0
    winner = rivals[losses.index(min(losses) if keeps == "best" else max(losses))]
    found = taught(supernet, [Visit(rivals[0], rivals=tuple(rivals[1:]), keeps=keeps)])
    mine = gradients(supernet)
    assert found.archs == (winner,)
    taught(supernet, [Visit(winner)])
    assert alike(mine, gradients(supernet))


def test_who_wins_and_what_is_told_are_decided_by_the_mean_over_processes(supernet: Supernet) -> None:
    space = supernet.space
    rivals = [arch(space, 5), arch(space, 3), arch(space, 8)]
    last = torch.tensor([9.0, 9.0, -9.0, 9.0, -9.0])

    def mean(losses: Tensor) -> Tensor:
        return (losses + last[: len(losses)]) / 2  # another process finds these

    here = label_losses(supernet, [space.largest, rivals[2]])
    visits = [Visit(space.largest), Visit(rivals[0], rivals=tuple(rivals[1:]), remembered="bin")]
    found = taught(supernet, visits, mean=mean)
    assert found.archs == (space.largest, rivals[2])
    assert found.losses == pytest.approx([(loss + 9) / 2 for loss in here], rel=1e-6)
    assert found.gaps["bin"] == pytest.approx((here[1] - here[0] - 9) / 2, rel=1e-5)


def test_teachers_are_asked_once_a_step(supernet: Supernet) -> None:
    asked: list[int] = []

    def counting(images: Tensor) -> Tensor:
        asked.append(len(images))
        assert not torch.is_grad_enabled()
        return uniform(images)

    space = supernet.space
    taught(supernet, [Visit(space.largest), Visit(space.smallest)], teachers=counting)
    assert asked == []
    taught(supernet, [Visit(a, teacher=1.0) for a in (space.largest, space.smallest)], teachers=counting)
    assert asked == [6]


def test_a_gap_is_how_much_greater_the_labels_loss_is_than_that_of_the_largest(supernet: Supernet) -> None:
    space = supernet.space
    archs = [space.largest, arch(space, 3), arch(space, 5), arch(space, 5, 2)]
    largest, *losses = label_losses(supernet, archs)
    names = ["near", "far", "far"]
    visits = [
        Visit(a, learns_from=space.largest, remembered=name) for a, name in zip(archs[1:], names, strict=True)
    ]
    found = taught(supernet, [Visit(space.largest), *visits])
    expected = {"near": losses[0] - largest, "far": (losses[1] + losses[2]) / 2 - largest}
    assert found.gaps == pytest.approx(expected, abs=1e-6)


def test_every_visit_is_judged_by_its_loss_on_the_labels_whatever_it_learns_from(supernet: Supernet) -> None:
    space = supernet.space
    archs = [space.largest, arch(space, 3), arch(space, 5)]
    visits = [
        Visit(space.largest),
        Visit(archs[1], learns_from=space.largest, divergence="alpha"),
        Visit(archs[2], teacher=8.0, labels=0.5),
    ]
    found = taught(supernet, visits, teachers=uniform)
    assert found.on_labels == pytest.approx(label_losses(supernet, archs))
    assert found.losses[2] > 8 * found.on_labels[2] / 2


def test_what_is_remembered_changes_no_gradient(supernet: Supernet) -> None:
    space = supernet.space
    ends = []
    for name in ("", "bin"):
        visit = Visit(space.smallest, learns_from=space.largest, remembered=name)
        taught(supernet, [Visit(space.largest), visit])
        ends.append(gradients(supernet))
    assert alike(*ends)


def test_a_gap_is_taken_into_a_moving_average_from_the_first_on() -> None:
    memory = remember({}, {"a": 2.0})
    assert memory == {"a": 2.0}
    assert remember(memory, {"a": 4.0, "b": 1.0}) == pytest.approx({"a": 2.2, "b": 1.0})
    assert remember(memory, {}) == memory


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "no subnet is visited"),
        ("order", "learns from .* which is not visited before it"),
        ("teacher", "there are none; name them in train.teachers"),
        ("largest", "remembered as 'bin', but the largest network was not visited before it"),
        ("nothing", "learns from nothing"),
    ],
)
def test_visits_that_cannot_be_done_are_refused(supernet: Supernet, kind: str, message: str) -> None:
    space = supernet.space
    small, large = space.smallest, space.largest
    visits = {
        "none": [],
        "order": [Visit(small, learns_from=large), Visit(large)],
        "teacher": [Visit(small, teacher=1.0)],
        "largest": [Visit(small, remembered="bin"), Visit(large)],
        "nothing": [Visit(small, labels=0.0)],
    }[kind]
    with pytest.raises(LessonError, match=message):
        taught(supernet, visits)


def test_losses_that_are_not_numbers_are_told_and_not_hidden(supernet: Supernet) -> None:
    with torch.no_grad():
        next(supernet.largest.parameters()).fill_(math.nan)
    found = taught(supernet, [Visit(supernet.space.largest)])
    assert math.isnan(found.losses[0])
