"""Proposes a search space of a timm model: which arguments of its constructor can be elastic, and which not.

Each argument that is a number is tried with smaller values: does timm build the network, do its tensors fit
into the largest network's, does it run, and is it cheaper. All of that takes place on the meta device.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nestling.models import timm_family
from nestling.models.building import build_shapes
from nestling.models.cost import Cost, cost
from nestling.models.layouts import find_layout
from nestling.models.lending import lend, lend_buffers, plan_cuts
from nestling.models.meaning import ALIKE, OTHERWISE, Meaning
from nestling.models.timm_arguments import parts_of, recipe_of
from nestling.space import Arch, Choice, SearchSpace, Value

COMBINATIONS = 12
NEVER = (
    "in_chans", "num_classes", "img_size", "drop_rate", "drop_path_rate", "device", "dtype", "out_indices",
    "output_stride", "patch_size",
)  # fmt: skip
"""Arguments that say what a network reads and gives, at which scale: not how large it is."""
_WIDTH = 16
Run = Callable[[Mapping[str, Value]], Cost]
"""What a network costs that differs from the largest in these arguments; raises where there is none."""
_FAILS = (
    ValueError,
    RuntimeError,
    TypeError,
    AssertionError,
    IndexError,
    KeyError,
    AttributeError,
    ArithmeticError,
)


@dataclass(frozen=True, slots=True)
class Argument:
    """What was found out about one argument of a model's constructor.

    Attributes:
        name: as a space's choice names it.
        values: those that it may have, from cheapest to the model's own; only the model's own where it
            cannot be elastic.
        macs: the multiply-accumulates at the smallest value, per one of the largest network's.
        params: the same of parameters.
        reason: why it cannot be elastic, or has not more values; empty where nothing was in the way.
    """

    name: str
    values: tuple[Value, ...]
    macs: float = 1.0
    params: float = 1.0
    reason: str = ""

    @property
    def elastic(self) -> bool:
        """Whether there is something to choose."""
        return len(self.values) > 1


@dataclass(frozen=True, slots=True)
class Proposal:
    """A space of a timm model.

    Attributes:
        model: timm's name.
        constants: what every network of the space shares: `resolution`, `classes` and given arguments.
        arguments: all that were tried.
        largest: what the largest network costs.
    """

    model: str
    constants: Mapping[str, Value]
    arguments: tuple[Argument, ...]
    largest: Cost

    @property
    def elastic(self) -> tuple[Argument, ...]:
        """The arguments that can be elastic."""
        return tuple(argument for argument in self.arguments if argument.elastic)

    def space(self) -> SearchSpace:
        """The space in which all elastic arguments are choices."""
        return _space(self.model, self.constants, {a.name: a.values for a in self.elastic})

    def to_toml(self) -> str:
        """The space as a file that `load_space` reads; comments say what each argument does, or why not."""
        giga = self.largest.macs / 1e9
        lines = [
            f"# Proposed by Nestling for timm's {self.model}; the largest network has {giga:.3g} GMACs and",
            f"# {self.largest.params / 1e6:.3g} M parameters. Behind an argument is what its smallest value",
            "# leaves of them.",
            'family = "timm"',
            f"model = {_toml(self.model)}",
            *(f"{_key(name)} = {_toml(value)}" for name, value in self.constants.items()),
            "",
        ]
        for argument in self.elastic:
            values = ", ".join(_toml(value) for value in argument.values)
            effect = f"x{argument.macs:.2f} MACs, x{argument.params:.2f} parameters"
            lines.append(f"{_key(argument.name)} = [{values}]  # {effect}")
        fixed = [argument for argument in self.arguments if not argument.elastic]
        if fixed:
            lines += ["", "# Not elastic:"]
            lines += [f"# {a.name} = {a.values[-1]!r}: {' '.join(a.reason.split())}" for a in fixed]
        return "\n".join(lines) + "\n"


def propose(
    model: str,
    *,
    resolution: int | None = None,
    classes: int = 1000,
    given: Mapping[str, Value] | None = None,
    enough: int | None = None,
) -> Proposal:
    """A space of timm's `model`, whose largest network is the model itself.

    Args:
        model: timm's name.
        resolution: of the images in pixels; where it is not given, the one that timm trained it with.
        classes: of the data set.
        given: arguments that the largest network has in place of timm's own.
        enough: of so many elastic arguments the rest are not tried; all are where it is not given.

    Raises:
        ValueError: no such model or argument, or the largest network does not run at that resolution.
    """
    recipe = recipe_of(timm_family.model_name({"model": model}))
    constants: dict[str, Value] = {
        "resolution": resolution or native_resolution(model),
        "classes": classes,
        **(given or {}),
    }
    base = _space(model, constants, {}).largest
    trial = _Trial(base)
    whole = timm_family.changes(base)
    named = (
        leaf
        for first, held in recipe.parameters.items()
        if first not in NEVER
        for leaf in _leaves(first, whole.get(first, held))
    )
    tried: list[Argument] = []
    for name, value in named:
        if enough is not None and sum(argument.elastic for argument in tried) >= enough:
            break
        tried.append(trial.argument(name, value))
    arguments = _together(model, constants, tried, run=trial.run)
    kept = {
        name: value
        for name, value in constants.items()
        if name not in {a.name for a in arguments if a.elastic}
    }
    return Proposal(model, kept, tuple(arguments), trial.cost)


def native_resolution(model: str) -> int:
    """Side in pixels of the images that timm's `model` was trained with; 224 where timm does not say.

    Raises:
        ValueError: no such model.
    """
    recipe = recipe_of(timm_family.model_name({"model": model}))
    size: Any = recipe.weights["pretrained_cfg"].get("input_size") or (3, 224, 224)
    return int(size[-1])


class _Trial:
    """The largest network of a space, and whether smaller ones fit into it."""

    def __init__(self, largest: Arch) -> None:
        self.arch = largest
        self.network = build_shapes(timm_family.build, largest)
        self.tensors = _tensors(self.network)
        self.layout = find_layout(self.network, largest)
        self.meaning = Meaning(timm_family.build, layout=find_layout, largest=largest)
        try:
            self.cost = cost(self.network, largest.integer("resolution"))
        except _FAILS as error:
            side = largest["resolution"]
            raise ValueError(f"{largest['model']} does not run at {side} px: {_told(error)}") from error

    def run(self, changed: Mapping[str, Value]) -> Cost:
        """What the network costs in which `changed` differs from the largest.

        Raises:
            ValueError, RuntimeError, TypeError: it cannot be built, does not fit, or does not run.
        """
        arch = Arch(tuple({**self.arch, **changed}.items()))
        network = build_shapes(timm_family.build, arch)
        small = _tensors(network)
        cuts = plan_cuts(self.tensors, small, layouts=(self.layout, find_layout(network, arch)))
        lend(self.tensors, dict(network.named_parameters()), cuts=cuts)
        lend_buffers(self.tensors, network, cuts=cuts)
        return cost(network, arch.integer("resolution"))

    def argument(self, name: str, value: int | float) -> Argument:
        """`name` with those smaller values than `value` with which the network fits and is cheaper."""
        good: dict[Value, Cost] = {value: self.cost}
        reasons = []
        for alternatives in _smaller(name, value):
            for smaller in alternatives:
                try:
                    found = self.run({name: smaller})
                except _FAILS as error:
                    reasons.append(f"{smaller}: {_told(error)}")
                    continue
                if found.macs > self.cost.macs or found.params > self.cost.params:
                    reasons.append(f"{smaller}: it costs more, not less")
                elif any((found.macs, found.params) == (c.macs, c.params) for c in good.values()):
                    reasons.append(f"{smaller}: it costs the same")
                else:
                    good[smaller] = found
                break
        if len(good) > 1:
            gap = self.meaning.difference(Arch(tuple({**self.arch, name: min(good)}.items())))
            if gap is not None and gap > ALIKE:
                return Argument(name, (value,), reason=f"{min(good)}: {OTHERWISE.format(gap)}")
        values = tuple(sorted(good))
        least = good[values[0]]
        reason = "; ".join(reasons) or ("" if len(values) > 1 else "nothing smaller was tried")
        return Argument(name, values, least.macs / self.cost.macs, least.params / self.cost.params, reason)


def _together(
    model: str, constants: Mapping[str, Value], tried: list[Argument], *, run: Run
) -> list[Argument]:
    """`tried`, with those no longer elastic that do not go together with the others."""
    rng, checked = random.Random(0), 0
    while checked < COMBINATIONS:
        space = _space(model, constants, {a.name: a.values for a in tried if a.elastic})
        arch = space.smallest if checked == 0 else space.sample(rng)
        changed = {c.name: arch[c.name] for c in space.open_choices if arch[c.name] != c.values[-1]}
        try:
            run(changed)
            checked += 1
        except _FAILS as error:
            offender = _offender(changed, run=run)
            why = f"not with other arguments: {_told(error)}"
            tried = [Argument(a.name, a.values[-1:], reason=why) if a.name == offender else a for a in tried]
            checked = 0
    return tried


def _offender(changed: Mapping[str, Value], *, run: Run) -> str:
    """The argument that makes a row of them fail: those before it go together."""
    row: dict[str, Value] = {}
    for name, value in changed.items():
        row[name] = value
        try:
            run(row)
        except _FAILS:
            return name
    raise AssertionError("all of them together failed before")


def _leaves(name: str, held: Any, *, depth: int = 0) -> Iterator[tuple[str, int | float]]:
    """The numbers in an argument and their names; for a list of blocks also how many they are."""
    if isinstance(held, bool) or depth > 5:
        return
    if isinstance(held, int | float):
        if held > (1 if isinstance(held, int) else 0.01):  # else there is nothing smaller to try
            yield name, held
        return
    parts = parts_of(held)
    if isinstance(held, list | tuple) and held and all(isinstance(part, Mapping) for part in held):
        if len(held) > 1:
            yield name, len(held)
        shared = [key for key in held[0] if all(part.get(key) == held[0][key] for part in held)]
        for key in shared:
            yield from _leaves(f"{name}.*.{key}", held[0][key], depth=depth + 1)
        parts = {
            f"{index}.{key}": part[key]
            for index, part in enumerate(held)
            for key in part
            if key not in shared
        }
    for key, part in parts.items():
        yield from _leaves(f"{name}.{key}", part, depth=depth + 1)


def _smaller(name: str, value: int | float) -> list[tuple[int | float, ...]]:
    """Values to try in place of `value`: of each tuple the first that fits."""
    if isinstance(value, float):
        return [(value / 2,), (value * 0.75,)]
    if "kernel" in name and value % 2:  # a part has the large kernel's centre where both are odd
        return [(kernel,) for kernel in range(3, value, 2)]
    if value < _WIDTH:
        return [(fewer,) for fewer in sorted({max(1, value // 2), value - 1})]
    tries: list[tuple[int | float, ...]] = []
    for part in (0.5, 0.75):  # rounded as hardware likes it, or else exact: heads may not divide the rounded
        rounded, exact = 8 * max(1, round(value * part / 8)), int(value * part)
        tries.append(tuple(dict.fromkeys(width for width in (rounded, exact) if width < value)))
    return tries


def _space(
    model: str, constants: Mapping[str, Value], elastic: Mapping[str, tuple[Value, ...]]
) -> SearchSpace:
    fixed = {"model": model, **{name: value for name, value in constants.items() if name not in elastic}}
    choices = [Choice(name, (value,)) for name, value in fixed.items()]
    return SearchSpace("timm", (*choices, *(Choice(name, values) for name, values in elastic.items())))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def _told(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name) else json.dumps(name)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
