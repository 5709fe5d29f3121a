"""Which layer computes in which precision: rules from layer-name prefix to precision."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from nestling.quant.formats import Code, Codebook, Format, Minifloat, Powers, Ternary

Floats = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """How a layer computes.

    Attributes:
        name: as in a policy, such as `w8a8`.
        weight: format of its weights, None for floats.
        activation: format of what it reads and writes, None for floats.
        floats: the type of what stays float.
    """

    name: str
    weight: Format | Code | None
    activation: Format | None
    floats: Floats = "float32"

    @property
    def simulated(self) -> bool:
        """Whether no runtime computes or stores it: its accuracy means something, its latency nothing."""
        if self.activation is not None and self.activation.bits < 8:
            return True
        if isinstance(self.weight, Format):
            # 4 bits are stored as such only in groups; otherwise each takes a byte of the file.
            return self.weight.bits < 8 and self.weight.group is None
        return self.weight is not None

    @property
    def integers(self) -> Format | None:
        """The integers that hold its weights; None where they are floats, or codes that are no integers."""
        return (
            self.weight.integers
            if isinstance(self.weight, Ternary)
            else (self.weight if isinstance(self.weight, Format) else None)
        )


def _weights(bits: int, *, per_channel: bool = True) -> Format:
    return Format(bits=bits, signed=True, symmetric=True, per_channel=per_channel)


def _grouped(bits: int, group: int) -> Format:
    # Zero points cost `bits` a group, and make use of all integers where a group's weights lie to one side.
    return Format(bits=bits, signed=False, symmetric=False, per_channel=True, group=group)


def _activations(bits: int, *, signed: bool = False) -> Format:
    return Format(bits=bits, signed=signed, symmetric=False, per_channel=False)


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        precision.name: precision
        for precision in (
            Precision("fp32", weight=None, activation=None),
            Precision("fp16", weight=None, activation=None, floats="float16"),
            Precision("bf16", weight=None, activation=None, floats="bfloat16"),
            # Unsigned activations: with signed ones ONNX Runtime is up to 3.4 times slower than fp32 on x86.
            Precision("w8a8", weight=_weights(8), activation=_activations(8)),
            Precision("w8a8-signed", weight=_weights(8), activation=_activations(8, signed=True)),
            Precision("w8a8-tensor", weight=_weights(8, per_channel=False), activation=_activations(8)),
            Precision(
                "w8a8-signed-tensor",
                weight=_weights(8, per_channel=False),
                activation=_activations(8, signed=True),
            ),
            # Weight-only: stored in few bits, computed in 32-bit floats.
            Precision("w8", weight=_grouped(8, 128), activation=None),
            Precision("w4", weight=_grouped(4, 32), activation=None),
            Precision("w4-g64", weight=_grouped(4, 64), activation=None),
            Precision("w4-g128", weight=_grouped(4, 128), activation=None),
            # Simulated from here on.
            Precision("w4a8", weight=_weights(4), activation=_activations(8)),
            Precision("w3a8", weight=_weights(3), activation=_activations(8)),
            Precision("w2a8", weight=_weights(2), activation=_activations(8)),
            Precision("w4a4", weight=_weights(4), activation=_activations(4)),
            Precision("w3a3", weight=_weights(3), activation=_activations(3)),
            Precision("w2a2", weight=_weights(2), activation=_activations(2)),
            Precision("ternary", weight=Ternary("mean"), activation=_activations(8)),
            Precision("ternary-median", weight=Ternary("median"), activation=_activations(8)),
            Precision("nupes4", weight=Powers(4), activation=None),
            Precision("codebook4", weight=Codebook(4), activation=None),
            Precision("fp8", weight=Minifloat(exponent=4, mantissa=3, largest=448.0), activation=None),
            Precision("fp8-e5m2", weight=Minifloat(exponent=5, mantissa=2, largest=57344.0), activation=None),
            Precision("fp4", weight=Minifloat(exponent=2, mantissa=1, largest=6.0), activation=None),
        )
    }
)
"""Every precision by its name."""


def covers(prefix: str, layer: str) -> bool:
    """Whether the layer of a dotted name begins with `prefix`.

    It does by whole steps: `blocks.1` covers `blocks.1.0.conv`, not `blocks.10`; the empty prefix covers
    everything. A step may be `*`, any name, or several names such as `q|k|v`: `blocks.*.attn.q|k|v`.
    """
    if not prefix:
        return True
    if "*" not in prefix and "|" not in prefix:  # nearly all, and asked for every layer of every candidate
        return layer.startswith(prefix) and layer[len(prefix) :][:1] in ("", ".")
    steps, names = prefix.split("."), layer.split(".")
    return len(steps) <= len(names) and all(
        step in ("*", name) or name in step.split("|") for step, name in zip(steps, names, strict=False)
    )


def most_exact(prefixes: Collection[str], layer: str) -> str | None:
    """The one of `prefixes` that decides about `layer`; None where none covers it.

    The one of most steps does, and of several the one that names more of them: a name is more exact than
    several names, and those than `*`; an earlier step counts before a later one.

    Raises:
        ValueError: two prefixes are as exact, such as `a|b` and `b|c` for `b`.
    """
    matching = [prefix for prefix in prefixes if covers(prefix, layer)]
    if len(matching) < 2:
        return matching[0] if matching else None
    matching.sort(key=_exactness)
    if _exactness(matching[-2]) == _exactness(matching[-1]):
        raise ValueError(f"{matching[-2]!r} and {matching[-1]!r} are rules as exact for the layer {layer!r}")
    return matching[-1]


def _exactness(prefix: str) -> tuple[int, tuple[int, ...]]:
    steps = prefix.split(".") if prefix else []
    return len(steps), tuple(0 if step == "*" else 1 if "|" in step else 2 for step in steps)


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """A precision for every layer: the rule with the most exact matching prefix wins (see `covers` and
    `most_exact`); without one it is `fp32`.

    Attributes:
        rules: pairs of a layer-name prefix and the name of a precision, in any order.

    Raises:
        ValueError: an unknown precision, or two rules for one prefix.
    """

    rules: tuple[tuple[str, str], ...] = ()
    _known: dict[str, Precision] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for prefix, name in self.rules:
            if name not in PRECISIONS:
                near = difflib.get_close_matches(name, PRECISIONS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRECISIONS)}"
                raise ValueError(f"policy for {prefix!r}: unknown precision {name!r}; {hint}")
        prefixes = [prefix for prefix, _ in self.rules]
        twice = [prefix for prefix in dict.fromkeys(prefixes) if prefixes.count(prefix) > 1]
        if twice:
            raise ValueError(f"policy has two rules for {twice[0]!r}; keep one")

    def precision(self, layer: str) -> Precision:
        """The precision of the layer with this dotted name.

        Raises:
            ValueError: see `most_exact`.
        """
        if layer not in self._known:  # a rule for each layer of a deep network: they are many to look through
            names = dict(self.rules)
            prefix = most_exact(names, layer)
            self._known[layer] = PRECISIONS["fp32" if prefix is None else names[prefix]]
        return self._known[layer]

    @property
    def simulated(self) -> tuple[str, ...]:
        """The precisions of its rules that no runtime computes: with any, a latency means nothing."""
        return tuple(dict.fromkeys(name for _, name in self.rules if PRECISIONS[name].simulated))
