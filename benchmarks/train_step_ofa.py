"""Once-for-all's own elastic MobileNetV3 in training, as a process that is told what to do.

Runs where the package `ofa` is installed; see `train_step_peer.py`, which starts it and speaks with it. A
line of JSON comes in, and one goes out when it is done:

- `{}`: nothing but the answer.
- `{"load": FILE, "threads": 2, "classes": 1000, "cropped": false, "optimizer": {...}, "smoothing": 0.1}`: a
  file of `torch.save` with `images`, `labels` and `weights`, the parameters in the order in which OFA's
  network has them. The network begins with these weights. `cropped`: without the matrices that turn a large
  kernel into a small one.
- `{"logits": SETTING, "to": FILE}`: writes the subnet's logits for the images.
- `{"step": [SETTING, ...]}`: a training step, its seconds and losses.

A SETTING is `{"ks": [...], "e": [...], "d": [...]}`, what `set_active_subnet` takes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# torch 2 has no such module; nothing but the package's data loader, which is not used here, reads it
sys.modules["torch._six"] = types.ModuleType("torch._six")
vars(sys.modules["torch._six"])["string_classes"] = str
warnings.simplefilter("ignore")

from ofa.imagenet_classification.elastic_nn.modules import dynamic_op  # type: ignore # noqa: E402
from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3  # type: ignore # noqa: E402
from ofa.utils import (  # type: ignore # noqa: E402
    cross_entropy_loss_with_soft_target,
    cross_entropy_with_label_smoothing,
)

Setting = dict[str, list[int]]


class Trained:
    """OFA's network, its optimizer and a batch, as a message describes them."""

    def __init__(self, told: dict[str, Any]) -> None:
        torch.set_num_threads(told["threads"])
        dynamic_op.DynamicSeparableConv2d.KERNEL_TRANSFORM_MODE = None if told["cropped"] else 1
        given = torch.load(told["load"], weights_only=True)
        self.images, self.labels = given["images"], given["labels"]
        self.smoothing = told["smoothing"]
        self.network = OFAMobileNetV3(
            n_classes=told["classes"],
            dropout_rate=0,  # the other side has none
            ks_list=[3, 5, 7],
            expand_ratio_list=[3, 4, 6],
            depth_list=[2, 3, 4],
        ).train()
        own = [p for name, p in self.network.named_parameters() if not name.endswith("_matrix")]
        with torch.no_grad():
            for parameter, weight in zip(own, given["weights"], strict=True):
                if parameter.shape != weight.shape:
                    raise ValueError(f"a weight {tuple(weight.shape)} for one {tuple(parameter.shape)}")
                parameter.copy_(weight)
        self.optimizer = optimizer_of(self.network, **told["optimizer"])

    def answer(self, told: dict[str, Any]) -> dict[str, Any]:
        """What is to be said when that is done which was told."""
        if "logits" in told:
            with torch.no_grad():
                torch.save(self.logits(told["logits"]), told["to"])
            return {}
        gc.collect()  # or one step would pay for what another has left
        began = time.perf_counter()
        losses = self.step(told["step"])
        return {"seconds": time.perf_counter() - began, "losses": losses}

    def logits(self, setting: Setting) -> Tensor:
        """Logits (N, classes) of one subnet."""
        self.network.set_active_subnet(**setting)
        found: Tensor = self.network(self.images)
        return found

    def step(self, settings: Sequence[Setting]) -> list[float]:
        """The losses of a training step: the first subnet learns from labels, the others from it."""
        first, *others = settings
        self.network.zero_grad()
        logits = self.logits(first)
        soft_labels = logits.detach().softmax(dim=1)
        losses = [cross_entropy_with_label_smoothing(logits, self.labels, self.smoothing)]
        losses[0].backward()
        for setting in others:
            losses.append(cross_entropy_loss_with_soft_target(self.logits(setting), soft_labels))
            losses[-1].backward()
        self.optimizer.step()
        return [loss.item() for loss in losses]


def optimizer_of(
    network: nn.Module, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum; weight decay spares norms and biases."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True)


def obey() -> None:
    """Does what the lines on stdin say until they end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints is no answer
    trained: Trained | None = None
    for line in sys.stdin:
        told = json.loads(line)
        answer: dict[str, Any] = {}
        if "load" in told:
            trained = None  # its memory, before another's
            trained = Trained(told)
        elif told:
            if trained is None:
                raise ValueError(f"nothing is loaded yet, for {sorted(told)}")
            answer = trained.answer(told)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    obey()
