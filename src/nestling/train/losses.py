"""Losses of logits: against labels, and against another network's soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA_CLIP = 5.0


def label_loss(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy, a scalar, of logits (N, classes) against labels (N,) smoothed by `smoothing`.

    Szegedy et al. 2016, arXiv 1512.00567.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def soft_label_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy, a scalar, of logits (N, classes) against the softmax of `teacher_logits`.

    At temperature 1: the only loss of a subnet in in-place distillation (BigNAS, Yu et al. 2020,
    arXiv 2003.11142). `teacher_logits` get no gradient.
    """
    target = teacher_logits.detach().float().softmax(dim=1)
    return F.cross_entropy(logits.float(), target)


def soft_target_loss(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy, a scalar, of logits (N, classes) against `probabilities` (N, classes), such as the mean
    of several teachers' (MEAL V2, Shen & Savvides 2020, arXiv 2009.08453).
    """
    return F.cross_entropy(logits.float(), probabilities.detach().float())


def alpha_divergence_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The adaptive alpha-divergence, a scalar, of logits (N, classes) from the softmax of `teacher_logits`.

    With the teacher's p, the student's q and f(w) = (w^a - 1) / (a (a - 1)), the divergence is the sum of
    q f(p / q). For each image it is taken for a = -1, which punishes a student that is sure where the teacher
    is not, and for a = 1 (the Kullback-Leibler divergence, which punishes the reverse); the greater one
    counts. For a = -1 the power w^a, which has no bound, is cut at 5. The gradient is that of the divergence
    but for the cut: it flows through log q alone (AlphaNet, Wang et al. 2021, arXiv 2102.07954, where each
    gradient is clipped at 1.0 besides). `teacher_logits` get no gradient.
    """
    log_p = teacher_logits.detach().float().log_softmax(dim=1)
    log_q = logits.float().log_softmax(dim=1)
    fixed = log_q.detach()
    p, q = log_p.exp(), fixed.exp()
    inverse = (fixed - log_p).exp().clamp(max=ALPHA_CLIP)  # w^-1 = q / p
    sure = (q * (inverse - 1)).sum(dim=1) / 2
    unsure = (p * (log_p - fixed)).sum(dim=1)
    # q (w f'(w) - f(w)) stands before the gradient of log q; a constant times q would pull nowhere
    pull = torch.where((sure > unsure).unsqueeze(1), -q * inverse, p)
    through_log_q = -(pull * log_q).sum(dim=1)
    value = torch.maximum(sure, unsure)
    return (value + through_log_q - through_log_q.detach()).mean()
