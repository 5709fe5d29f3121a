"""How timm makes a model: the class that it calls, with which arguments, and what lies inside of them.

timm's entry function of a model is asked for it, and stopped where it would call the class: what is recorded
is what timm does, for each of its models.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import timm
from timm.models import resolve_pretrained_cfg
from torch import nn

from nestling.space import Value

REFUSALS = (
    TypeError, ValueError, AssertionError, IndexError, KeyError, RuntimeError, AttributeError,
    NotImplementedError, ZeroDivisionError,
)  # fmt: skip
"""What timm's constructors raise when they are given what they cannot use."""
_lock = threading.RLock()


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How timm makes a model: what it calls, and with which arguments.

    Attributes:
        constructor: the model's class.
        arguments: what timm passes to it.
        parameters: every argument that it takes, by name, with the value that it has in this model;
            `inspect.Parameter.empty` where it has none.
        weights: where timm finds the model's weights, and how it reads them: arguments of `load_pretrained`.
    """

    constructor: type[nn.Module]
    arguments: Mapping[str, Any]
    parameters: Mapping[str, Any]
    weights: Mapping[str, Any]


class _Recorded(Exception):  # noqa: N818 it is how a recording ends, not an error
    """Carries what timm is about to construct out of timm."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe


@functools.lru_cache(maxsize=64)
def recipe_of(model: str) -> Recipe:
    """How timm makes `model`. Nothing is built.

    Raises:
        ValueError: no such model, or one that is cut to a stored shape after it is made.
    """
    return record(model, {})


def record(model: str, arguments: Mapping[str, Any]) -> Recipe:
    """What timm constructs when it is asked for `model` with `arguments`."""
    try:
        with _recording():
            timm.create_model(model, pretrained=False, **arguments)
    except _Recorded as recorded:
        return recorded.recipe
    except REFUSALS as error:
        raise ValueError(f"timm does not make {model}: {type(error).__name__}: {error}") from error
    raise ValueError(f"timm makes {model} in a way of its own; it cannot be a space's model")


@contextmanager
def _recording() -> Iterator[None]:
    """Stops timm on this thread where it would construct a model, and has it raise `_Recorded`."""
    build_model = timm.models.build_model_with_cfg
    here = threading.get_ident()

    def record(constructor: Any, variant: str, pretrained: bool, **options: Any) -> Any:
        if threading.get_ident() != here:
            return build_model(constructor, variant, pretrained, **options)
        if options.get("pruned"):
            raise ValueError("its layers are cut to stored shapes after it is made")

        def stop(**arguments: Any) -> nn.Module:
            config: Any = resolve_pretrained_cfg(
                variant, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay")
            )
            weights = {
                "pretrained_cfg": config.to_dict(),
                "filter_fn": options.get("pretrained_filter_fn"),
                "strict": options.get("pretrained_strict", True),
                "in_chans": arguments.get("in_chans", 3),
            }
            defaults = _parameters(constructor)
            raise _Recorded(Recipe(constructor, arguments, defaults | arguments, weights))

        return build_model(stop, variant, pretrained, **options)

    with _lock, ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and vars(module).get("build_model_with_cfg") is build_model:
                patches.enter_context(mock.patch.object(module, "build_model_with_cfg", record))
        yield


def _parameters(constructor: type[nn.Module]) -> dict[str, Any]:
    """The arguments of `constructor` with their defaults; those that it passes on are its parents'."""
    found: dict[str, Any] = {}
    for parent in constructor.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = list(inspect.signature(parent).parameters.values())
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter.default)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def part_of(held: Any, key: str, *, name: str) -> Any:
    """What is called `key` inside of an argument."""
    parts = parts_of(held)
    if key not in parts:
        near = difflib.get_close_matches(key, parts, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(parts) or 'nothing inside'}"
        raise ValueError(f"{name}: there is no {key!r}; {hint}")
    return parts[key]


def parts_of(held: Any) -> dict[str, Any]:
    """The parts of an argument by name."""
    if isinstance(held, Mapping):
        return {str(key): part for key, part in held.items()}
    if isinstance(held, list | tuple):
        return {str(index): part for index, part in enumerate(held)}
    if isinstance(held, functools.partial):
        return dict(held.keywords)
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        return {f.name: held.__getattribute__(f.name) for f in dataclasses.fields(held) if f.init}
    return {}


def replaced(held: Any, inside: list[str], value: Value, *, name: str) -> Any:
    """`held` with the part at the path `inside` replaced by `value`."""
    if not inside:
        parts = list(held) if isinstance(held, list | tuple) else []
        if (
            not parts
            or isinstance(value, bool | str | float)
            or any(isinstance(p, int | float) for p in parts)
        ):
            return value
        if not 1 <= value <= len(parts):
            raise ValueError(f"{name} is {value}; it says how many of {len(parts)} remain")
        return type(held)(parts[:value])
    key, *deeper = inside
    if key == "*" and isinstance(held, list | tuple):
        return type(held)(replaced(part, deeper, value, name=name) for part in held)
    part = replaced(part_of(held, key, name=name), deeper, value, name=name)
    if isinstance(held, Mapping):
        return {**held, key: part}
    if isinstance(held, list | tuple):
        return type(held)(part if str(index) == key else other for index, other in enumerate(held))
    if isinstance(held, functools.partial):
        return functools.partial(held.func, *held.args, **{**held.keywords, key: part})
    return dataclasses.replace(held, **{key: part})


def alike(first: Any, second: Any) -> bool:
    """Whether two arguments are equal, part by part: two equal `functools.partial` are not for Python."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, functools.partial) and (first.func is not second.func or first.args != second.args):
        return False
    parts, others = parts_of(first), parts_of(second)
    if not parts:
        return bool(first == second)
    return parts.keys() == others.keys() and all(alike(part, others[key]) for key, part in parts.items())


def source(value: Any) -> tuple[str, set[str]]:
    """Python source of a value that timm passes to a constructor, and the modules that it needs imported.

    Raises:
        ValueError: a value that has no name that can be imported, such as a lambda.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value), set()
    modules: set[str] = set()

    def inner(held: Any) -> str:
        text, needed = source(held)
        modules.update(needed)
        return text

    if isinstance(value, functools.partial):
        modules.add("functools")
        words = [inner(value.func), *map(inner, value.args)]
        words += [f"{key}={inner(held)}" for key, held in value.keywords.items()]
        return f"functools.partial({', '.join(words)})", modules
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(k)}: {inner(held)}" for k, held in value.items()) + "}", modules
    if isinstance(value, list | tuple):
        words = [inner(held) for held in value]
        if isinstance(value, list):
            return f"[{', '.join(words)}]", modules
        return f"({', '.join(words)}{',' if len(words) == 1 else ''})", modules
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        words = [
            f"{f.name}={inner(value.__getattribute__(f.name))}" for f in dataclasses.fields(value) if f.init
        ]
        return f"{inner(type(value))}({', '.join(words)})", modules
    if isinstance(value, type | FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}", {value.__module__}
    raise ValueError(f"{value!r} cannot be written as source: it has no name that can be imported")
