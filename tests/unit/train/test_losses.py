from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestling.train.losses import alpha_divergence_loss, label_loss, soft_label_loss, soft_target_loss


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


def test_the_loss_against_given_probabilities_is_its_closed_form() -> None:
    logits, given = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    expected = -(given * logits.log_softmax(1)).sum(1).mean()
    assert float(soft_target_loss(logits, given)) == pytest.approx(float(expected), rel=1e-6)


def divergence(q: Tensor, p: Tensor, alpha: float) -> Tensor:
    """The alpha-divergence of each row by its definition, without a cut."""
    ratio = p / q
    f = ratio * ratio.log() if alpha == 1 else (ratio**alpha - 1) / (alpha * (alpha - 1))
    return (q * f).sum(1)


def softened(seed: int, *, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(6, 5, generator=generator) * scale for _ in range(2))
    return logits.requires_grad_(), teacher


def test_the_alpha_divergence_is_the_greater_of_two_by_their_definition() -> None:
    logits, teacher = softened(0, scale=0.4)  # no ratio near the cut
    q, p = logits.softmax(1), teacher.softmax(1)
    sure, unsure = divergence(q, p, -1.0), divergence(q, p, 1.0)
    assert bool((sure > unsure).any())
    assert bool((sure < unsure).any())
    expected = torch.maximum(sure, unsure).mean()
    loss = alpha_divergence_loss(logits, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_gradient_of_the_alpha_divergence_is_cut_where_the_student_is_far_too_sure() -> None:
    # one image, two classes; the student holds for likely what the teacher does not
    teacher = torch.tensor([[0.88, 0.12]]).log()
    logits = torch.tensor([[0.1, 0.9]]).log().requires_grad_()
    q, p = logits.detach().softmax(1)[0].tolist(), teacher.softmax(1)[0].tolist()
    assert q[1] / p[1] > 5
    (found,) = torch.autograd.grad(alpha_divergence_loss(logits, teacher), logits)
    # -sum q rho grad(log q), rho = -min(q / p, 5) + 1/2; d log q_i / d z_j = [i = j] - q_j
    rho = [-min(a / b, 5.0) + 0.5 for a, b in zip(q, p, strict=True)]
    expected = [-sum(q[i] * rho[i] * ((i == j) - q[j]) for i in range(2)) for j in range(2)]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_where_the_teacher_knows_better_the_alpha_divergence_pulls_as_soft_labels_do() -> None:
    # one class of ten is likely for the teacher, all are alike for the student
    teacher, logits = torch.tensor([[2.4] + [0.0] * 9]), torch.zeros(1, 10, requires_grad=True)
    q, p = logits.softmax(1), teacher.softmax(1)
    assert bool(divergence(q, p, -1.0) < divergence(q, p, 1.0))
    (found,) = torch.autograd.grad(alpha_divergence_loss(logits, teacher), logits)
    (wanted,) = torch.autograd.grad(soft_label_loss(logits, teacher), logits)
    assert torch.allclose(found, wanted, atol=1e-7)


def test_the_alpha_divergence_is_0_and_pulls_nowhere_where_both_agree() -> None:
    logits = softened(1, scale=3.0)[0]
    loss = alpha_divergence_loss(logits, logits)
    (found,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(found.abs().max()) < 1e-6


def test_the_alpha_divergence_of_logits_far_apart_is_a_number() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = alpha_divergence_loss(logits, -logits.detach())
    (found,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite())
    assert bool(found.isfinite().all())
