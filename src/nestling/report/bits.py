"""The bits of every network layer by layer, and what each layer loses by it. An empty section is None."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from nestling.report.content import LayerBits, Member, ReportContent
from nestling.report.markup import Markup, section, tag
from nestling.report.units import count

WIDTHS = ((32, "32 bits"), (16, "16"), (8, "8"), (4, "4 to 7"), (2, "fewer"))
"""The least bits of each shade, and its name in the legend."""
GAP = 0.14
"""Of a bar's place."""
BAR = 80
"""The height of 32 bits, in percent of a row's."""
LOWEST = 0.06
"""The height of the lowest bar of sensitivity, of a row's."""
LEAST_LABEL = 0.07
"""Of the width that a label of a part of the network needs."""
MOST_NAMED = 3
"""The most sensitive layers, named for those who cannot see the bars."""


def bit_maps(content: ReportContent, numbers: Mapping[str, int]) -> Markup | None:
    """A row of bars for each member, then for each precision how sensitive each layer is to it."""
    members = [member for member in content.ordered_members if member.layers]
    if all(layer.precision == "fp32" for member in members for layer in member.layers):
        return None
    names = merged([[layer.name for layer in member.layers] for member in members])
    rows = [_row(str(numbers[member.arch_key]), _member_bars(member, names, content)) for member in members]
    precisions = _precisions(content.sensitivity)
    if precisions:
        rows += [
            _row(name, bars)
            for name in precisions
            if (bars := _sensitivity_bars(content.sensitivity, name, names)) is not None
        ]
    shades = [tag("span", label, class_=f"key shade-{least}") for least, label in WIDTHS]
    note = (
        "A bar for each convolution and linear layer, first to last: the bits of its weights, higher by a "
        "step for each doubling, and in the strip beneath those of what the layer reads. Where a network "
        "lacks a layer its place is empty."
    )
    if precisions:
        note += (
            " The last rows tell how far the answers of the largest network move where that layer alone is "
            "quantized (the divergence in nats, to second order, on a logarithmic scale)."
        )
    return section(
        "Bits, layer by layer",
        tag("div", *rows, _row("", _labels(names)), class_="bits"),
        tag("p", *shades, class_="legend"),
        tag("p", note, class_="caption"),
    )


def merged(lists: Iterable[Sequence[str]]) -> list[str]:
    """Every name once, in an order that each of `lists` keeps, as far as they agree."""
    found: list[str] = []
    for names in sorted(lists, key=len, reverse=True):
        place = 0
        for name in names:
            if name in found:
                place = max(place, found.index(name) + 1)
            else:
                found.insert(place, name)
                place += 1
    return found


def words(layers: Sequence[LayerBits]) -> str:
    """The precisions of `layers` in words, neighbours of one precision together."""
    parts = []
    for precision, group in itertools.groupby(layers, key=lambda layer: layer.precision):
        names = [layer.name for layer in group]
        parts.append(
            f"{names[0]} {precision}" if len(names) == 1 else f"{names[0]} to {names[-1]} {precision}"
        )
    return ", ".join(parts)


def _row(label: str, picture: Markup) -> Markup:
    return tag("div", tag("span", label, class_="index"), picture, class_="bit-row")


def _member_bars(member: Member, names: Sequence[str], content: ReportContent) -> Markup:
    marks = []
    for layer in member.layers:
        left, width = _place(names.index(layer.name), len(names))
        height = BAR * max(0.5, math.log2(layer.weight_bits)) / 5
        told = content.sensitivity.get(layer.name, {}).get(layer.precision)
        lines = [
            f"{layer.name}: {layer.precision}",
            f"{layer.kind}, {count(layer.macs)} multiply-accumulates, {count(layer.params)} parameters",
            *([] if told is None else [f"{told:.1e} nats where it alone is quantized"]),
        ]
        marks.append(
            tag(
                "g",
                tag("title", "\n".join(lines)),
                tag("rect", x=left, width=width, y=f"{BAR - height:.4g}%", height=f"{height:.4g}%",
                    class_=f"shade-{_shade(layer.weight_bits)}"),
                tag("rect", x=left, width=width, y="85%", height="15%",
                    class_=f"shade-{_shade(layer.activation_bits)}"),
            )
        )  # fmt: skip
    return tag("svg", *marks, role="img", aria_label=f"{member.name}: {words(member.layers)}")


def _sensitivity_bars(
    sensitivity: Mapping[str, Mapping[str, float]], precision: str, names: Sequence[str]
) -> Markup | None:
    every = [v for told in sensitivity.values() for v in told.values() if v > 0 and math.isfinite(v)]
    low, high = math.log(min(every)), math.log(max(every))
    here = {
        name: value
        for name in names
        if (value := sensitivity.get(name, {}).get(precision, 0.0)) > 0 and math.isfinite(value)
    }
    if not here:
        return None
    marks = []
    for name, value in here.items():
        left, width = _place(names.index(name), len(names))
        along = (math.log(value) - low) / (high - low) if high > low else 1.0
        height = 100 * (LOWEST + (1 - LOWEST) * along)
        bar = tag("rect", x=left, width=width, y=f"{100 - height:.4g}%", height=f"{height:.4g}%")
        marks.append(tag("g", tag("title", f"{name}, {precision}: {value:.1e} nats"), bar))
    most = sorted(here, key=lambda name: here[name], reverse=True)[:MOST_NAMED]
    told = f"Most sensitive to {precision}: " + ", ".join(f"{name} ({here[name]:.1e} nats)" for name in most)
    return tag("svg", *marks, role="img", aria_label=told, class_="sensitivity")


def _labels(names: Sequence[str]) -> Markup:
    """The names of the network's parts where they begin, as far as there is room."""
    marks, free = [], 0.0
    for _, group in itertools.groupby(range(len(names)), key=lambda index: _part(names[index])):
        at = next(group) / len(names)
        if free <= at <= 1 - LEAST_LABEL:
            marks.append(tag("text", _part(names[round(at * len(names))]), x=f"{100 * at:.4g}%", y="70%"))
            free = at + LEAST_LABEL
    return tag("svg", *marks, aria_hidden="true", class_="labels")


def _part(name: str) -> str:
    """The first step of a layer's name, with the number after it: `blocks.1.0.conv` is of `blocks.1`."""
    found = re.match(r"[^.]*(\.\d+)?", name)
    return found.group() if found else name


def _place(index: int, total: int) -> tuple[str, str]:
    """Left edge and width of bar number `index`."""
    return f"{100 * (index + GAP / 2) / total:.4g}%", f"{100 * (1 - GAP) / total:.4g}%"


def _shade(bits: float) -> int:
    return next((least for least, _ in WIDTHS if bits >= least), WIDTHS[-1][0])


def _precisions(sensitivity: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Those with any finite, positive figure."""
    return list(
        dict.fromkeys(
            name
            for told in sensitivity.values()
            for name, value in told.items()
            if value > 0 and math.isfinite(value)
        )
    )
