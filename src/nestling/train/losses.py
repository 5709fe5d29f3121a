"""Losses of logits: against labels, and against another network's soft labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
