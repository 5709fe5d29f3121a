"""Any timm model without code: a space's choices are the arguments of the model's constructor.

```toml
family = "timm"
model = "resnet18"
"layers.0" = [1, 2]
"channels.3" = [256, 384, 512]
```

A name is an argument of the class that timm's `model` is, with dots for what lies inside: an element of a
list, a key of a table, a field of a configuration, a keyword of a `functools.partial`. What is not named
keeps the value that timm gives it. Where the argument holds a list of tables or lists (an EfficientNet's
`block_args.2` is the list of a stage's blocks), a whole number is how many of them remain, from the first;
`*` is each element of a list (`block_args.2.*.exp_ratio`). Choices apply in the order of the space.

Global: `model` (timm's name), `classes`, `resolution` (the constructor's `img_size`, where it takes one),
`pretrained` (see `pretrained`). Names that end in `.precision` begin with a layer's prefix:
`layer1.precision`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_pretrained
from torch import nn

from nestling.models.timm_arguments import REFUSALS, alike, part_of, recipe_of, record, replaced, source
from nestling.space import Arch, Value

_GLOBALS = ("model", "classes", "resolution", "pretrained")


def build(arch: Arch) -> nn.Module:
    """The plain timm network of `arch`, with random weights, its logits of shape (N, classes).

    Raises:
        ValueError: no such model, or no such argument: the nearest name is given. Or values that the model's
            constructor refuses.
    """
    recipe = recipe_of(model_name(arch))
    arguments = {**recipe.arguments, **changes(arch)}
    try:
        return recipe.constructor(**copy.deepcopy(arguments))
    except REFUSALS as error:
        if isinstance(error, RuntimeError | TypeError) and torch.empty(0).is_meta:
            raise  # it may be that tensors there have no numbers: no refusal of timm's
        told = ", ".join(f"{name} = {value!r}" for name, value in arch.items() if _is_argument(name))
        kind = type(error).__name__
        raise ValueError(
            f"{arch['model']} cannot be made with {told or 'no choice'}: {kind}: {error}"
        ) from error


def model_name(arch: Mapping[str, Value]) -> str:
    """timm's name of the arch's model.

    Raises:
        ValueError: `model` is missing, or no name of timm's; the nearest one is given.
    """
    name = arch.get("model")
    if not isinstance(name, str):
        raise ValueError('a timm space names its model; write, for instance, model = "resnet18"')
    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}; {hint}")
    return name


def changes(arch: Arch) -> dict[str, Any]:
    """The constructor's arguments, whole, that the arch's choices change.

    Raises:
        ValueError: no such argument, or nothing of that name inside it; the nearest name is given.
    """
    recipe = recipe_of(model_name(arch))
    changed: dict[str, Any] = {}
    if "num_classes" in recipe.parameters and "classes" in arch:
        changed["num_classes"] = arch.integer("classes")
    if "img_size" in recipe.parameters and "resolution" in arch:
        changed["img_size"] = arch.integer("resolution")
    for name, value in arch.items():
        if _is_argument(name):
            first, *inside = name.split(".")
            held = changed.get(first, part_of(recipe.parameters, first, name=f"{arch['model']}: {name}"))
            changed[first] = replaced(held, inside, value, name=name)
    return changed


def layers(stage: str) -> tuple[str, ...]:
    """The prefix of the names of a stage's layers: in this family a stage is named by that prefix."""
    return (stage,)


def rebuild(arch: Arch) -> str:
    """Python source that defines `network`, the plain network of `arch`, with timm alone.

    It calls `timm.create_model` where that takes the arch's arguments, the model's class where it does not.

    Raises:
        ValueError: see `build`; or an argument that cannot be written as source.
    """
    model, changed = model_name(arch), changes(arch)
    recipe = recipe_of(model)
    wanted = {**recipe.arguments, **changed}
    try:
        taken = alike(record(model, changed).arguments, wanted)
    except REFUSALS:
        taken = False
    function, words = ("timm.create_model", changed) if taken else (source(recipe.constructor)[0], wanted)
    modules = {"timm"} if taken else set(source(recipe.constructor)[1])
    lines = [f"    {model!r},", "    pretrained=False,"] if taken else []
    for name, value in words.items():
        text, needed = source(value)
        modules |= needed
        lines.append(f"    {name}={text},")
    imports = [f"import {module}" for module in sorted(modules)]
    return "\n".join([*imports, "", f"network = {function}(", *lines, ")"]) + "\n"


def pretrained(arch: Arch) -> nn.Module:
    """The network of `arch` with the weights that its `pretrained` names, in evaluation mode.

    `pretrained` is `true` (timm's own weights of the model), the path of a checkpoint, or a name on the
    Hugging Face hub such as `hf-hub:timm/resnet18.a1_in1k`. Weights are read as timm reads them: position
    tables are interpolated to `resolution`, and where timm's weights are of another number of classes than
    `classes` (one that a checkpoint of the user's must have) the classifier stays random.

    Raises:
        ValueError: `pretrained` is none of these, or the weights do not fit: the tensors are named.
        FileNotFoundError: there is no such checkpoint.
    """
    weights = dict(recipe_of(model_name(arch)).weights)
    config = _where(arch, weights.pop("pretrained_cfg"))
    network = build(arch)
    of_timm, read = weights.pop("filter_fn"), set[str]()

    def noted(state: dict[str, Any], _: nn.Module) -> dict[str, Any]:
        if of_timm is not None:
            takes_network = len(inspect.signature(of_timm).parameters) > 1
            state = of_timm(state, network) if takes_network else of_timm(state)
        read.update(state)
        return state

    told = f"the weights that pretrained = {arch['pretrained']!r} names do not fit {arch['model']}"
    classes = arch.integer("classes") if "classes" in arch else config["num_classes"]
    try:
        load_pretrained(network, config, num_classes=classes, filter_fn=noted, **weights)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{told}: {error}") from error
    if read and weights["strict"]:  # where the classifier is left out timm looks no longer for other gaps
        named = config.get("classifier") or ()
        heads = (named,) if isinstance(named, str) else tuple(named)
        odd = [n for n in read.symmetric_difference(network.state_dict()) if not n.startswith(heads)]
        if odd:
            more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
            raise ValueError(f"{told}: only one of the two has {', '.join(sorted(odd)[:5])}{more}")
    return network.eval()


def _where(arch: Arch, of_timm: Mapping[str, Any]) -> dict[str, Any]:
    """timm's description of a model's weights, with the place that the arch's `pretrained` names."""
    wanted, config = arch.get("pretrained"), dict(of_timm)
    if wanted is True:
        if not any(config.get(key) for key in ("url", "file", "hf_hub_id")):
            raise ValueError(f"pretrained is true, but timm has no weights of {arch['model']}; give a path")
    elif not isinstance(wanted, str):
        raise ValueError(f'pretrained is {wanted!r}; write true, a path or "hf-hub:OWNER/NAME"')
    elif wanted.startswith("hf-hub:"):
        config |= {"hf_hub_id": wanted.removeprefix("hf-hub:"), "url": "", "file": None}
        config["custom_load"] = False
    elif Path(wanted).is_file():
        config |= {"file": wanted, "custom_load": False, "label_offset": 0}
        config["num_classes"] = arch.get("classes", config["num_classes"])
    else:
        raise FileNotFoundError(f"pretrained is {wanted!r}; there is no such file")
    return config


def _is_argument(name: str) -> bool:
    return name not in _GLOBALS and not name.endswith(".precision")
