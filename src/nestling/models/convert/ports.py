"""Where a layer's channels enter and leave: ports, and the axes of tensors that lie along each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from timm.layers.attention import Attention
from torch import Tensor, nn

Axis = tuple[str, int]
"""A tensor's name in the network's state, and one of its axes; or a module without tensors, and 0."""
Side = Literal["out", "in"]
PortName = tuple[str, Side]
"""A layer's name (or a lone parameter's), and which of its sides."""

_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd
_Norm = nn.modules.batchnorm._NormBase


@dataclass(frozen=True, slots=True)
class Port:
    """One side of a layer.

    Attributes:
        size: how many channels.
        axes: the axes of tensors that have a position for each channel, in the same order.
        blocks: channels in consecutive blocks of so many go together (groups of a convolution or norm).
        feeds: for the entry of a grouped convolution, that has no axis of its own: the size of the block of
            its exit that each of its blocks feeds; 0 elsewhere.
    """

    size: int
    axes: tuple[Axis, ...]
    blocks: int = 1
    feeds: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """An attribute of a module that says how long an axis is: `length * times // divided_by`."""

    module: str
    attribute: str
    axis: Axis
    times: int = 1
    divided_by: int = 1
    is_tuple: bool = False

    def value(self, length: int) -> int | tuple[int, ...]:
        """What the attribute must be where the axis is `length` long."""
        number = length * self.times // self.divided_by
        return (number,) if self.is_tuple else number


def ports_of(name: str, module: nn.Module) -> dict[PortName, Port]:
    """The ports of a layer; none where it is not known how the layer is cut."""
    dot = f"{name}." if name else ""
    if isinstance(module, _Transposed):
        if module.groups > 1:
            return {}
        bias = () if module.bias is None else ((f"{dot}bias", 0),)
        return {
            (name, "out"): Port(module.out_channels, ((f"{dot}weight", 1), *bias)),
            (name, "in"): Port(module.in_channels, ((f"{dot}weight", 0),)),
        }
    if isinstance(module, _Conv):
        groups, of_out = module.groups, module.out_channels
        out = tuple(_along(name, module, of_out))
        if groups == 1:
            into = Port(module.in_channels, ((f"{dot}weight", 1),))
            return {(name, "out"): Port(of_out, out), (name, "in"): into}
        entering, leaving = module.in_channels // groups, of_out // groups
        return {
            (name, "out"): Port(of_out, out, blocks=leaving),
            (name, "in"): Port(module.in_channels, (), blocks=entering, feeds=leaving),
        }
    if isinstance(module, nn.Linear):
        return {
            (name, "out"): Port(module.out_features, tuple(_along(name, module, module.out_features))),
            (name, "in"): Port(module.in_features, ((f"{dot}weight", 1),)),
        }
    channels = _normalized(module)
    if channels is None:
        return {}
    axes = tuple(_along(name, module, channels)) or ((name, 0),)
    blocks = channels // module.num_groups if isinstance(module, nn.GroupNorm) else 1
    # one group that holds all channels is cut as a layer normalization is
    return {(name, "out"): Port(channels, axes, blocks=1 if blocks == channels else blocks)}


def settings_of(name: str, module: nn.Module, ports: Mapping[PortName, Port]) -> Iterator[Setting]:
    """The attributes of a layer, or of an attention, that follow from the lengths of axes."""
    if isinstance(module, Attention):
        qkv, size = (f"{name}.qkv.weight", 0), 3 * module.head_dim
        yield Setting(name, "num_heads", qkv, divided_by=size)
        yield Setting(name, "attn_dim", qkv, divided_by=3)
    if (name, "out") not in ports:
        return
    out = ports[name, "out"].axes[0]
    if isinstance(module, _Conv):
        yield Setting(name, "out_channels", out)
        entry = ports[name, "in"]
        if entry.axes:
            yield Setting(name, "in_channels", entry.axes[0])
        else:
            yield Setting(name, "in_channels", out, times=module.in_channels, divided_by=module.out_channels)
            yield Setting(name, "groups", out, times=module.groups, divided_by=module.out_channels)
    elif isinstance(module, nn.Linear):
        yield Setting(name, "out_features", out)
        yield Setting(name, "in_features", ports[name, "in"].axes[0])
    elif isinstance(module, _Norm):
        yield Setting(name, "num_features", out)
    elif isinstance(module, nn.LayerNorm):
        yield Setting(name, "normalized_shape", out, is_tuple=True)
    elif isinstance(module, nn.GroupNorm):
        yield Setting(name, "num_channels", out)
        if module.num_groups > 1:
            yield Setting(name, "num_groups", out, times=module.num_groups, divided_by=module.num_channels)
    elif isinstance(module, nn.PReLU):
        yield Setting(name, "num_parameters", out)


def _normalized(module: nn.Module) -> int | None:
    """How many channels a normalization (or a PReLU) scales one by one; None for other modules."""
    if isinstance(module, _Norm):
        return int(module.num_features)
    if isinstance(module, nn.GroupNorm):
        return int(module.num_channels)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return int(module.normalized_shape[0])
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return int(module.num_parameters)
    return None


def _along(name: str, module: nn.Module, channels: int) -> Iterator[Axis]:
    """The first axis of each of the module's own tensors that has a position for each channel."""
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for own, tensor in held.items():
        if tensor is not None and tensor.ndim and tensor.shape[0] == channels:
            yield (f"{name}.{own}" if name else own, 0)
