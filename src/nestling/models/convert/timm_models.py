"""Family `convert`: a timm model, converted; everything follows from the arch."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from nestling.models import timm_family
from nestling.models.convert.conversion import (
    RATIOS,
    ROUND_TO,
    Conversion,
    convert,
    propose,
    sort_channels,
)
from nestling.models.convert.surgery import Plan, cut_shapes, cut_weights, source_of
from nestling.models.layouts import Layout
from nestling.models.timm_arguments import recipe_of
from nestling.space import Arch, Value

_CONSTANTS = ("model", "pretrained", "sort", "traced_at", "resolution", "classes")
_KEPT = 8
"""How many converted models are remembered; a run needs one."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What says which network is converted: read from an arch's constants."""

    name: str
    classes: int
    traced_at: int
    weights: str


@dataclass(frozen=True, slots=True)
class _Converted:
    skeleton: nn.Module
    plan: Plan


def convert_timm(
    model: str,
    *,
    resolution: int,
    classes: int = 1000,
    pretrained: bool | str = False,
    sort: bool = False,
    ratios: Sequence[float] = RATIOS,
    round_to: int = ROUND_TO,
    depth: bool = True,
) -> Conversion:
    """timm's `model`, converted: its space says everything that `build` needs to make any of its networks.

    Args:
        model: a name that `timm.create_model` knows.
        resolution: side of its images in pixels.
        classes: how many logits it gives.
        pretrained: whether it has timm's pretrained weights, or the path of a file that holds weights, or a
            name on the hub such as `hf-hub:timm/resnet18.a1_in1k`.
        sort: whether channels are sorted by importance, see `convert`.
        ratios, round_to, depth: see `convert`.

    Raises:
        ValueError: no such model, or `convert` refuses it.
    """
    weights = pretrained if isinstance(pretrained, str) else "timm" if pretrained else ""
    asked = _Model(model, classes, resolution, weights)
    return convert(
        _create(asked),
        resolution=resolution,
        ratios=ratios,
        round_to=round_to,
        depth=depth,
        sort=sort,
        constants={"model": model, "pretrained": pretrained, "sort": sort, "traced_at": resolution},
    )


def build(arch: Arch) -> nn.Module:
    """The network of `arch`: `model` of timm, cut to the arch's widths and depths.

    `arch` decides `model`, `classes`, and `traced_at`, the resolution at which `model` was converted; then a
    value for each choice of the conversion, those that it does not name being whole.

    Raises:
        ValueError: no such model, a choice that the conversion does not know, or a width it cannot have.
    """
    converted = _converted(_model_of(arch, with_weights=False))
    _check_names(arch, converted.plan)
    if torch.get_default_device().type == "meta":
        return cut_shapes(converted.skeleton, converted.plan.surgery(arch))
    return cut_weights(_create(_model_of(arch, with_weights=False)), converted.plan, arch)


def layout(network: nn.Module, arch: Arch) -> Layout:
    """Where `arch` keeps other than the leading channels of the whole network."""
    return _converted(_model_of(arch, with_weights=False)).plan.layout(network, arch)


def pretrained(arch: Arch) -> nn.Module:
    """The whole network with the weights that `arch`'s `pretrained` names, sorted where it says `sort`.

    Raises:
        ValueError: `pretrained` says none.
    """
    asked = _model_of(arch, with_weights=True)
    if not asked.weights:
        raise ValueError(f"pretrained is {arch.get('pretrained')!r}; it must be true or a path")
    network = _create(asked)
    if arch.get("sort") is True:
        plan = _converted(_model_of(arch, with_weights=False)).plan
        chosen = {name: group for name, group in plan.groups.items() if name in arch}
        sort_channels(network, Plan(chosen, plan.stages, plan.settings, plan.shapes, plan.lengths))
    return network


def layers(stage: str) -> tuple[str, ...]:
    """The layer-name prefix of a stage: converted networks keep their own names, `layer1` for instance."""
    return (stage,)


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the arch's network, with timm and torch alone."""
    asked = _model_of(arch, with_weights=False)
    arguments = "".join(f", {name}={value!r}" for name, value in _arguments(asked).items())
    source = f"import timm\n\nnetwork = timm.create_model({asked.name!r}{arguments})"
    return source_of(_converted(asked).plan.surgery(arch), source)


def _model_of(arch: Arch, *, with_weights: bool) -> _Model:
    model, weights = arch["model"], arch.get("pretrained", False)
    if not isinstance(model, str):
        raise ValueError(f"model is {model!r}; it must be the name of a timm model")
    resolution = "traced_at" if "traced_at" in arch else "resolution"
    named = weights if isinstance(weights, str) else "timm" if weights else ""
    return _Model(model, arch.integer("classes"), arch.integer(resolution), named if with_weights else "")


@functools.lru_cache(maxsize=_KEPT)
def _converted(asked: _Model) -> _Converted:
    # this is done unasked, the first time: the caller's random numbers must not depend on it
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        network = _create(asked).eval()
        plan, _ = propose(network, resolution=asked.traced_at)
    return _Converted(network.to("meta"), plan)


def _create(asked: _Model) -> nn.Module:
    """The timm model, with its weights.

    Raises:
        ValueError: no such model, or weights that do not fit it.
        OSError: weights that cannot be read.
    """
    timm_family.model_name({"model": asked.name})
    if not asked.weights:
        network: nn.Module = timm.create_model(asked.name, pretrained=False, **_arguments(asked))
        return network
    named: Value = True if asked.weights == "timm" else asked.weights
    said: dict[str, Value] = {"model": asked.name, "classes": asked.classes, "pretrained": named}
    return timm_family.pretrained(Arch((*said.items(), ("resolution", asked.traced_at))))


def _arguments(asked: _Model) -> dict[str, Any]:
    takes_size = "img_size" in recipe_of(asked.name).parameters
    return {"num_classes": asked.classes} | ({"img_size": asked.traced_at} if takes_size else {})


def _check_names(arch: Arch, plan: Plan) -> None:
    known = {*_CONSTANTS, *plan.stages, *plan.groups}
    strange = [name for name in arch if name not in known and not name.endswith(".precision")]
    if strange:
        near = difflib.get_close_matches(strange[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its choices are {', '.join(sorted(known)[:6])} ..."
        raise ValueError(f"{strange[0]!r} is no choice of the converted {arch['model']}; {hint}")
