"""The plot of `strategies.py`: accuracy along the cost axis, and what of it the area sums up."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from record import Figures

PANELS = ("smallest", "middle", "largest", "area")


def draw(figures: Figures, path: Path) -> None:
    """Writes the plot of `figures` to `path`, in the format that its suffix names."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(PANELS), width_ratios=[3, 1, 1, 1, 1])
    names = list(figures["entries"])
    colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
    for name, row in figures["entries"].items():
        accuracies = [100 * statistics.mean(values) for values in zip(*row["top1"], strict=True)]
        curves.plot(
            [macs / 1e6 for macs in figures["archs"]["macs"]],
            accuracies,
            label=name,
            color=colours[name],
            marker=".",
        )
    curves.set_xscale("log")
    curves.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    curves.xaxis.set_major_formatter("{x:g}")
    curves.xaxis.set_minor_formatter(NullFormatter())
    curves.set_xlabel("million multiply-accumulates of a network (log)")
    curves.set_ylabel("top-1 accuracy on held-out images, %")
    curves.grid(visible=True, alpha=0.3)
    curves.legend(fontsize=7, loc="lower right")
    for panel, measure in zip(panels, PANELS, strict=True):
        _panel(panel, figures, measure, colours)
        panel.set_yticks(range(len(names)), names if measure == PANELS[0] else [], fontsize=7)
    settings = figures["settings"]
    figure.suptitle(
        f"Training strategies at {settings['budget']:.3g} multiply-accumulates each; "
        f"{settings['seeds']} seeds, bars: standard deviation"
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(
    panel: Axes, figures: Figures, measure: str, colours: dict[str, tuple[float, float, float, float]]
) -> None:
    """One figure of every entry, the first one on top."""
    for place, (name, row) in enumerate(figures["entries"].items()):
        values = [100 * value for value in row[measure]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        panel.errorbar(
            statistics.mean(values), place, xerr=spread, fmt="o", markersize=5, color=colours[name], capsize=3
        )
    # the reference's subnets are near chance: they would squeeze all others together
    shown = [
        100 * statistics.mean(row[measure])
        for name, row in figures["entries"].items()
        if name != "alone" or measure == "largest"
    ]
    if shown:
        margin = 0.15 * (max(shown) - min(shown)) + 1.0
        panel.set_xlim(min(shown) - margin, max(shown) + margin)
    panel.invert_yaxis()
    panel.set_title(f"{measure}, %")
    panel.grid(visible=True, alpha=0.3)
