"""How weights change: the optimizer, mixed precision."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nestling.config import TrainConfig


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; weight decay spares norms and biases.

    RMSProp has BigNAS's smoothing 0.9 and epsilon 0.0316 (arXiv 2003.11142).
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=0.9, eps=0.0316, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


class Precision:
    """Automatic mixed precision, on any device that is asked for it.

    Args:
        amp: `bf16`, `fp16`, `off`, or `auto`: off but on CUDA, bf16 where the GPU has it, else fp16.
        device: where the network is.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        cuda = device.type == "cuda"
        on = amp in ("bf16", "fp16") or (amp == "auto" and cuda)
        bf16 = on and (amp == "bf16" or (amp == "auto" and torch.cuda.is_bf16_supported()))
        self.kind = device.type
        self.dtype = torch.bfloat16 if bf16 else torch.float16
        self.on = on
        self.scaler = torch.amp.GradScaler(device.type, enabled=on and not bf16)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        return torch.autocast(self.kind, dtype=self.dtype) if self.on else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled as fp16 needs it, to the parameters'."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        """One step of `optimizer`; gradients are then removed.

        No number of a gradient is greater than `clip_value`, and then all together have the norm `clip_norm`
        at most.
        """
        if clip_norm is not None or clip_value is not None:
            self.scaler.unscale_(optimizer)
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, float]:
        """What `load` needs to go on from here."""
        return self.scaler.state_dict()

    def load(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`."""
        if state:
            self.scaler.load_state_dict(dict(state))
