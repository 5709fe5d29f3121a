"""Writing down what a network asks of PyTorch, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from nestling.models.operators import Attribute, Operator
from nestling.models.tracing.places import IMAGES, Place, place_after

Translation = Callable[..., str | tuple[str, ...]]

UNWRITTEN = "?"
"""The name of a result that no operator writes, such as where a maximum lies: none may read it."""


class Untraceable(ValueError):  # noqa: N818 the word says it
    """A network with an operation that no translation covers; the message names it and the layer."""


class Recorder(TorchFunctionMode):
    """Writes down, as operators, what a network does to a tensor while it runs.

    The network runs for real, so shapes are plain numbers and Python may branch on them.

    Args:
        translations: PyTorch function -> what records it, called with this recorder and the function's own
            arguments; it returns the name of the tensor that the function returns, or a tuple of names.
        queries: functions whose answers are plain numbers: they are let through.

    Attributes:
        operators: what was recorded, in order.
        layers: the modules being run, outermost first; whoever runs the network keeps it up to date.
    """

    def __init__(self, translations: Mapping[Any, Translation], *, queries: Set[Any]) -> None:
        super().__init__()
        self._translations = translations
        self._queries = queries
        self.operators: list[Operator] = []
        self.layers: list[str] = [""]
        self._names: dict[int, str] = {}
        self._taken: set[str] = set()
        self._kept: list[Tensor] = []
        self._places: dict[str, Place] = {}

    def bind(self, tensor: Tensor, name: str) -> None:
        """Calls `tensor` `name` from here on. It is kept alive, so that its id stays its own."""
        self._names[id(tensor)] = name
        self._kept.append(tensor)

    def name(self, tensor: object) -> str | None:
        """The name of `tensor` if it depends on the input, None if it is a constant."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def images_axis(self, name: str) -> int:
        """The axis along which the tensor called `name` counts images, or images and what comes of each."""
        return self._places.get(name, IMAGES).axis

    def read(self, tensor: Tensor) -> str:
        """The name of `tensor`.

        Raises:
            Untraceable: it is a constant where only a computed tensor is known.
        """
        name = self.name(tensor)
        if name is None:
            raise self.untraceable("an operation on a constant")
        return name

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        attributes: dict[str, Attribute] | None = None,
    ) -> str:
        """The name of the tensor that the operator recorded here writes."""
        if UNWRITTEN in inputs:
            raise self.untraceable("the second result of an operation")
        layer = self.layers[-1]
        stem = f"{layer}/{kind}" if layer else kind
        name, count = stem, 1
        while name in self._taken:
            name, count = f"{stem}.{count}", count + 1
        self._taken.add(name)
        places = [self._places.get(read, IMAGES) for read in inputs]
        self._places[name] = place_after(kind, attributes or {}, places, weight)
        constants = [None if c is None else c.detach().clone() for c in (weight, bias)]
        self.operators.append(Operator(kind, name, tuple(inputs), layer, attributes or {}, *constants))
        return name

    def untraceable(self, what: str) -> Untraceable:
        """The error that says `what` cannot be traced, with the layer that asked for it."""
        return Untraceable(f"layer {self.layers[-1] or '(the network itself)'!r}: {what} cannot be traced")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        on_constants = not any(self.name(value) for value in flat((*args, *kwargs.values())))
        if on_constants or func in self._queries:
            return func(*args, **kwargs)
        if func not in self._translations:
            raise self.untraceable(resolve_name(func) or repr(func))
        # Translated first: an in-place operation gives its operand's tensor the name of its result.
        try:
            written = self._translations[func](self, *args, **kwargs)
        except TypeError as error:
            raise self.untraceable(f"{resolve_name(func)} called like this ({error})") from error
        result = func(*args, **kwargs)
        pairs = [(result, written)] if isinstance(written, str) else zip(result, written, strict=True)
        for tensor, name in pairs:
            # What writes to a part of its first operand returns nothing.
            changed = args[0] if tensor is None and name != UNWRITTEN else tensor
            if name != UNWRITTEN and changed.dtype != torch.float32:
                raise self.untraceable(f"{resolve_name(func)} that gives {changed.dtype}")
            if changed is not None:
                self.bind(changed, name)
        return result


def like(tensor: Tensor, value: Tensor | float) -> Tensor:
    """`value` as a constant of the type and on the device of `tensor`."""
    return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)


def flat(values: Sequence[Any]) -> list[Any]:
    """`values`, with tuples and lists among them replaced by what they hold."""
    return [leaf for value in values for leaf in (value if isinstance(value, tuple | list) else (value,))]
