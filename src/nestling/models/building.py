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
from torch import nn

from nestling.space import Arch

Build = Callable[[Arch], nn.Module]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_lock = threading.RLock()


def build_shapes(build: Build, arch: Arch) -> nn.Module:
    """`build(arch)` on the meta device: every module and shape, no memory, no initialisation.

    Filling tensors that have no memory is most of the time it takes to build a network; it is left out.
    """
    with _initialisers_skipped(), torch.device("meta"):
        return build(arch)


@contextmanager
def _initialisers_skipped() -> Iterator[None]:
    with _lock, ExitStack() as patches:
        for layer in _LAYERS:
            patches.enter_context(_skipped_here(layer, "reset_parameters"))
        for module in (timm.models.efficientnet, timm.models.mobilenetv3):
            patches.enter_context(_skipped_here(module, "efficientnet_init_weights"))
        yield


def _skipped_here(owner: Any, name: str) -> mock._patch[Any]:
    initialise = vars(owner)[name]
    here = threading.get_ident()

    # another thread may build a network with memory meanwhile: that one is initialised as ever
    def initialise_elsewhere(*args: object, **kwargs: object) -> None:
        if threading.get_ident() != here:
            initialise(*args, **kwargs)

    return mock.patch.object(owner, name, initialise_elsewhere)
