"""Which layers of a converted network became elastic, by which choice, and why others did not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from nestling.models.convert.surgery import Plan


@dataclass(frozen=True, slots=True)
class Row:
    """One layer with weights.

    Attributes:
        layer: its name; empty for the network itself.
        kind: its class.
        params: how many numbers it holds.
        choices: those that change its size, or whether it is there at all.
        why_not: why no choice changes its size; empty where one does.
    """

    layer: str
    kind: str
    params: int
    choices: tuple[str, ...]
    why_not: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """All layers with weights, and all choices that were proposed and refused.

    Attributes:
        rows: a row for each layer with weights.
        refused: by choice, why it was left out.
    """

    rows: tuple[Row, ...]
    refused: Mapping[str, str]

    @property
    def elastic_share(self) -> float:
        """The share, in [0, 1], of all weights that lie in layers that a choice changes."""
        total = sum(row.params for row in self.rows)
        return sum(row.params for row in self.rows if row.choices) / max(total, 1)

    def __str__(self) -> str:
        lines = [("layer", "kind", "weights", "elastic by, or why not")]
        lines += [
            (
                row.layer or "(network)",
                row.kind,
                f"{row.params:,}",
                ", ".join(row.choices) or f"- {row.why_not}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        elastic = sum(bool(row.choices) for row in self.rows)
        text = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines]
        text.append(
            f"{elastic} of {len(self.rows)} layers are elastic, with {self.elastic_share:.1%} of the weights"
        )
        return "\n".join(text)


def cover(
    network: nn.Module, proposed: Plan, *, accepted: Plan, refused: Mapping[str, str], whole: str
) -> Coverage:
    """The coverage of `network`.

    Args:
        network: that was converted.
        proposed: with every group and stage that was found.
        accepted: with those that became choices.
        refused: why others did not, by name.
        whole: why a layer that nothing governs is not elastic.
    """
    return Coverage(
        tuple(_rows(network, proposed, accepted=accepted, refused=refused, whole=whole)), dict(refused)
    )


def _rows(
    network: nn.Module, proposed: Plan, *, accepted: Plan, refused: Mapping[str, str], whole: str
) -> Iterator[Row]:
    for layer, module in network.named_modules():
        held = [f"{layer}.{own}" if layer else own for own, p in module._parameters.items() if p is not None]
        if not held:
            continue
        params = sum(p.numel() for p in module.parameters(recurse=False))
        choices = dict.fromkeys(
            name for axis, names in accepted.governing.items() if axis[0] in held for name in names
        )
        for name, stage in accepted.stages.items():
            if any(layer == b or layer.startswith(f"{b}.") for b in stage.blocks[stage.least :]):
                choices[name] = None
        reasons = dict.fromkeys(
            f"{name}: {refused[name]}"
            for axis, names in proposed.governing.items()
            if axis[0] in held
            for name in names
            if name in refused
        )
        why_not = "" if choices else "; ".join(reasons) or whole
        yield Row(layer, type(module).__name__, params, tuple(choices), why_not)
