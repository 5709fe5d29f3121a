"""All that can be seen of a network without numbers: its layers, their settings and tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from nestling.models.building import Build, build_shapes
from nestling.models.cost import Cost, cost
from nestling.space import Arch, SpaceError


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """All that can be seen of a network without numbers."""

    arch: Arch
    network: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Mapping[str, object]]
    params: int

    def is_like(self, other: Look) -> bool:
        """Whether both have the same layers in the same order, with the same tensors and settings."""
        return (
            self.params == other.params
            and self.shapes == other.shapes
            and self.settings == other.settings
            and list(self.settings) == list(other.settings)
        )


def look_at(build: Build, arch: Arch) -> Look:
    """The network of `arch`.

    Raises:
        SpaceError: it cannot be built.
    """
    try:
        network = build_shapes(build, arch)
    except Exception as error:
        raise SpaceError(
            f"the network of {arch.to_json()} cannot be built: {type(error).__name__}: {error}"
        ) from error
    tensors = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    settings = {
        name: {"class": type(m).__qualname__} | {k: _plain(v) for k, v in vars(m).items() if k not in _MODULE}
        for name, m in network.named_modules(remove_duplicate=False)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    return Look(arch, network, shapes, settings, sum(p.numel() for p in network.parameters()))


_MODULE = frozenset(vars(nn.Module()))
_ATOMS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, Enum)


def _plain(value: object, depth: int = 4) -> object:
    """`value` as something that is equal for two networks which were built alike."""
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, type):
        return value.__qualname__
    if depth == 0 or isinstance(value, nn.Module):
        return type(value).__qualname__
    if isinstance(value, tuple | list):
        return tuple(_plain(item, depth - 1) for item in value)
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(str(_plain(item, depth - 1)) for item in value)
    if isinstance(value, functools.partial):
        return tuple(_plain(item, depth - 1) for item in (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return value.__func__.__qualname__
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__qualname__, value.__code__.co_code, _plain(held, depth - 1), _plain(value.__defaults__)
    if isinstance(value, types.BuiltinFunctionType):
        return value.__qualname__
    try:
        return type(value).__qualname__, _plain(vars(value), depth - 1)
    except TypeError:  # an object without attributes
        return type(value).__qualname__


def differing_settings(first: Look, second: Look) -> list[str]:
    """The settings, as `layer.setting`, in which two networks of the same tensors differ."""
    found = []
    for name in dict.fromkeys((*first.settings, *second.settings)):
        one, other = first.settings.get(name, {}), second.settings.get(name, {})
        differ = [key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key)]
        found += [f"{name}.{key}" if name else key for key in differ]
    return found


def same_images(first: Look, second: Look) -> bool:
    """Whether both archs read images of one size."""
    return first.arch.get("resolution") == second.arch.get("resolution")


def cost_of(look: Look, resolution: int) -> Cost:
    """What the network costs at its arch's resolution, or at `resolution` where it has none.

    Raises:
        SpaceError: the network does not run.
    """
    side = look.arch.integer("resolution") if "resolution" in look.arch else resolution
    try:
        return cost(look.network, side)
    except Exception as error:
        raise SpaceError(
            f"the network of {look.arch.to_json()} does not run for images of {side} x {side} pixels: "
            f"{type(error).__name__}: {error}"
        ) from error
