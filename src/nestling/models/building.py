"""Shapes without numbers: a network on the meta device, with the work of its initialisers left out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm.models.efficientnet
import timm.models.mobilenetv3
import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from nestling.space import Arch

Build = Callable[[Arch], nn.Module]

_FILLS = frozenset(
    {
        nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_,
        *(
            getattr(Tensor, name)
            for name in (
                "add_", "bernoulli_", "clamp_", "clamp_min_", "copy_", "div_", "erfinv_", "exponential_",
                "fill_", "log_normal_", "mul_", "normal_", "random_", "sub_", "uniform_", "zero_",
            )
        ),
    }
)  # fmt: skip
"""What initialisers do to a parameter, in place: other numbers, the same shape."""
_FILLED = frozenset({torch.ones, torch.rand, torch.randn, torch.zeros})
"""What makes the same tensor as `torch.empty`, but for its numbers."""
_INITIALISERS = (
    *(
        (layer, "reset_parameters")
        for layer in (
            nn.Linear,
            nn.modules.conv._ConvNd,
            nn.modules.batchnorm._NormBase,
            nn.LayerNorm,
            nn.GroupNorm,
        )
    ),
    (timm.models.efficientnet, "efficientnet_init_weights"),
    (timm.models.mobilenetv3, "efficientnet_init_weights"),
)
"""Those that most networks run, left out whole: a third of the time that a MobileNet takes to build."""
_lock = threading.RLock()


def build_shapes(build: Build, arch: Arch) -> nn.Module:
    """`build(arch)` on the meta device: every module and shape, no memory, no initialisation.

    A constructor that reads numbers out of its tensors (`.item()`, `.tolist()`, `.numpy()`) cannot run
    there: its network is built on the CPU, its parameters uninitialised, and its memory given back.

    Raises:
        TypeError: what `build` returns is no network.
    """
    try:
        with _initialisers_skipped("meta"):
            network = build(arch)
    except (RuntimeError, TypeError):  # what reading a tensor without numbers raises
        network = _on_cpu(build, arch)
    if not isinstance(network, nn.Module):
        raise TypeError(f"build returned {network!r}; it must return an nn.Module")
    _give_memory_back(network)
    return network


def own_tables(build: Build, arch: Arch, network: nn.Module) -> dict[str, Tensor]:
    """The buffers of `network`, an arch's, that are not weights, with the numbers that its constructor gives.

    Those are the buffers that are not kept in its state: tables of indices and the like, which follow from
    the arch alone. They are on the CPU.
    """
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if module._non_persistent_buffers_set
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None
    ]
    if not names:
        return {}
    tables = dict(_on_cpu(build, arch).named_buffers(remove_duplicate=False))
    return {name: tables[name] for name in names}


def _on_cpu(build: Build, arch: Arch) -> nn.Module:
    """`build(arch)` with its tables, its parameters uninitialised; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]), _initialisers_skipped("cpu"):
        return build(arch)


@contextmanager
def _initialisers_skipped(device: str) -> Iterator[None]:
    with _lock, ExitStack() as patches:
        for owner, name in _INITIALISERS:
            patches.enter_context(_skipped_here(owner, name))
        patches.enter_context(_Uninitialised(device))
        yield


def _skipped_here(owner: Any, name: str) -> mock._patch[Any]:
    initialise = vars(owner)[name]
    here = threading.get_ident()

    # another thread may build a network with memory meanwhile: that one is initialised as ever
    def initialise_elsewhere(*args: object, **kwargs: object) -> None:
        if threading.get_ident() != here:
            initialise(*args, **kwargs)

    return mock.patch.object(owner, name, initialise_elsewhere)


class _Uninitialised(DeviceContext):
    """New tensors are on a device, and parameters keep the numbers they were made with: nothing fills them.

    A mode rules the thread that entered it alone, and every function however it was imported. Tensors that
    are no parameters are filled: tables of indices are made that way.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS:
            filled = args[0] if args else (kwargs or {})["tensor"]
            if isinstance(filled, nn.Parameter):
                return filled
        if func in _FILLED and self.device.type == "meta":
            func = torch.empty  # the others are many times slower there
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _give_memory_back(network: nn.Module) -> None:
    """Moves `network` to the meta device in place; a tensor that two layers share stays one."""
    moved: dict[int, Tensor] = {}
    kept_alive: list[Tensor] = []  # or the identity of one that was replaced could be another's
    for module in network.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    kept_alive.append(tensor)
                    shape = torch.empty_like(tensor, device="meta", requires_grad=False)
                    moved[id(tensor)] = (
                        nn.Parameter(shape, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else shape
                    )
                tensors[name] = moved[id(tensor)]
