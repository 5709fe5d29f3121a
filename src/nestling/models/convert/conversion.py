"""An existing network with no builder becomes a supernet: `convert`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.models.convert.checks import refused_by_order, refused_by_running, runner
from nestling.models.convert.coupling import Coupling, Group, find_coupling
from nestling.models.convert.coverage import Coverage, cover
from nestling.models.convert.depth import Stage, find_stages
from nestling.models.convert.surgery import Plan, cut_shapes, cut_weights, make_plan, permuted, source_of
from nestling.models.layouts import Layout
from nestling.models.meaning import stirred
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, Need, SearchSpace, Value

RATIOS = (0.5, 0.75, 1.0)
ROUND_TO = 8


@dataclass(frozen=True, slots=True)
class Conversion:
    """A network, and how it is cut.

    Attributes:
        network: the whole network, in evaluation mode: a copy of the one that was given.
        space: its choices.
        coverage: which layers became elastic, and why others did not.
        plan: the channel groups and stages behind the choices.
    """

    network: nn.Module
    space: SearchSpace
    coverage: Coverage
    plan: Plan
    _skeleton: nn.Module = field(repr=False)

    def build(self, arch: Arch) -> nn.Module:
        """The network of `arch`: its weights are the leading ones of the whole network's.

        On the meta device (`nestling.models.building.build_shapes`) it has shapes alone, and costs little.

        Raises:
            ValueError: a width or depth that the network cannot have.
        """
        if torch.get_default_device().type == "meta":
            return cut_shapes(self._skeleton, self.plan.surgery(arch))
        return cut_weights(self.network, self.plan, arch)

    def layout(self, network: nn.Module, arch: Arch) -> Layout:
        """Where `arch` keeps other than the leading channels: behind a concatenation, say."""
        return self.plan.layout(network, arch)

    def supernet(self) -> Supernet:
        """A supernet that lends a copy of the whole network's weights."""
        return Supernet(self.space, self.build, layout=self.layout, largest=copy.deepcopy(self.network))

    def rebuild(self, arch: Arch, source: str) -> str:
        """Python source that defines `network`, the arch's network, without Nestling.

        `source` must define `network`, the whole network; weights are loaded into the result later.
        """
        return source_of(self.plan.surgery(arch), source)


def convert(
    network: nn.Module,
    *,
    resolution: int,
    ratios: Sequence[float] = RATIOS,
    round_to: int = ROUND_TO,
    depth: bool = True,
    sort: bool = False,
    importance: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Value] | None = None,
    family: str = "convert",
) -> Conversion:
    """The network as the largest of a search space: its channel groups get widths, its stages depths.

    Each proposed choice is tested by running smaller networks; one that fails is left out, and the coverage
    says why. The network itself is not changed.

    Args:
        network: any network that takes images (N, 3, R, R) and returns logits (N, classes).
        resolution: R, the side of its images in pixels.
        ratios: of each width and depth, ascending; the last is 1.
        round_to: widths are multiples of it.
        depth: whether trailing blocks of a stage may be dropped.
        sort: whether channels are sorted by importance first, so that smaller networks get the most
            important ones. The largest network then computes the same to rounding, not to the last bit.
        importance: with `sort`, by group a number for each unit; groups not named go by the L1 norm of their
            weights (Li et al. 2017, arXiv 1608.08710).
        constants: choices of one value that the space has as well.
        family: of the space; `package.module:name` where the result is kept as `name`, so that a space file
            finds it.

    Raises:
        ValueError: ratios that do not ascend to 1, or a network that does not turn such images into logits.
    """
    _check(ratios, round_to)
    try:
        network = copy.deepcopy(network).cpu().eval()
    except RuntimeError as error:
        raise ValueError(
            f"{type(network).__name__} cannot be copied ({error}); take parametrizations such as weight_norm "
            "off first"
        ) from error
    images = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    logits = _logits(network, images)
    proposed, whole = propose(network, resolution=resolution)
    refused = {name: group.fixed for name, group in proposed.groups.items() if group.fixed}
    widths = {
        name: _widths(group, ratios, round_to) for name, group in proposed.groups.items() if not group.fixed
    }
    for name, values in widths.items():
        if len(values) < 2:
            refused[name] = f"{values[0]} is too narrow to be cut to {ratios[0]} of it in steps of {round_to}"
    depths = {name: _depths(stage, ratios) for name, stage in proposed.stages.items() if depth}
    refused |= {name: "it has no block to spare" for name, values in depths.items() if len(values) < 2}
    if not depth:
        refused |= dict.fromkeys(proposed.stages, "depth is not asked for")

    plan = _without(proposed, refused)
    refused |= refused_by_order(stirred(copy.deepcopy(network)), plan, images.double())
    plan = _without(proposed, refused)
    smallest = {name: (depths | widths)[name][0] for name in (*plan.stages, *plan.groups)}
    refused |= refused_by_running(runner(network, plan, images), smallest)
    plan = _without(proposed, refused)
    if sort:
        sort_channels(network, plan, importance=importance)
    chosen = {name: values for name, values in (depths | widths).items() if name not in refused}
    fixed: dict[str, Value] = {**(constants or {}), "resolution": resolution, "classes": logits.shape[1]}
    choices = [Choice(name, (value,)) for name, value in fixed.items()]
    choices += [Choice(name, chosen[name]) for name in plan.stages]
    choices += [Choice(name, chosen[name], _needs(plan, name, chosen)) for name in plan.groups]
    space = SearchSpace(family, tuple(choices))
    coverage = cover(network, proposed, accepted=plan, refused=refused, whole=whole)
    return Conversion(network, space, coverage, plan, copy.deepcopy(network).to("meta"))


def propose(network: nn.Module, *, resolution: int) -> tuple[Plan, str]:
    """Every group and stage of `network`, in evaluation mode, and why layers without one have none.

    The names follow from the network alone: they are the same in every process. Nothing is tested yet.
    """
    images = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    whole = "it was not found to share channels with other layers"
    try:
        coupling = find_coupling(stirred(copy.deepcopy(network)), images.double())
    except Exception as error:  # torch-pruning meets networks that it was not made for
        coupling = Coupling({}, ())
        whole = f"torch-pruning cannot follow the network: {type(error).__name__}: {str(error)[:120]}"
    stages = find_stages(network, images)
    return make_plan(network, coupling.ports, groups=coupling.groups, stages=stages), whole


def _check(ratios: Sequence[float], round_to: int) -> None:
    if not ratios or list(ratios) != sorted(set(ratios)) or ratios[0] <= 0 or ratios[-1] != 1:
        raise ValueError(f"ratios are {list(ratios)}; they must ascend from above 0 to 1, such as {RATIOS}")
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}; it must be at least 1")


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    side = images.shape[-1]
    try:
        logits = network(images)
    except Exception as error:
        raise ValueError(f"the network does not run on an image of {side} x {side} px: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        told = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network gives {told} for one image; only logits (1, classes) can be searched")
    return logits


def _widths(group: Group, ratios: Sequence[float], round_to: int) -> tuple[int, ...]:
    """What the group's choice may be, ascending: in channels, or in heads."""
    heads = group.name.endswith(".heads")
    step = 1 if heads else round_to // math.gcd(group.channels, round_to)  # in units
    units = {max(step, round(group.units * ratio / step) * step) for ratio in ratios}
    return tuple(n * group.channels for n in sorted({min(n, group.units) for n in (*units, group.units)}))


def _depths(stage: Stage, ratios: Sequence[float]) -> tuple[int, ...]:
    whole = len(stage.blocks)
    return tuple(range(min(whole, max(stage.least, math.ceil(whole * ratios[0]))), whole + 1))


def _without(plan: Plan, refused: Mapping[str, str]) -> Plan:
    return replace(
        plan,
        groups={name: group for name, group in plan.groups.items() if name not in refused},
        stages={name: stage for name, stage in plan.stages.items() if name not in refused},
    )


def _needs(plan: Plan, name: str, chosen: Mapping[str, tuple[int, ...]]) -> tuple[Need, ...]:
    """The depth without which all layers of the group are gone."""
    owners = [axis[0] for axis in plan.groups[name].positions]
    for stage_name, stage in plan.stages.items():
        for number, block in enumerate(stage.blocks, start=1):
            if number > chosen[stage_name][0] and all(owner.startswith(f"{block}.") for owner in owners):
                return (Need(stage_name, number),)
    return ()


@torch.no_grad()
def sort_channels(network: nn.Module, plan: Plan, *, importance: Mapping[str, Tensor] | None = None) -> None:
    """Sorts the units of each of `plan`'s groups, the most important first, in place; see `convert`.

    Raises:
        ValueError: an importance that has not one number for each unit.
    """
    importance = importance or {}
    for name, scores in importance.items():
        if name in plan.groups and scores.shape != (plan.groups[name].units,):
            raise ValueError(
                f"the importance of {name} has shape {tuple(scores.shape)}, not ({plan.groups[name].units},)"
            )
    tensors: dict[str, Tensor] = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    orders = {}
    for name, group in plan.groups.items():
        given = importance.get(name)
        norm = _weight_norm(group, tensors) if given is None else given.double().cpu().numpy()
        orders[name] = np.argsort(-norm, kind="stable")
    for name, moved in permuted(plan, tensors, orders).items():
        if moved is not tensors[name]:
            tensors[name].copy_(moved.clone())


def _weight_norm(group: Group, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """By unit, the sum of magnitudes of the weights that make it and read it; norms have no say."""
    scores = np.zeros(group.units)
    for (name, axis), table in group.positions.items():
        if name in tensors and tensors[name].ndim > 1:
            others = [other for other in range(tensors[name].ndim) if other != axis]
            sums = tensors[name].double().abs().sum(others).numpy()
            scores += sums[table].sum(1)
    return scores
