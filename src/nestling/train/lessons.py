"""One training step: the visits of a strategy, each a subnet's loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.data import Batch
from nestling.models.supernet import Supernet
from nestling.space import Arch
from nestling.train.losses import alpha_divergence_loss, label_loss, soft_label_loss, soft_target_loss
from nestling.train.optimization import Precision
from nestling.train.strategies import Visit

Teachers = Callable[[Tensor], Tensor]
"""From images (N, 3, H, W) to soft labels (N, classes), which sum up to 1."""

_SOFT_LOSSES = {"kl": soft_label_loss, "alpha": alpha_divergence_loss}
_MEMORY = 0.9


class LessonError(ValueError):
    """Visits that cannot be done; the message names the visit and what it lacks."""


@dataclass(frozen=True, slots=True)
class Taught:
    """What a step's visits found.

    Attributes:
        archs: the subnets visited, in order; of a contest, the winner.
        losses: each one's loss, before its weight.
        on_labels: each one's loss on the labels, whether it learns from them or not.
        gaps: how much greater the labels' loss was than the largest's, by the name under which it is
            remembered; the mean where several visits have one name.
        classes: how many logits there were.
    """

    archs: tuple[Arch, ...]
    losses: tuple[float, ...]
    on_labels: tuple[float, ...]
    gaps: Mapping[str, float]
    classes: int


def _as_it_is(losses: Tensor) -> Tensor:
    return losses


def teach(
    supernet: Supernet,
    batch: Batch,
    visits: Sequence[Visit],
    *,
    smoothing: float,
    precision: Precision,
    teachers: Teachers | None = None,
    at_most: int | None = None,
    mean: Callable[[Tensor], Tensor] = _as_it_is,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Taught:
    """What the visits found, after the gradients of all were added up in the largest network's parameters.

    Args:
        supernet: whose parameters' gradients grow.
        batch: what all visits see.
        visits: in the order in which they run.
        smoothing: of the labels.
        precision: in which forward passes run.
        teachers: gives the soft labels of teachers outside the supernet.
        at_most: pixels at which archs of a larger resolution run.
        mean: averages losses (K,) over the processes that each teach a part of the batch, so that the same
            rival wins, and the same gap is remembered, in all of them.
        finish: averages what was found (K,) in place of `mean`, when the gradients are complete: they can be
            averaged in the same exchange.

    Raises:
        LessonError: no visits; one learns from an arch not visited before it, or from teachers that are not
            given, or is to be remembered before the largest network was visited.
    """
    lesson = _Lesson(supernet, batch, smoothing, precision, teachers, at_most, mean)
    for visit in visits:
        lesson.visit(visit)
    if not lesson.losses:
        raise LessonError("no subnet is visited")
    # one transfer from the device for all of a step
    found = torch.stack([*lesson.losses, *lesson.on_labels, *(gap for _, gap in lesson.gaps)])
    values: list[float] = (finish or mean)(found).tolist()
    count = len(lesson.losses)
    gaps: dict[str, list[float]] = {}
    for (name, _), value in zip(lesson.gaps, values[2 * count :], strict=True):
        gaps.setdefault(name, []).append(value)
    means = {name: sum(each) / len(each) for name, each in gaps.items()}
    losses, on_labels = tuple(values[:count]), tuple(values[count : 2 * count])
    classes = next(iter(lesson.soft_labels.values())).shape[-1]
    return Taught(tuple(lesson.archs), losses, on_labels, means, classes)


def remember(memory: Mapping[str, float], gaps: Mapping[str, float]) -> dict[str, float]:
    """`memory` with each of `gaps` taken into its moving average, in which a new value weighs a tenth."""
    taken = {name: _MEMORY * memory.get(name, gap) + (1 - _MEMORY) * gap for name, gap in gaps.items()}
    return {**memory, **taken}


class _Lesson:
    """A step under way: the soft labels and losses that later visits refer to."""

    def __init__(
        self,
        supernet: Supernet,
        batch: Batch,
        smoothing: float,
        precision: Precision,
        teachers: Teachers | None,
        at_most: int | None,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self.supernet = supernet
        self.batch = batch
        self.smoothing = smoothing
        self.precision = precision
        self.teachers = teachers
        self.at_most = at_most
        self.mean = mean
        self.from_teachers: Tensor | None = None
        self.soft_labels: dict[Arch, Tensor] = {}
        self.largest_loss: Tensor | None = None
        self.archs: list[Arch] = []
        self.losses: list[Tensor] = []
        self.on_labels: list[Tensor] = []
        self.gaps: list[tuple[str, Tensor]] = []

    def visit(self, visit: Visit) -> None:
        arch = self._winner(visit) if visit.rivals else visit.arch
        learns = visit.weight != 0
        with torch.set_grad_enabled(learns), self.precision.autocast():
            logits = self._logits(arch)
            # one that does not learn from the labels is judged by them all the same
            labels = self._label_loss(logits if visit.labels_weight else logits.detach())
            loss = self._loss(visit, logits, labels)
        # a random subnet may be the teacher itself: its first visit is the one to learn from
        self.soft_labels.setdefault(arch, logits.detach())
        if learns:
            self.precision.backward(loss * visit.weight)
        self.archs.append(arch)
        self.losses.append(loss.detach())
        self.on_labels.append(labels.detach())
        self._note(visit, arch, labels.detach())

    def _winner(self, visit: Visit) -> Arch:
        archs = (visit.arch, *visit.rivals)
        with torch.no_grad(), self.precision.autocast():
            losses = [self._label_loss(self._logits(arch)) for arch in archs]
        found: list[float] = self.mean(torch.stack(losses)).tolist()
        return archs[found.index(min(found) if visit.keeps == "best" else max(found))]

    def _logits(self, arch: Arch) -> Tensor:
        logits: Tensor = self.supernet(self.batch.images, arch, at_most=self.at_most)
        return logits

    def _label_loss(self, logits: Tensor) -> Tensor:
        return label_loss(logits, self.batch.labels, smoothing=self.smoothing)

    def _loss(self, visit: Visit, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of what the visit learns from: soft labels of a subnet, of teachers, labels."""
        terms: list[Tensor] = []
        if visit.learns_from is not None:
            if visit.learns_from not in self.soft_labels:
                raise LessonError(
                    f"{visit.arch.key} learns from {visit.learns_from.key}, which is not visited before it"
                )
            terms.append(_SOFT_LOSSES[visit.divergence](logits, self.soft_labels[visit.learns_from]))
        if visit.teacher:
            terms.append(visit.teacher * soft_target_loss(logits, self._from_teachers(visit)))
        if visit.labels_weight:
            terms.append(labels if visit.labels_weight == 1 else visit.labels_weight * labels)
        if not terms:
            raise LessonError(f"{visit.arch.key} learns from nothing: the weight of its labels is 0")
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def _from_teachers(self, visit: Visit) -> Tensor:
        """The teachers' soft labels of the batch, asked for once a step."""
        if self.from_teachers is None:
            if self.teachers is None:
                raise LessonError(
                    f"{visit.arch.key} learns from teachers outside the supernet, and there are none; "
                    "name them in train.teachers"
                )
            with torch.no_grad(), self.precision.autocast():
                self.from_teachers = self.teachers(self.batch.images)
        return self.from_teachers

    def _note(self, visit: Visit, arch: Arch, labels: Tensor) -> None:
        """Keeps the largest's loss for those after it, and the visit's gap where it is to be remembered."""
        if arch == self.supernet.space.largest and self.largest_loss is None:
            self.largest_loss = labels
        if visit.remembered:
            if self.largest_loss is None:
                raise LessonError(
                    f"{visit.arch.key} is to be remembered as {visit.remembered!r}, but the largest network "
                    "was not visited before it"
                )
            self.gaps.append((visit.remembered, labels - self.largest_loss))
