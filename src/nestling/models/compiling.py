"""CompiledCall: torch.compile for the archs that return every step, the largest and the smallest.

Compiling a network takes a minute or more, and every arch is another network: the random ones of a step,
which hardly ever return, run as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import FunctionType
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
    gradients; each time a function of its own, as torch compiles one function for 8 different uses at most,
    and runs further ones uncompiled. The first call of each kind runs once more than it is asked to, forward
    and backward, so that a failure shows here, and not in the backward pass of training. The random state
    stays as it was, and no gradient is added up.

    Rounding differs from that of the plain call, and so do the random numbers of dropout: runs are compared
    and continued with the same choice. On a machine and version of PyTorch they repeat.

    Args:
        arch: of the network, for messages.
        backend: of `torch.compile`.
    """

    def __init__(self, arch: Arch, *, backend: Backend = "inductor") -> None:
        self._arch = arch
        self._backend = backend
        self._compiled: dict[Hashable, Call] = {}
        self._failed = False

    @property
    def is_compiled(self) -> bool:
        """Whether nothing failed so far."""
        return not self._failed

    def __call__(self, network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits (N, classes) of `network` for `images` (N, 3, H, W). Warns once where compiling fails."""
        if self._failed:
            return call_lent(network, lent, images)
        kind = (
            tuple(images.shape),
            images.dtype,
            torch.is_grad_enabled(),
            network.training,
            _autocast(images),
        )
        if kind not in self._compiled:
            compiled: Call = torch.compile(_fresh(call_lent), backend=self._backend, dynamic=False)
            self._compiled[kind] = compiled
            self._try(compiled, network, lent, images)
        return (call_lent if self._failed else self._compiled[kind])(network, lent, images)

    def _try(self, compiled: Call, network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> None:
        devices = [images.device] if images.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), _no_silent_limit():
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
            self._failed = True
            self._compiled.clear()


def _fresh(function: Call) -> Call:
    """`function` as another function, with code of its own: the compiler keeps what it made by code."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _no_silent_limit() -> AbstractContextManager[object]:
    """Within it, what the compiler would run uncompiled for its limit's sake is an error."""
    import torch._dynamo.config as settings  # takes seconds, and is needed for compiling alone

    patched: AbstractContextManager[object] = settings.patch(fail_on_recompile_limit_hit=True)
    return patched


def _autocast(images: Tensor) -> torch.dtype | None:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
