"""The front as a PNG, for slides and READMEs. The only module that imports matplotlib."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from nestling.report.content import ReportContent
from nestling.report.figures import FrontView
from nestling.report.units import metric_named
from nestling.report.words import headline, member_numbers

INK, SOFT, GRID, ACCENT, CANDIDATE = "#1d1f21", "#5c6166", "#ececec", "#1f5fbf", "#7d8389"
DOTS_PER_INCH = 160
LONGEST_TITLE = 64
"""Characters that fit over the figure."""


def front_png(content: ReportContent) -> bytes:
    """A PNG of 1440 x 880 pixels: test accuracy over the first cost, with the headline as its caption."""
    figure = Figure(figsize=(9.0, 5.5), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    axes.set_axisbelow(True)
    view = FrontView.of(content, metric=content.cost_metrics[0])
    if view is None:
        axes.text(0.5, 0.5, "no network was measured", ha="center", color=SOFT, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        _draw(axes, view, member_numbers(content))
    lines = textwrap.wrap(headline(content), 118)
    axes.set_title(_plain("\n".join(lines)), loc="left", fontsize=9.5, color=SOFT, pad=12, linespacing=1.4)
    axes.annotate(
        _plain(_one_line(content.title)),
        (0, 1),
        (0, 20 + 13.5 * len(lines)),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    return _png(figure)


def _draw(axes: Axes, view: FrontView, numbers: Mapping[str, int]) -> None:
    _scale(axes, view)
    axes.grid(color=GRID, linewidth=0.8)
    for on_front, face in ((False, CANDIDATE), (True, "white")):
        spots = [spot for trial, spot in view.candidates if trial.on_front is on_front]
        if spots:
            label = (
                "candidate on the front of the search (search split)"
                if on_front
                else "candidate (search split)"
            )
            axes.scatter(
                [x for x, _ in spots],
                [y for _, y in spots],
                s=20 if on_front else 13,
                facecolor=face,
                edgecolor=CANDIDATE,
                linewidth=0.9 if on_front else 0,
                alpha=1.0 if on_front else 0.45,
                label=label,
            )
    spots = [spot for _, spot in view.members]
    axes.plot([x for x, _ in spots], [y for _, y in spots], color=ACCENT, alpha=0.35, linewidth=1.2)
    for member, (x, y) in view.members:
        low, high = member.test_top1_interval
        axes.plot([x, x], [100 * low, 100 * high], color=ACCENT, alpha=0.6, linewidth=1.0)
        if (across := member.cost_interval(view.metric)) is not None:
            axes.plot(across, [y, y], color=ACCENT, alpha=0.6, linewidth=1.0)
        axes.annotate(
            str(numbers[member.arch_key]), (x, y), (6, 5), textcoords="offset points", fontsize=8, color=SOFT
        )
    for unstable, face, label in (
        (False, ACCENT, "exported file (test split, 95 % intervals)"),
        (True, "white", "exported file, latency unstable"),
    ):
        spots = [spot for member, spot in view.members if member.unstable is unstable]
        if spots:
            xs, ys = [x for x, _ in spots], [y for _, y in spots]
            edge = ACCENT if unstable else "white"
            axes.scatter(xs, ys, s=44, facecolor=face, edgecolor=edge, linewidth=1.2, zorder=3, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5, labelcolor=SOFT)


def _scale(axes: Axes, view: FrontView) -> None:
    axes.set_xscale("log" if view.x.logarithmic else "linear")
    axes.set_xlim(view.x.low, view.x.high)
    axes.set_ylim(view.y.low, view.y.high)
    for line, axis in ((axes.xaxis, view.x), (axes.yaxis, view.y)):
        ticks = axis.ticks()
        line.set_major_locator(FixedLocator([value for value, _ in ticks]))
        line.set_minor_locator(NullLocator())
        line.set_major_formatter(FixedFormatter([label for _, label in ticks]))
    axes.set_xlabel(metric_named(view.metric).label, color=SOFT, fontsize=10)
    axes.set_ylabel("Accuracy (%)", color=SOFT, fontsize=10)


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_TITLE else f"{words[: LONGEST_TITLE - 1]}…"


def _plain(text: str) -> str:
    """`text` with its dollar signs kept from being read as formulas."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A title in a script that the built-in font lacks is drawn as boxes; the page shows it properly.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
