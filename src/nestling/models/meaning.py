"""Whether a lent part means in the smaller network what it means in the large one.

Leading channels are the wrong ones where a layer reads several maps side by side (DenseNet), or in groups
whose size changes: the tensors fit all the same, and the smaller network computes with weights that were
trained for other channels. It shows when everything that is not lent is silenced: the large network then has
to compute what the smaller one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from nestling.models.building import Build, build_shapes, own_tables
from nestling.models.layouts import FindLayout, find_layout
from nestling.models.lending import Resampled, lend, lend_buffers, plan_cuts
from nestling.space import Arch, SearchSpace

ALIKE = 1e-6
"""The largest difference, as a fraction of the logits, between two ways to compute the same in 64 bits."""


class Meaning:
    """The large network of a space, with weights that hide nothing, to try smaller ones against.

    Args:
        build: makes the plain network of an arch.
        layout: how the axes of an arch's network are made of parts.
        largest: the arch that lends; it has a `resolution`.
    """

    def __init__(self, build: Build, *, layout: FindLayout, largest: Arch) -> None:
        self.build, self.layout, self.arch = build, layout, largest
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = stirred(build(largest))
            side = largest.integer("resolution")
            self.images = torch.randn(1, 3, side, side, dtype=torch.float64)

    @torch.no_grad()
    def difference(self, arch: Arch) -> float | None:
        """How far `arch`'s network is from the large one with all else silenced, as a fraction of the logits.

        Norms over channels and the scale of attention, which depend on how many channels there are, are left
        out of both. None where that cannot be told: the network lacks layers, reads other images, or
        interpolates a table; or its numbers grow beyond all bounds.
        """
        network = build_shapes(self.build, arch).eval()
        large, shapes = _places(self.network, "_parameters"), _places(network, "_parameters")
        if large.keys() != shapes.keys() or arch.get("resolution") != self.arch.get("resolution"):
            return None
        held = _places(self.network, "_buffers")
        layouts = (self.layout(self.network, self.arch), self.layout(network, arch))
        cuts = plan_cuts(large | held, shapes | _places(network, "_buffers"), layouts=layouts)
        if any(isinstance(how, Resampled) for by_axis in cuts.values() for how in by_axis.values()):
            return None
        lent: dict[str, Tensor] = lend(large, shapes, cuts=cuts)
        lent |= lend_buffers(held, network, cuts=cuts)
        tables = own_tables(self.build, arch, network)
        lent |= {n: t.double() if t.is_floating_point() else t for n, t in tables.items()}
        silenced = {name: _silenced(tensor, shapes, cuts, name) for name, tensor in large.items()}
        _share_scales(self.network, network)
        with _WithoutCounting():
            alone = functional_call(network, lent, (self.images,), tie_weights=False)
            among = functional_call(self.network, silenced, (self.images,), tie_weights=False)
        gap = float((alone - among).abs().max() / among.abs().max().clamp_min(1e-300))
        return gap if gap == gap and gap != float("inf") else None


def complaints(space: SearchSpace, build: Build, *, layout: FindLayout = find_layout) -> list[str]:
    """What `space` lends that means something else in a smaller network, a sentence for each choice.

    Each open choice is tried at its first value, all others at their last.

    Raises:
        KeyError: the space has no `resolution`.
        LendingError: a network does not fit into the largest one.
    """
    meaning = Meaning(build, layout=layout, largest=space.largest)
    told = []
    for choice in space.open_choices:
        if choice.name == "resolution" or choice.name.rpartition(".")[2] == "precision":
            continue
        gap = meaning.difference(space.canonical({**space.largest, choice.name: choice.values[0]}))
        if gap is not None and gap > ALIKE:
            told.append(
                f"{choice.name} = {choice.values[0]!r} lends what means something else in the smaller "
                f"network: {OTHERWISE.format(gap)}"
            )
    return told


OTHERWISE = (
    "with all else silenced the largest network gives other logits (by {:.0e} of them), as where a layer "
    "reads several maps side by side or in groups, or a residual connection comes and goes; keep it constant"
)


def stirred(network: nn.Module) -> nn.Module:
    """`network` in 64 bits and evaluation mode, changed so that no two channels are alike; in place.

    Fresh norms are all ones, and residual branches often start at zero: what they hide must show.
    """
    network.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(True)
            if parameter.ndim > 1:
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                shift = 0.5 if name.endswith(("weight", "gamma")) else -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + shift)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


def _silenced(tensor: Tensor, shapes: Mapping[str, Tensor], cuts: Any, name: str) -> Tensor:
    """`tensor` with zeros for all that is not lent."""
    with torch.enable_grad():
        marked = torch.zeros_like(tensor, requires_grad=True)
        lent = lend({name: marked}, {name: shapes[name]}, cuts=cuts)[name]
        (mask,) = torch.autograd.grad(lent.sum(), marked)
    return tensor * mask


def _places(network: nn.Module, kind: str) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in network.named_modules()
        for name, tensor in vars(module)[kind].items()
        if tensor is not None
    }


def _share_scales(large: nn.Module, small: nn.Module) -> None:
    """Gives the attentions of `small`, in place, the factors of their namesakes in `large`."""
    factors = {
        name: module.scale
        for name, module in large.named_modules()
        if isinstance(vars(module).get("scale"), float)
    }
    for name, module in small.named_modules():
        if name in factors and "scale" in vars(module):
            vars(module)["scale"] = factors[name]


def _affine(axis: int) -> Callable[..., Tensor]:
    """A norm's weight and bias alone, along the last axis or, of maps, the axis of channels."""

    def apply(input: Tensor, _: object, weight: Any = None, bias: Any = None, *__: Any, **___: Any) -> Tensor:
        behind = 0 if axis == -1 else input.ndim - 2
        for tensor, combine in ((weight, torch.mul), (bias, torch.add)):
            if tensor is not None:
                input = combine(input, tensor.reshape(*tensor.shape, *(1 for _ in range(behind))))
        return input

    return apply


_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _affine(-1),
    torch.layer_norm: _affine(-1),
    F.rms_norm: _affine(-1),
    F.group_norm: _affine(1),
    torch.group_norm: _affine(1),
}


class _WithoutCounting(TorchFunctionMode):
    """Leaves out of norms over channels, and of attention, what depends on the number of channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _NORMS:
            return _NORMS[func](*args, **given)
        if func is F.scaled_dot_product_attention:
            given["scale"] = 0.125
        return func(*args, **given)
