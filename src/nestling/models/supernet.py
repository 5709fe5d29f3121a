"""Supernet: the largest network, and how every smaller one runs on its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.func import functional_call

from nestling.models.building import Build, build_shapes
from nestling.models.kernels import compute_touching_part
from nestling.models.lending import lend, lend_buffers
from nestling.space import Arch, SearchSpace

CACHED_SHAPES = 256


@dataclass(frozen=True, slots=True)
class _Borrower:
    """A network without memory, and its tensors by name, so that they are not looked up for every batch."""

    network: nn.Module
    parameters: Mapping[str, Tensor]
    has_buffers: bool


class Supernet(nn.Module):
    """The weights of the largest network of `space`, lent to any network of the space.

    Its `state_dict` is the largest network's own (under `largest.`): weights of the plain network load as
    they are. Which subnet runs is an argument; nothing remembers it.

    Args:
        space: the archs that can be run.
        build: makes the plain network of an arch.
        dropout: probability before the classifier, for the largest network in training only.
        drop_path: probability with which the last residual branch is dropped (earlier ones less, linearly:
            Huang et al. 2016, arXiv 1603.09382), for the largest network in training only.

    Raises:
        ValueError: dropout or drop_path is asked for, and the network has no place for it.
    """

    def __init__(
        self, space: SearchSpace, build: Build, *, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.space = space
        self.build = build
        self.dropout = dropout
        self.drop_path = drop_path
        self.largest = build(space.largest).to(memory_format=torch.channels_last)
        self._largest_arch = space.largest
        self._borrowers: OrderedDict[Arch, _Borrower] = OrderedDict()
        self._borrower(self._largest_arch)

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        """Logits (N, classes) of the subnet `arch` for `images` (N, 3, H, W), with lent weights.

        Images are resized to the arch's `resolution` where it has one. Batch normalization uses the batch's
        own statistics, in training and otherwise: a subnet's own statistics come from `materialize` followed
        by recalibration.

        Raises:
            LendingError: the arch's network does not fit into the largest one.
        """
        borrower = self._borrower(arch)
        lent = lend(_parameters(self.largest), borrower.parameters)
        if borrower.has_buffers:
            lent |= lend_buffers(dict(self.largest.named_buffers()), borrower.network)
        images = at_resolution(images, arch)
        return functional_call(borrower.network, lent, (images,), tie_weights=False)  # type: ignore[no-any-return]

    def materialize(self, arch: Arch) -> nn.Module:
        """The plain network of `arch` with its own copy of the weights, in evaluation mode.

        It computes what `forward` computes with lent weights, to the last bit. Its running statistics are cut
        from the largest network's: recalibrate before use.

        Raises:
            LendingError: the arch's network does not fit into the largest one.
        """
        network = build_shapes(self.build, arch)
        lent = lend(_parameters(self.largest), dict(network.named_parameters()))
        lent |= lend_buffers(dict(self.largest.named_buffers()), network)
        # by identity: a tensor that two layers share stays one
        copies: dict[int, Tensor] = {
            id(shape): nn.Parameter(_copy(lent[name]), requires_grad=shape.requires_grad)
            for name, shape in network.named_parameters()
        }
        copies |= {id(shape): _copy(lent[name]) for name, shape in network.named_buffers()}
        for module in network.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                tensors |= {name: copies[id(shape)] for name, shape in tensors.items() if shape is not None}
        return network.eval()

    def _borrower(self, arch: Arch) -> _Borrower:
        borrower = self._borrowers.get(arch)
        if borrower is None:
            network = build_shapes(self.build, arch)
            _forget_statistics(network)
            compute_touching_part(network)
            if arch == self._largest_arch:
                regularize(network, dropout=self.dropout, drop_path=self.drop_path)
            borrower = _Borrower(network, _parameters(network), bool(list(network.buffers())))
            self._borrowers[arch] = borrower
            if len(self._borrowers) > CACHED_SHAPES:
                self._borrowers.popitem(last=False)
        self._borrowers.move_to_end(arch)
        if borrower.network.training != self.training:
            borrower.network.train(self.training)
        return borrower


def at_resolution(images: Tensor, arch: Arch) -> Tensor:
    """`images` (N, 3, H, W) resized to the arch's `resolution` (bicubic, antialiased), channels last."""
    if "resolution" in arch:
        side = arch.integer("resolution")
        if tuple(images.shape[-2:]) != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


def regularize(network: nn.Module, *, dropout: float, drop_path: float) -> None:
    """Gives a timm network dropout before its classifier and stochastic depth, in place.

    Raises:
        ValueError: the network has no place for one of them.
    """
    if dropout > 0:
        if not isinstance(vars(network).get("drop_rate"), float | int):
            raise ValueError(
                f"dropout is {dropout}, but {type(network).__name__} has no drop_rate; set it to 0"
            )
        vars(network)["drop_rate"] = dropout
    if drop_path > 0:
        blocks = [m for m in network.modules() if isinstance(m._modules.get("drop_path"), nn.Module)]
        if not blocks:
            raise ValueError(f"drop_path is {drop_path}, but {type(network).__name__} has none; set it to 0")
        for index, block in enumerate(blocks):
            block.drop_path = DropPath(drop_path * index / max(len(blocks) - 1, 1))


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    """By every name: a parameter that two layers share has two."""
    return dict(network.named_parameters(remove_duplicate=False))


def _copy(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().clone(memory_format=layout)


def _forget_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
