from __future__ import annotations

import math

import pytest
import torch

from nestling.train.losses import label_loss, soft_label_loss


def test_the_label_loss_is_its_closed_form() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    labels = torch.tensor([0, 1])
    smoothing = 0.1
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = math.log(sum(math.exp(x) for x in row))
        target = [smoothing / 3 + (1 - smoothing) * (i == label) for i in range(3)]
        expected -= sum(t * (x - total) for t, x in zip(target, row, strict=True)) / 2
    assert float(label_loss(logits, labels, smoothing=smoothing)) == pytest.approx(expected, rel=1e-6)


def test_the_soft_label_loss_is_its_closed_form() -> None:
    student, teacher = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    expected = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert float(soft_label_loss(student, teacher)) == pytest.approx(float(expected), rel=1e-6)


def test_the_soft_label_loss_is_least_where_student_and_teacher_agree() -> None:
    teacher = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    student = teacher.clone().requires_grad_()
    torch.autograd.backward(soft_label_loss(student, teacher))
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


def test_a_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    torch.autograd.backward(soft_label_loss(student, teacher))
    assert student.grad is not None
    assert teacher.grad is None


def test_losses_of_half_precision_logits_are_computed_in_full() -> None:
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert label_loss(logits, torch.tensor([1]), smoothing=0.0).dtype == torch.float32
    assert float(label_loss(logits, torch.tensor([1]), smoothing=0.0)) == pytest.approx(120000, rel=1e-3)
    assert soft_label_loss(logits, logits).dtype == torch.float32
