"""The networks that were trained further by themselves: before and after, each measured on its own file."""

from __future__ import annotations

from nestling.report.content import ReportContent, Tuned
from nestling.report.markup import Markup, link, section, tag
from nestling.report.units import NONE, milliseconds, percent, percent_span

TITLES = ("Network", "Trained", "Search, before", "Search, after", "Test, before", "Test, after", "Latency")


def table(content: ReportContent) -> Markup | None:
    """A row for each of them; None where there are none."""
    if not content.tuned:
        return None
    head = tag("tr", *(tag("th", title, scope="col") for title in (*TITLES, "Files")))
    rows = []
    for tuned in content.tuned:
        links = (
            tag("a", "ONNX", href=link(tuned.onnx_path)),
            " ",
            tag("a", "before", href=link(tuned.before_path)),
        )
        rows.append(tag("tr", *(tag("td", cell) for cell in cells(tuned)), tag("td", *links)))
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_="usage")
    note = (
        "Before is the same network with the supernet's weights. Both are exported files, run on the images "
        "that the search chose by and on the test images; figures in brackets are 95 % intervals."
    )
    return section("Trained further", tag("div", whole, class_="wide"), tag("p", note, class_="caption"))


def cells(tuned: Tuned) -> tuple[str, ...]:
    """What stands under `TITLES`, in words."""
    how = "from scratch" if tuned.from_scratch else "further"
    if tuned.qat is not None:
        how += f" in its precisions ({tuned.qat.upper()})"
    teacher = "itself in floats" if tuned.teacher == "parent" else tuned.teacher
    taught = "" if tuned.teacher == "none" else f", taught by {teacher}"
    test = (
        f"{percent(value, decimals=2)} ({percent_span(*interval)})"
        for value, interval in (
            (tuned.test_before, tuned.test_before_interval),
            (tuned.test_after, tuned.test_after_interval),
        )
    )
    return (
        tuned.name,
        f"{tuned.epochs:g} epochs {how}{taught}",
        percent(tuned.search_before, decimals=2),
        percent(tuned.search_after, decimals=2),
        *test,
        NONE
        if tuned.latency_ms is None
        else milliseconds(tuned.latency_ms) + (" (unstable)" if tuned.unstable else ""),
    )
