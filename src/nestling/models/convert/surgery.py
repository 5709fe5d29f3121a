"""What must change in a network so that it has an arch's widths and depths, as data; and doing it."""

from __future__ import annotations

import copy
import pprint
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.models.convert.coupling import Group
from nestling.models.convert.depth import Stage
from nestling.models.convert.ports import Axis, Port, PortName, Setting, settings_of
from nestling.models.layouts import Kept, Part
from nestling.space import Arch


@dataclass(frozen=True, slots=True)
class Surgery:
    """The whole difference between a network and a smaller one.

    Attributes:
        dropped: the blocks that are left out.
        shapes: of the tensors that are cut, by name.
        attributes: of the modules that say how large they are: by module, then by attribute.
    """

    dropped: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]


@dataclass(frozen=True)
class Plan:
    """How a network may be cut.

    Attributes:
        groups: of channels, by the name of their choice.
        stages: whose blocks may be dropped, by the name of their choice.
        settings: the attributes that follow from the lengths of axes.
        shapes: of the whole network's tensors.
        lengths: of the axes that no tensor has but a setting, by layer.
    """

    groups: Mapping[str, Group]
    stages: Mapping[str, Stage]
    settings: tuple[Setting, ...]
    shapes: Mapping[str, tuple[int, ...]]
    lengths: Mapping[str, int]

    def length(self, axis: Axis) -> int:
        """The length of an axis in the whole network."""
        name, number = axis
        return self.shapes[name][number] if name in self.shapes else self.lengths[name]

    @cached_property
    def governing(self) -> Mapping[Axis, tuple[str, ...]]:
        """By axis, the groups that pass through it."""
        governing: dict[Axis, list[str]] = defaultdict(list)
        for name, group in self.groups.items():
            for axis in group.positions:
                governing[axis].append(name)
        return {axis: tuple(names) for axis, names in governing.items()}

    @cached_property
    def _leads(self) -> frozenset[Axis]:
        """The axes of which every group's leading units are the leading positions."""
        leading = set()
        for axis, names in self.governing.items():
            table = self.groups[names[0]].positions[axis]
            if len(names) == 1 and np.array_equal(table.ravel(), np.arange(table.size)):
                leading.add(axis)
        return frozenset(leading)

    def units(self, arch: Mapping[str, object]) -> dict[str, int]:
        """How many units of each group `arch` keeps; groups that it does not name are whole.

        Raises:
            ValueError: it keeps more of a group than there is, less than one unit, or a part of one.
        """
        kept = {}
        for name, group in self.groups.items():
            value = arch.get(name, group.units * group.channels)
            if not isinstance(value, int) or value % group.channels:
                raise ValueError(f"{name} is {value!r}; it must be a multiple of {group.channels}")
            kept[name] = value // group.channels
            if not 1 <= kept[name] <= group.units:
                raise ValueError(f"{name} is {value}; the network has {group.units * group.channels}")
        return kept

    def dropped(self, arch: Mapping[str, object]) -> tuple[str, ...]:
        """The blocks that `arch` leaves out.

        Raises:
            ValueError: a stage is to be deeper than it is, or shallower than it can be.
        """
        dropped: list[str] = []
        for name, stage in self.stages.items():
            depth = arch.get(name, len(stage.blocks))
            if not isinstance(depth, int) or not stage.least <= depth <= len(stage.blocks):
                raise ValueError(f"{name} is {depth!r}; it is {stage.least} to {len(stage.blocks)} blocks")
            dropped += stage.blocks[depth:]
        return tuple(dropped)

    def surgery(self, arch: Mapping[str, object]) -> Surgery:
        """What must change for `arch`; raises as `units` and `dropped` do."""
        units, dropped = self.units(arch), self.dropped(arch)
        gone = tuple(f"{block}." for block in dropped)
        lengths: dict[Axis, int] = {}
        for axis, names in self.governing.items():
            less = sum(
                (self.groups[n].units - units[n]) * self.groups[n].positions[axis].shape[1] for n in names
            )
            if less and not axis[0].startswith(gone):
                lengths[axis] = self.length(axis) - less
        shapes: dict[str, tuple[int, ...]] = {}
        for (name, number), length in lengths.items():
            if name not in self.shapes:
                continue
            shape = list(shapes.get(name, self.shapes[name]))
            shape[number] = length
            shapes[name] = tuple(shape)
        attributes: dict[str, dict[str, int | tuple[int, ...]]] = defaultdict(dict)
        for setting in self.settings:
            if setting.axis in lengths:
                attributes[setting.module][setting.attribute] = setting.value(lengths[setting.axis])
        return Surgery(dropped, shapes, dict(attributes))

    def kept(
        self, arch: Mapping[str, object], *, axes: Iterable[Axis] | None = None
    ) -> dict[Axis, NDArray[np.int64]]:
        """The positions that `arch` keeps of each axis (or of `axes`) of which it does not keep all."""
        units = self.units(arch)
        kept = {}
        for axis in self.governing if axes is None else axes:
            names = [name for name in self.governing[axis] if units[name] < self.groups[name].units]
            if names:
                stays = np.ones(self.length(axis), dtype=bool)
                for name in names:
                    stays[self.groups[name].positions[axis][units[name] :]] = False
                kept[axis] = np.flatnonzero(stays)
        return kept

    def layout(self, network: nn.Module, arch: Arch) -> dict[Axis, Part]:  # noqa: ARG002 the arch says it all
        """The axes of which other than leading positions are kept, as `Supernet` wants to know them."""
        gone = tuple(f"{block}." for block in self.dropped(arch))
        axes = [axis for axis in self.governing if axis not in self._leads and not axis[0].startswith(gone)]
        kept = self.kept(arch, axes=axes)
        return {axis: Kept(tuple(positions.tolist())) for axis, positions in kept.items()}


def make_plan(
    network: nn.Module, ports: Mapping[PortName, Port], *, groups: Iterable[Group], stages: Iterable[Stage]
) -> Plan:
    """The plan by which `network` is cut along `groups` and `stages`."""
    settings = [s for name, module in network.named_modules() for s in settings_of(name, module, ports)]
    tensors = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    lengths = {name: port.size for (name, _), port in ports.items() if name not in shapes}
    return Plan({g.name: g for g in groups}, {s.name: s for s in stages}, tuple(settings), shapes, lengths)


def operate(network: nn.Module, surgery: Surgery, *, cut: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """`network`, changed in place: `cut` gives each tensor that changes, by name, its part.

    A tensor that two layers share stays one.
    """
    for name in surgery.dropped:
        network.set_submodule(name, nn.Identity())
    for name, values in surgery.attributes.items():
        module = network.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, so that their ids stay theirs
    for name in surgery.shapes:
        owner, _, own = name.rpartition(".")
        module = network.get_submodule(owner)
        held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        tensor = held[own]
        assert tensor is not None
        if id(tensor) not in made:
            part = cut(name, tensor.detach())
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (tensor, part)
        setattr(module, own, made[id(tensor)][1])
    return network


def cut_shapes(skeleton: nn.Module, surgery: Surgery) -> nn.Module:
    """A copy of `skeleton`, which is on the meta device, after the surgery."""
    return operate(
        copy.deepcopy(skeleton),
        surgery,
        cut=lambda name, t: torch.empty(surgery.shapes[name], dtype=t.dtype, device="meta"),
    )


def cut_weights(network: nn.Module, plan: Plan, arch: Mapping[str, object]) -> nn.Module:
    """A copy of `network` with its weights, cut to what `arch` keeps."""
    kept = plan.kept(arch)

    def cut(name: str, tensor: Tensor) -> Tensor:
        for (owner, axis), positions in kept.items():
            if owner == name:
                tensor = tensor.index_select(axis, torch.from_numpy(positions).to(tensor.device))
        return tensor.clone()

    return operate(copy.deepcopy(network), plan.surgery(arch), cut=cut)


def permuted(
    plan: Plan, tensors: Mapping[str, Tensor], orders: Mapping[str, NDArray[np.int64]]
) -> dict[str, Tensor]:
    """`tensors` with the units of groups in another order: the network they belong to computes the same.

    Args:
        plan: of the network.
        tensors: its parameters and buffers, by every name.
        orders: by group, which of its units comes first, second and so on.
    """
    result = dict(tensors)
    for axis, names in plan.governing.items():
        if axis[0] not in tensors or not any(name in orders for name in names):
            continue
        index = np.arange(plan.length(axis))
        for name in names:
            if name in orders:
                table = plan.groups[name].positions[axis]
                index[table] = table[orders[name]]
        moved = result[axis[0]]
        result[axis[0]] = moved.index_select(axis[1], torch.from_numpy(index).to(moved.device))
    return result


def source_of(surgery: Surgery, source: str) -> str:
    """Python that defines `network`: `source`, which defines the whole one, and the surgery spelled out."""

    def spelled(name: str, value: object) -> str:
        return f"{name} = {pprint.pformat(value, width=100, compact=True, sort_dicts=False)}"

    return "\n".join(
        (
            "import torch",
            source.rstrip(),
            "",
            spelled("dropped", surgery.dropped),
            spelled("attributes", {name: dict(values) for name, values in surgery.attributes.items()}),
            spelled("shapes", dict(surgery.shapes)),
            _OPERATION,
        )
    )


_OPERATION = """
for name in dropped:
    network.set_submodule(name, torch.nn.Identity())
for name, values in attributes.items():
    for attribute, value in values.items():
        setattr(network.get_submodule(name), attribute, value)
made = {}  # a tensor that two layers share stays one
for name, shape in shapes.items():
    owner, _, own = name.rpartition(".")
    module = network.get_submodule(owner)
    held = module._parameters if own in module._parameters else module._buffers
    tensor = held[own]
    part = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, torch.nn.Parameter):
        part = torch.nn.Parameter(part, tensor.requires_grad)
    held[own] = made.setdefault(id(tensor), (tensor, part))[1]
"""
