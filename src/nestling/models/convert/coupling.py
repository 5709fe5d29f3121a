"""Channels that can only be cut together, found by torch-pruning's dependency graph.

DepGraph (Fang et al. 2023, arXiv 2301.12900) runs a network once and follows autograd's graph from each
layer's channels to all layers that must lose the same channels: through additions, concatenation, splits
and flattening. Here it is asked channel by channel, so that what remains is a plain table: which position of
which axis belongs to which channel. It guesses where it does not know an operator; `checks.py` tests it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch_pruning  # type: ignore[import-untyped]
from numpy.typing import NDArray
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch_pruning import ops

from nestling.models.convert.ports import Axis, Port, PortName, ports_of

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear)
_MEETINGS = 8
"""How many of a root's channels may meet in one place (query, key and value are 3)."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Channels that are made, changed and read together.

    Attributes:
        name: of its choice, such as `layer1.0.conv1.width`.
        units: how many units it has: the leading ones are kept.
        channels: how many channels a unit is, at the layer that makes them; 1 where the choice counts heads.
        positions: by axis, (units, positions a unit): where each unit lies, ascending.
        fixed: why it cannot be cut; empty where it can.
    """

    name: str
    units: int
    channels: int
    positions: Mapping[Axis, NDArray[np.int64]]
    fixed: str = ""


@dataclass(frozen=True, slots=True)
class Coupling:
    """A network's ports, and the groups of channels that pass through them."""

    ports: Mapping[PortName, Port]
    groups: tuple[Group, ...]


class _At(NamedTuple):
    """A channel here, and the root's channel that led here; torch-pruning's maps read these two names."""

    idx: int
    root_idx: int


class _Classes:
    """Disjoint sets of elements, numbered from 0 (Tarjan 1975)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, element: int) -> int:
        parent = self._parent
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    def join(self, first: int, second: int) -> None:
        a, b = self.find(first), self.find(second)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


def find_coupling(network: nn.Module, images: Tensor) -> Coupling:
    """The ports and channel groups of `network`, all of whose parameters must want gradients.

    Raises:
        Exception: whatever torch-pruning raises for a network that it cannot follow.
    """
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes it could not infer: what comes of it is tested
        graph.build_dependency(network, (images,), verbose=False)
    names: dict[Any, str] = {module: name for name, module in network.named_modules()}
    for name, parameter in network.named_parameters():
        names[parameter] = name
    ports = _find_ports(network, graph, names)
    start, total = {}, 0
    for key, port in ports.items():
        start[key] = total
        total += port.size
    classes = _Classes(total)
    fixed = _join_by_graph(graph, names, ports=ports, start=start, classes=classes)
    _join_blocks(network, ports, start=start, classes=classes)
    _join_tied(network, ports, start=start, classes=classes)
    return Coupling(ports, tuple(_groups(network, ports, start=start, classes=classes, fixed=fixed)))


def _find_ports(network: nn.Module, graph: Any, names: Mapping[Any, str]) -> dict[PortName, Port]:
    ports: dict[PortName, Port] = {}
    for name, module in network.named_modules():
        if module in graph.module2node:
            ports |= ports_of(name, module)
    for thing, node in graph.module2node.items():
        if isinstance(thing, nn.Parameter) and thing in names:
            axis = node.pruning_dim
            ports[names[thing], "out"] = Port(thing.shape[axis], ((names[thing], axis),))
    return ports


def _join_by_graph(
    graph: Any,
    names: Mapping[Any, str],
    *,
    ports: Mapping[PortName, Port],
    start: Mapping[PortName, int],
    classes: _Classes,
) -> dict[int, str]:
    """Joins what the dependency graph couples; by element, why it must stay as it is."""
    fixed: dict[int, str] = {}
    done: set[PortName] = set()
    widest = max((port.size for port in ports.values()), default=0)
    for module, node in graph.module2node.items():
        root: PortName = (names.get(module, ""), "out")
        if not isinstance(module, _ROOTS) or root not in ports or root in done:
            continue
        fn = graph.get_pruner_of_module(module).prune_out_channels
        whole = [_At(i, i) for i in range(ports[root].size)]
        seen: dict[tuple[int, str], set[_At]] = defaultdict(set)
        stack: list[tuple[Any, Any, list[_At], bool]] = [(node, fn, whole, False)]
        while stack:
            here, fn, channels, is_mapped = stack.pop()
            pruner = graph.get_pruner_of_module(here.module)
            both = pruner.prune_in_channels == pruner.prune_out_channels
            side = "in" if not both and fn == pruner.prune_in_channels else "out"
            known = seen[id(here), side]
            channels = [channel for channel in channels if channel not in known]
            if not channels:
                continue
            known.update(channels)
            if len(known) > _MEETINGS * widest:
                fixed |= dict.fromkeys(
                    range(start[root], start[root] + ports[root].size),
                    "more channels meet in one place than can be followed",
                )
                break
            key: Any = (names.get(here.module, ""), side)
            if key in ports and _is_another_axis(channels, (ports[root], ports[key]), is_mapped=is_mapped):
                continue
            if key in ports:
                if side == "out" and len({channel.idx for channel in known}) == ports[key].size:
                    done.add(key)
                for at in channels:
                    classes.join(start[root] + at.root_idx, start[key] + at.idx)
            why = _why_fixed(here, key in ports, side)
            if why:
                fixed |= {start[root] + channel.root_idx: why for channel in channels}
            for edge in here.dependencies:
                if edge.is_triggered_by(fn):
                    there = _mapped(edge, channels, limit=widest)
                    stack.append((edge.target, edge.handler, there, is_mapped or there is not channels))
    return fixed


def _mapped(edge: Any, channels: list[_At], *, limit: int) -> list[_At]:
    """Where the channels are beyond `edge`; nowhere if that is past `limit`, more than any layer has."""
    mapped: Iterable[Any] = channels
    changed = False
    for mapping in edge.index_mapping:
        if mapping is not None:
            mapped, changed = mapping(mapped), True
    if not changed:
        return channels
    there = [_At(int(at.idx), int(at.root_idx)) for at in mapped if at.root_idx is not None]
    return there if all(at.idx < limit for at in there) else []


def _is_another_axis(channels: list[_At], ends: tuple[Port, Port], *, is_mapped: bool) -> bool:
    """Whether the second port is of other things: one number for all channels, or one for each head."""
    root, here = ends
    if not is_mapped:
        return root.size != here.size
    return not all(0 <= at.idx < here.size for at in channels)


def _why_fixed(node: Any, has_port: bool, side: str) -> str:
    if node.type == ops.OPTYPE.OUTPUT or (not node.outputs and side == "out"):
        return "it makes the network's output"
    layered = not isinstance(node.module, nn.Parameter) and list(node.module.parameters(recurse=True))
    if layered and not has_port:
        return f"a {type(node.module).__name__} uses its channels, which is not known to be cut"
    return ""


def _join_blocks(
    network: nn.Module, ports: Mapping[PortName, Port], *, start: Mapping[PortName, int], classes: _Classes
) -> None:
    """Joins the channels of one group of a convolution or a norm, and those of one head of an attention."""
    for (name, side), port in ports.items():
        first = start[name, side]
        for channel in range(port.size):
            block = channel // port.blocks
            if port.feeds:
                classes.join(first + channel, start[name, "out"] + block * port.feeds)
            classes.join(first + channel, first + block * port.blocks)
    for name, module in network.named_modules():
        key: PortName = (f"{name}.qkv", "out")
        if isinstance(module, Attention) and key in ports:
            for channel in range(ports[key].size):
                head = channel % module.attn_dim // module.head_dim
                classes.join(start[key] + channel, start[key] + head * module.head_dim)


def _join_tied(
    network: nn.Module, ports: Mapping[PortName, Port], *, start: Mapping[PortName, int], classes: _Classes
) -> None:
    """Joins the channels of two layers that share a tensor."""
    tensors = dict(network.named_parameters(remove_duplicate=False))
    first_seen: dict[tuple[int, int], int] = {}
    for key, port in ports.items():
        for name, axis in port.axes:
            if name in tensors:
                first = first_seen.setdefault((id(tensors[name]), axis), start[key])
                for channel in range(port.size):
                    classes.join(first + channel, start[key] + channel)


def _groups(
    network: nn.Module,
    ports: Mapping[PortName, Port],
    *,
    start: Mapping[PortName, int],
    classes: _Classes,
    fixed: Mapping[int, str],
) -> Iterable[Group]:
    """One group for all classes that pass through the same ports, as often."""
    members: dict[int, dict[PortName, list[int]]] = defaultdict(dict)
    for key, port in ports.items():
        for channel in range(port.size):
            members[classes.find(start[key] + channel)].setdefault(key, []).append(channel)
    reasons = {classes.find(element): why for element, why in fixed.items()}
    alike: dict[frozenset[tuple[PortName, int]], list[int]] = defaultdict(list)
    for representative, places in members.items():
        alike[frozenset((key, len(found)) for key, found in places.items())].append(representative)
    order = {key: number for number, key in enumerate(ports)}
    makers = {name for name, module in network.named_modules() if isinstance(module, _ROOTS)}
    taken: dict[str, int] = defaultdict(int)
    for representatives in alike.values():
        keys = sorted(members[representatives[0]], key=order.__getitem__)
        made = [key for key in keys if key[1] == "out" and key[0] in makers]
        if not made:
            continue
        name, channels = _choice_name(network, made, members[representatives[0]])
        taken[name] += 1
        if taken[name] > 1:  # a layer whose channels are split goes by parts
            stem, _, kind = name.rpartition(".")
            name = f"{stem}.part{taken[name]}.{kind}"
        units = sorted(representatives, key=lambda unit: members[unit][made[0]][0])
        positions: dict[Axis, NDArray[np.int64]] = {}
        for key in keys:
            table = np.array([members[unit][key] for unit in units], dtype=np.int64)
            positions |= dict.fromkeys(ports[key].axes, table)
        why = next((reasons[unit] for unit in units if unit in reasons), "")
        yield Group(name, len(units), channels, positions, why)


def _choice_name(
    network: nn.Module, made: list[PortName], places: Mapping[PortName, list[int]]
) -> tuple[str, int]:
    """The name of a group's choice, and how many of what it counts a unit is."""
    layer = made[0][0]
    owner, _, own = layer.rpartition(".")
    if own == "qkv" and isinstance(network.get_submodule(owner), Attention):
        return f"{owner}.heads", 1
    return f"{layer}.width", len(places[made[0]])
