"""Channels that must move together, found by following a network's data flow."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import fx, nn

Axis = tuple[str, int]
"""A tensor's name in the network's state, and one of its axes."""

_CHANNELWISE = (
    nn.Identity, nn.Dropout, DropPath, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.GELU, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Tanh,
)  # fmt: skip
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_CHANNELWISE_CALLS: set[Any] = {
    F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.dropout, F.sigmoid, F.mish, F.hardtanh,
    F.leaky_relu, torch.relu, torch.sigmoid, torch.tanh,
}  # fmt: skip
_POOL_CALLS: set[Any] = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
_CHANNELWISE_METHODS = {"sigmoid", "relu", "tanh", "contiguous", "clamp", "hardtanh"}
_ELEMENTWISE_PAIRS = {operator.add, operator.mul, operator.iadd, operator.imul, torch.add, torch.mul}


class Unsortable(ValueError):  # noqa: N818 it says what the network is
    """A network whose groups of channels cannot be found; the message says why."""


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that one order rules: permuting every axis of `axes` alike leaves the output as it is.

    Attributes:
        size: how many channels.
        axes: every axis that is indexed by these channels.
        readers: those of `axes` by which following layers read the channels.
    """

    size: int
    axes: tuple[Axis, ...]
    readers: tuple[Axis, ...]


def channel_groups(network: nn.Module) -> tuple[ChannelGroup, ...]:
    """The groups of channels of `network` that can be permuted, found by following its data flow.

    A channel that passes through an operator that is not known to treat channels alike (a reshape, a grouped
    convolution, the input, the output) is left out: it keeps its place.

    Raises:
        Unsortable: the data flow cannot be followed, for instance where it depends on the input.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a forward does with a stand-in for its images
        raise Unsortable(
            f"the channels of {type(network).__name__} cannot be sorted: its data flow cannot be followed "
            f"({type(error).__name__}: {error})"
        ) from error
    flow = _Flow(network)
    for node in graph.nodes:
        flow.visit(node)
    return flow.groups()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        normalization = isinstance(m, nn.modules.batchnorm._NormBase)
        return (
            normalization
            or isinstance(m, (*_CHANNELWISE, *_POOLS))
            or super().is_leaf_module(m, module_qualified_name)
        )


class _Layout(Enum):
    """Where a value's channels are: what a layer that reads another axis does with them is not known."""

    MAP = "(N, C, H, W)"
    VECTOR = "(N, C)"
    LAST = "(..., C)"


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the network's data flow: the channels it has, and where."""

    bundle: _Bundle
    layout: _Layout


@dataclass(slots=True)
class _Bundle:
    """Axes found so far to be ruled by one order."""

    size: int
    axes: list[Axis] = field(default_factory=list)
    readers: list[Axis] = field(default_factory=list)
    fixed: bool = False
    parent: _Bundle | None = None

    def root(self) -> _Bundle:
        return self if self.parent is None else self.parent.root()


class _Flow:
    """Follows each value's channels from the layer that makes them to the layers that read them."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.values: dict[fx.Node, _Value] = {}
        self.bundles: list[_Bundle] = []
        # a tensor that two layers share has two names; one is as good as the other
        self.first_name: dict[int, str] = {}
        tensors = (
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        )
        for name, tensor in tensors:
            self.first_name.setdefault(id(tensor), name)

    def groups(self) -> tuple[ChannelGroup, ...]:
        roots = {id(b.root()): b.root() for b in self.bundles}
        seen: dict[Axis, int] = {}
        for key, bundle in roots.items():
            for axis in bundle.axes:
                if seen.setdefault(axis, key) != key:
                    bundle.fixed = roots[seen[axis]].fixed = True
        return tuple(
            ChannelGroup(b.size, tuple(dict.fromkeys(b.axes)), tuple(dict.fromkeys(b.readers)))
            for b in roots.values()
            if not b.fixed and b.readers and b.size > 1
        )

    def visit(self, node: fx.Node) -> None:
        inputs = [
            _Value(v.bundle.root(), v.layout) for n in node.all_input_nodes if (v := self.values.get(n))
        ]
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        self.values[node] = self._follow(node, module, inputs) or self._stop(inputs)

    def _follow(self, node: fx.Node, module: nn.Module | None, inputs: list[_Value]) -> _Value | None:
        """The node's value, what it shares with `inputs` noted; None where that is not known."""
        if len(inputs) == 2 and node.target in _ELEMENTWISE_PAIRS:
            first, second = inputs
            alike = first.bundle.size == second.bundle.size and first.layout is second.layout
            return _Value(self._join(first.bundle, second.bundle), first.layout) if alike else None
        if len(inputs) != 1:
            return None
        read = inputs[0]
        if isinstance(module, nn.Conv2d):
            return self._convolution(module, read)
        if isinstance(module, nn.Linear):
            return self._linear(module, read)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if read.layout is _Layout.LAST or module.num_features != read.bundle.size:
                return None
            names = ("weight", "bias", "running_mean", "running_var")
            read.bundle.axes += self._axes(module, names)
            return read
        return self._channelwise(node, module, read)

    def _stop(self, inputs: list[_Value]) -> _Value:
        for value in inputs:
            value.bundle.fixed = True
        return _Value(self._new(0, fixed=True), _Layout.LAST)

    def _new(self, size: int, *, fixed: bool = False) -> _Bundle:
        self.bundles.append(_Bundle(size, fixed=fixed))
        return self.bundles[-1]

    def _join(self, left: _Bundle, right: _Bundle) -> _Bundle:
        if left is not right:
            left.axes += right.axes
            left.readers += right.readers
            left.fixed |= right.fixed
            right.parent = left
        return left

    def _axes(self, module: nn.Module, names: tuple[str, ...], *, axis: int = 0) -> list[Axis]:
        tensors = {**module._parameters, **module._buffers}
        return [(self.first_name[id(t)], axis) for name in names if (t := tensors.get(name)) is not None]

    def _convolution(self, layer: nn.Conv2d, read: _Value) -> _Value:
        own = self._axes(layer, ("weight", "bias"))
        known = read.layout is _Layout.MAP and layer.in_channels == read.bundle.size
        if known and layer.groups == layer.in_channels == layer.out_channels > 1:
            read.bundle.axes += own
            return read
        written = self._new(layer.out_channels, fixed=layer.groups > 1)
        if known and layer.groups == 1:
            self._reads(layer, read.bundle)
        else:
            read.bundle.fixed = True
        written.axes += own
        return _Value(written, _Layout.MAP)

    def _linear(self, layer: nn.Linear, read: _Value) -> _Value:
        written = self._new(layer.out_features)
        if read.layout is not _Layout.MAP and layer.in_features == read.bundle.size:
            self._reads(layer, read.bundle)
        else:
            read.bundle.fixed = True
        written.axes += self._axes(layer, ("weight", "bias"))
        return _Value(written, _Layout.VECTOR if read.layout is _Layout.VECTOR else _Layout.LAST)

    def _reads(self, layer: nn.Module, bundle: _Bundle) -> None:
        axes = self._axes(layer, ("weight",), axis=1)
        bundle.axes += axes
        bundle.readers += axes

    def _channelwise(self, node: fx.Node, module: nn.Module | None, read: _Value) -> _Value | None:
        """The node's value where it treats channels alike."""
        if isinstance(module, nn.Flatten):
            return _flattened(read) if module.start_dim == 1 else None
        if isinstance(module, _POOLS) or node.target in _POOL_CALLS:
            return read if read.layout is _Layout.MAP else None
        if module is not None:
            return read if isinstance(module, _CHANNELWISE) else None
        if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
            return _flattened(read) if node.args[1:] == (1,) and not node.kwargs else None
        if node.op == "call_method" and node.target == "mean":
            averages_map = read.layout is _Layout.MAP and node.args[1:2] in (((2, 3),), ([2, 3],))
            keeps_axes = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
            return (
                _Value(read.bundle, _Layout.MAP if keeps_axes else _Layout.VECTOR) if averages_map else None
            )
        if node.op == "call_method":
            return read if node.target in _CHANNELWISE_METHODS else None
        scales = node.target in _ELEMENTWISE_PAIRS and any(isinstance(a, int | float) for a in node.args)
        return read if scales or node.target in _CHANNELWISE_CALLS else None


def _flattened(read: _Value) -> _Value | None:
    """A map of one pixel becomes a vector; what reads it knows from the size whether it was one."""
    return None if read.layout is _Layout.LAST else _Value(read.bundle, _Layout.VECTOR)
