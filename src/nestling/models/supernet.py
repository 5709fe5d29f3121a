"""Supernet: the largest network, and how every smaller one runs on its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from nestling.models.building import Build, build_shapes, own_tables
from nestling.models.compiling import Call, call_lent
from nestling.models.convolutions import compute_by_products
from nestling.models.kernels import compute_touching_part
from nestling.models.layouts import FindLayout, find_layout
from nestling.models.lending import Cuts, lend, lend_buffers, plan_cuts
from nestling.space import Arch, SearchSpace

CACHED_SHAPES = 256


@dataclass(frozen=True, slots=True)
class _Borrower:
    """A network without memory, and its tensors by name, so that they are not looked up for every batch."""

    network: nn.Module
    parameters: Mapping[str, Tensor]
    cuts: Cuts
    tables: Mapping[str, Tensor]
    has_buffers: bool
    call: Call


class Supernet(nn.Module):
    """The weights of the largest network of `space`, lent to any network of the space.

    Its `state_dict` is the largest network's own (under `largest.`): weights of the plain network load as
    they are. Which subnet runs is an argument; nothing remembers it.

    Args:
        space: the archs that can be run.
        build: makes the plain network of an arch.
        layout: how the axes of an arch's network are made of parts.
        largest: the network that lends, with its weights, such as a pretrained one, in place of a new
            `build(space.largest)`; it is kept, not copied.
        dropout: probability before the classifier, for the largest network in training only.
        drop_path: probability with which the last residual branch is dropped (earlier ones less, linearly:
            Huang et al. 2016, arXiv 1603.09382), for the largest network in training only.
        calling: how the network of an arch is called in place of `call_lent`, where it is not None, such as
            with its tensors rounded; asked once for every arch in the cache.

    Raises:
        ValueError: dropout or drop_path is asked for, and the network has no place for it; or `largest` has
            other tensors than the space's largest network.
    """

    def __init__(
        self,
        space: SearchSpace,
        build: Build,
        *,
        layout: FindLayout = find_layout,
        largest: nn.Module | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        calling: Callable[[Arch], Call | None] | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.build = build
        self.layout = layout
        self.dropout = dropout
        self.drop_path = drop_path
        self.calling = calling
        if largest is not None:
            _check_shapes(largest, build_shapes(build, space.largest))
        network = build(space.largest) if largest is None else largest
        self.largest = network.to(memory_format=torch.channels_last)
        self._largest_arch = space.largest
        self._layout_of_largest = layout(self.largest, space.largest)
        self._borrowers: OrderedDict[tuple[Arch, bool], _Borrower] = OrderedDict()
        self.calls: dict[Arch, Call] = {}
        self._borrower(self._largest_arch, is_largest=True)

    def forward(self, images: Tensor, arch: Arch, *, at_most: int | None = None) -> Tensor:
        """Logits (N, classes) of the subnet `arch` for `images` (N, 3, H, W), with lent weights.

        Images are resized to the arch's `resolution` where it has one; with `at_most`, an arch of a larger
        resolution runs at that many pixels. `self.calls` holds, for some archs, another way to call their
        networks than `call_lent`, such as a compiled one. Batch normalization uses the batch's own
        statistics, in training and otherwise: a subnet's own statistics come from `materialize` followed by
        recalibration.

        Raises:
            LendingError: the arch's network does not fit into the largest one.
        """
        at = capped(arch, at_most)
        borrower = self._borrower(at, is_largest=arch == self._largest_arch)
        lent = lend(_parameters(self.largest), borrower.parameters, cuts=borrower.cuts)
        if borrower.has_buffers:
            lent |= lend_buffers(_buffers(self.largest), borrower.network, cuts=borrower.cuts)
            lent |= {name: table.to(images.device) for name, table in borrower.tables.items()}
        call = self.calls.get(arch, borrower.call)
        return call(borrower.network, lent, at_resolution(images, at))

    def materialize(self, arch: Arch) -> nn.Module:
        """The plain network of `arch` with its own copy of the weights, in evaluation mode.

        It computes what `forward` computes with lent weights: to the last bit, or up to rounding where
        gradients are asked for on a CPU (see `nestling.models.convolutions`). Its running statistics are cut
        from the largest network's: recalibrate before use.

        Raises:
            LendingError: the arch's network does not fit into the largest one.
        """
        network = build_shapes(self.build, arch)
        large, shapes = _parameters(self.largest), _parameters(network)
        cuts = self._cuts(network, arch)
        lent = lend(large, shapes, cuts=cuts) | lend_buffers(_buffers(self.largest), network, cuts=cuts)
        lent |= self._tables(network, arch)
        # by identity: a tensor that two layers share stays one
        copies: dict[int, Tensor] = {}
        for name, shape in shapes.items():
            if id(shape) not in copies:
                copies[id(shape)] = nn.Parameter(_copy(lent[name]), requires_grad=shape.requires_grad)
        place = next((tensor.device for tensor in large.values()), torch.device("cpu"))
        copies |= {id(shape): _copy(lent[name].to(place)) for name, shape in _buffers(network).items()}
        for module in network.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                tensors |= {name: copies[id(shape)] for name, shape in tensors.items() if shape is not None}
        return network.eval()

    def _borrower(self, arch: Arch, *, is_largest: bool) -> _Borrower:
        # the largest at a lower resolution is still the one that dropout is for; one drawn there is not
        key = (arch, is_largest)
        borrower = self._borrowers.get(key)
        if borrower is None:
            network = build_shapes(self.build, arch)
            cuts, tables = self._cuts(network, arch), self._tables(network, arch)
            _forget_statistics(network)
            compute_touching_part(network)
            compute_by_products(network)
            if is_largest:
                regularize(network, dropout=self.dropout, drop_path=self.drop_path)
            call = None if self.calling is None else self.calling(arch)
            borrower = _Borrower(
                network,
                _parameters(network),
                cuts,
                tables,
                has_buffers=bool(list(network.buffers())),
                call=call or call_lent,
            )
            self._borrowers[key] = borrower
            if len(self._borrowers) > CACHED_SHAPES:
                self._borrowers.popitem(last=False)
        self._borrowers.move_to_end(key)
        if borrower.network.training != self.training:
            borrower.network.train(self.training)
        return borrower

    def _cuts(self, network: nn.Module, arch: Arch) -> Cuts:
        layouts = (self._layout_of_largest, self.layout(network, arch))
        if not any(layouts):
            return {}
        large = _parameters(self.largest) | _buffers(self.largest)
        return plan_cuts(large, _parameters(network) | _buffers(network), layouts=layouts)

    def _tables(self, network: nn.Module, arch: Arch) -> Mapping[str, Tensor]:
        """The buffers that are not weights; those of a largest network that was given are its own."""
        if arch == self._largest_arch:
            kept = network.state_dict().keys()
            return {name: table for name, table in _buffers(self.largest).items() if name not in kept}
        return own_tables(self.build, arch, network)


def capped(arch: Arch, at_most: int | None) -> Arch:
    """`arch` with a `resolution` of `at_most` pixels where it has a larger one; None: as it is."""
    if at_most is None or "resolution" not in arch or arch.integer("resolution") <= at_most:
        return arch
    return Arch(tuple((name, at_most if name == "resolution" else v) for name, v in arch.decisions))


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
        places = [m for name, m in network.named_modules() if name in _HEAD_DROPOUTS]
        layers = [m for m in places if isinstance(m, nn.Dropout)]
        for layer in layers:
            layer.p = dropout
        if not layers:
            if not isinstance(vars(network).get("drop_rate"), float | int):
                raise ValueError(
                    f"dropout is {dropout}, but {type(network).__name__} has no place for it; set it to 0"
                )
            vars(network)["drop_rate"] = dropout
    if drop_path > 0:
        blocks = [(m, held) for m in network.modules() if (held := _drop_paths(m))]
        if not blocks:
            raise ValueError(f"drop_path is {drop_path}, but {type(network).__name__} has none; set it to 0")
        for index, (block, held) in enumerate(blocks):
            for name in held:
                setattr(block, name, DropPath(drop_path * index / max(len(blocks) - 1, 1)))


_HEAD_DROPOUTS = ("head_drop", "head.drop")
"""timm's names of a dropout layer before the classifier; other networks read `drop_rate`."""


def _drop_paths(block: nn.Module) -> list[str]:
    """The names of `block`'s residual branches' stochastic depth; timm's ResNets hold None for none."""
    names = ("drop_path", "drop_path1", "drop_path2")
    held = vars(block) | block._modules
    return [name for name in names if name in held and (held[name] is None or name in block._modules)]


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    """By one name for each place that holds one: of a parameter that two layers share, two names."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in network.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in network.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def _check_shapes(given: nn.Module, built: nn.Module) -> None:
    """Refuses a given network that is not what the space's largest arch builds."""
    given_shapes = {name: tuple(t.shape) for name, t in given.state_dict(keep_vars=True).items()}
    built_shapes = {name: tuple(t.shape) for name, t in built.state_dict(keep_vars=True).items()}
    wrong = [
        f"{name} is {given_shapes.get(name, 'missing')}, not {built_shapes.get(name, 'there')}"
        for name in (given_shapes | built_shapes)
        if given_shapes.get(name) != built_shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            "the network given as the largest is not the one that the space's largest arch builds: "
            f"{'; '.join(wrong[:3])}{more}"
        )


def _copy(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().clone(memory_format=layout)


def _forget_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
