"""CompiledCall: torch.compile for the archs that return every step, the largest and the smallest.

Compiling a network takes a minute or more, and every arch is another network: the random ones of a step,
which hardly ever return, run as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestling.space import Arch

Call = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]
"""From a network without memory, the tensors lent to it and images (N, 3, H, W), to logits (N, classes)."""

Backend = str | Callable[..., Any]
"""A compiler by its name in `torch.compile`, or one's own."""


def call_lent(network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits (N, classes) of `network` for `images` (N, 3, H, W), with the tensors lent to it."""
    return functional_call(network, dict(lent), (images,), tie_weights=False)  # type: ignore[no-any-return]


def compiled_calls(archs: Iterable[Arch], *, backend: Backend = "inductor") -> dict[Arch, Call]:
    """For each of `archs` its own compiled call, which equals `call_lent` up to rounding."""
    return {arch: CompiledCall(arch, backend=backend) for arch in archs}


class CompiledCall:
    """A compiled `call_lent` for one arch's network; `call_lent` itself where compiling fails.

    It compiles once for every shape of images that it meets, in training (forward and backward) and without
    gradients. The first call of each kind runs once more than it is asked to, forward and backward, so that a
    failure shows here, and not in the backward pass of training. The random state stays as it was, and no
    gradient is added up.

    Rounding differs from that of the plain call, and so do the random numbers of dropout: runs are compared
    and continued with the same choice. On a machine and version of PyTorch they repeat.

    Args:
        arch: of the network, for messages.
        backend: of `torch.compile`.
    """

    def __init__(self, arch: Arch, *, backend: Backend = "inductor") -> None:
        self._arch = arch
        self._compiled: Call | None = torch.compile(call_lent, backend=backend, dynamic=False)
        self._tried: set[Hashable] = set()

    @property
    def is_compiled(self) -> bool:
        """Whether nothing failed so far."""
        return self._compiled is not None

    def __call__(self, network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits (N, classes) of `network` for `images` (N, 3, H, W). Warns once where compiling fails."""
        if self._compiled is not None:
            kind = (
                tuple(images.shape),
                images.dtype,
                torch.is_grad_enabled(),
                network.training,
                _autocast(images),
            )
            if kind not in self._tried:
                self._tried.add(kind)
                self._try(self._compiled, network, lent, images)
        return (self._compiled or call_lent)(network, lent, images)

    def _try(self, compiled: Call, network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> None:
        devices = [images.device] if images.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
                # what is lent is a part of a parameter: the compiler asks for its gradient, and has none
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
                logits = compiled(network, lent, images)
                if logits.requires_grad:
                    learning = [tensor for tensor in lent.values() if tensor.requires_grad]
                    torch.autograd.grad(logits.float().sum(), learning, allow_unused=True)
        except Exception as error:  # compilers fail in many ways: no C++ compiler, an operator, memory
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"arch {self._arch.key} could not be compiled ({type(error).__name__}: {reason}); it runs "
                "without, which is slower and otherwise the same",
                RuntimeWarning,
                stacklevel=4,
            )
            self._compiled = None


def _autocast(images: Tensor) -> torch.dtype | None:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
