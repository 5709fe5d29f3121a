"""The plot of `search_efficiency.py`: hypervolume against validated candidates, a panel for each oracle."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from record import Figures


def draw(figures: Figures, path: Path) -> None:
    """Writes the plot of `figures` to `path`, in the format that its suffix names."""
    oracles = figures["oracles"]
    figure = Figure(figsize=(4.6 * len(oracles), 4.6), layout="constrained")
    names = list(figures["settings"]["methods"])
    colours = {name: colormaps["tab10"](place % 10) for place, name in enumerate(names)}
    for panel, (oracle, rows) in zip(
        figure.subplots(1, len(oracles), squeeze=False)[0], oracles.items(), strict=True
    ):
        for name, by_mark in rows["methods"].items():
            marks = sorted(by_mark["per_cent"], key=int)
            means = [statistics.mean(by_mark["per_cent"][mark]) for mark in marks]
            bounds = [by_mark["interval"][mark] for mark in marks]
            places = [int(mark) for mark in marks]
            panel.plot(places, means, marker="o", markersize=3, color=colours[name], label=name)
            panel.fill_between(
                places,
                [low for low, _ in bounds],
                [high for _, high in bounds],
                color=colours[name],
                alpha=0.15,
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(figures["settings"]["marks"])
        panel.set_xlabel("validated candidates (log)")
        panel.set_title(oracle)
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize=7, loc="lower right")
        panel.set_ylabel("hypervolume, % of the best known front")
    figure.suptitle(
        f"Searches at equal evaluations; {figures['settings']['seeds']} seeds, bands: 95 % bootstrap interval"
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
