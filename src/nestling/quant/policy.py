"""Which layer computes in which precision: rules from layer-name prefix to precision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nestling.quant.formats import Format


@dataclass(frozen=True, slots=True)
class Precision:
    """How a layer computes.

    Attributes:
        name: as in a policy, such as `w8a8`.
        weight: format of its weights, None for 32-bit floats.
        activation: format of what it reads and writes, None for 32-bit floats.
    """

    name: str
    weight: Format | None
    activation: Format | None


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "fp32": Precision("fp32", weight=None, activation=None),
        # Unsigned activations: with signed ones ONNX Runtime is up to 3.4 times slower than fp32 on x86.
        "w8a8": Precision(
            "w8a8",
            weight=Format(bits=8, signed=True, symmetric=True, per_channel=True),
            activation=Format(bits=8, signed=False, symmetric=False, per_channel=False),
        ),
    }
)
"""Every precision by its name."""


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """A precision for every layer: the rule with the longest matching prefix wins; without one it is `fp32`.

    A prefix matches whole steps of a dotted name: `blocks.1` covers `blocks.1.0.conv`, not `blocks.10`; the
    empty prefix covers everything.

    Attributes:
        rules: pairs of a layer-name prefix and the name of a precision, in any order.

    Raises:
        ValueError: an unknown precision, or two rules for one prefix.
    """

    rules: tuple[tuple[str, str], ...] = ()

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
        """The precision of the layer with this dotted name."""
        matching = [rule for rule in self.rules if not rule[0] or f"{layer}.".startswith(f"{rule[0]}.")]
        return PRECISIONS[max(matching, key=lambda rule: len(rule[0]))[1] if matching else "fp32"]
