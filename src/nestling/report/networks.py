"""The upper half of the page: the headline, the front, and the networks. An empty section is None."""

from __future__ import annotations

from collections.abc import Mapping

from nestling.report.content import Member, ReportContent
from nestling.report.figures import FrontView, front_figure
from nestling.report.markup import Markup, fact_list, join, link, section, tag
from nestling.report.units import (
    NONE,
    TIMES,
    TO,
    byte_size,
    count,
    metric_named,
    milliseconds,
    percent,
    percent_span,
    short,
)
from nestling.report.words import by_stage, headline, picks, verdicts


def heading(content: ReportContent) -> Markup:
    """Title, the headline sentence, the notes that must be seen, and the networks to look at first."""
    notes = [tag("li", note) for note in content.notes]
    return tag(
        "header",
        tag("p", "Nestling", tag("span", content.created), class_="eyebrow"),
        tag("h1", content.title),
        tag("p", headline(content), class_="lede"),
        tag("ul", *notes, class_="notes", aria_label="Please note") if notes else None,
        _picks(content),
    )


def front(content: ReportContent, numbers: Mapping[str, int]) -> Markup | None:
    """The front over each cost that was searched, behind tabs where there are several."""
    views = [view for metric in content.cost_metrics if (view := FrontView.of(content, metric=metric))]
    if not views:
        return None
    if len(views) == 1:
        name = metric_named(views[0].metric).title.lower()
        return section(f"Accuracy against {name}", _front_panel(views[0], numbers))
    parts = []
    for index, view in enumerate(views):
        radio = tag(
            "input",
            type="radio",
            name="cost",
            id=f"cost-{index}",
            checked="checked" if index == 0 else None,
        )
        parts += [radio, tag("label", metric_named(view.metric).title, for_=f"cost-{index}")]
        parts.append(tag("div", _front_panel(view, numbers), class_="panel"))
    return section("Accuracy against cost", tag("div", *parts, class_="tabs"))


def table(content: ReportContent, numbers: Mapping[str, int]) -> Markup | None:
    """Every member with what was measured and links to its files; headers sort."""
    members = content.ordered_members
    if not members:
        return None
    timed = any(member.latency_ms is not None for member in members)
    timed_titles = ["Latency", "Relative"] if timed else []
    titles = [
        "#",
        "Network",
        "Test accuracy",
        "Search accuracy",
        *timed_titles,
        "File size",
        "MMACs",
        "Parameters",
        "Peak memory",
        "Pixels",
    ]
    head = [
        tag(
            "th",
            tag("button", title, type="button"),
            scope="col",
            class_="words" if title == "Network" else None,
        )
        for title in titles
    ]
    head.append(tag("th", "Files", scope="col", class_="words"))
    rows = [_row(member, number=numbers[member.arch_key], timed=timed) for member in members]
    whole = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="members")
    note = (
        "Small figures are 95 % intervals. Test accuracy comes from running the exported file on images "
        "that neither training nor search used."
    )
    if timed:
        note += " Relative is the latency as a multiple of a fixed model's, timed in turns with it."
    captions = [tag("p", sentence, class_="caption") for sentence in (note, *verdicts(content))]
    return section("The networks", tag("div", whole, class_="wide"), *captions)


def details(content: ReportContent, numbers: Mapping[str, int]) -> Markup | None:
    """For every member what it is made of: its decisions stage by stage, and the precision of each stage."""
    if not content.members:
        return None
    blocks = []
    for member in content.ordered_members:
        number = numbers[member.arch_key]
        figures = [percent(member.test_top1)]
        if member.latency_ms is not None:
            figures.append(milliseconds(member.latency_ms))
        figures.append(byte_size(member.size_bytes))
        stages = by_stage(member.decisions, idle=content.idle(member.decisions))
        facts = {
            **stages.pop("", {}),
            "arch": member.arch_key,
            "largest difference from PyTorch": f"{member.worst_error:.1e} of the scale of the logits",
        }
        blocks.append(
            tag(
                "details",
                tag(
                    "summary",
                    tag("span", str(number), class_="index"),
                    tag("span", member.name, class_="name"),
                    tag("span", " · ".join(figures), class_="figures"),
                    _strip(member.precisions, labelled=False),
                ),
                tag(
                    "div",
                    _strip(member.precisions, labelled=True),
                    _decision_table(stages),
                    fact_list(facts),
                    class_="body",
                ),
                id=f"network-{number}",
                data_member=number,
            )
        )
    return section("What each one is made of", tag("div", *blocks, class_="folds"))


def _picks(content: ReportContent) -> Markup | None:
    tiles = [
        tag(
            "a",
            tag("span", label, class_="label"),
            tag("strong", percent(member.test_top1)),
            tag("span", detail, class_="detail"),
            href=f"#row-{number}",
            data_member=number,
            class_="pick",
        )
        for label, member, detail, number in picks(content)
    ]
    return tag("div", *tiles, class_="picks") if tiles else None


def _front_panel(view: FrontView, numbers: Mapping[str, int]) -> Markup:
    keys = []
    if view.members:
        keys.append(tag("span", "exported file, test split, with 95 % interval", class_="key member"))
    if view.candidates:
        keys.append(tag("span", "candidate, search split", class_="key dot"))
    if any(trial.on_front for trial, _ in view.candidates):
        keys.append(tag("span", "on the front of the search", class_="key ring"))
    if any(member.unstable for member, _ in view.members):
        keys.append(tag("span", "latency unstable", class_="key unstable"))
    if view.outside:
        one = view.outside == 1
        text = f"{view.outside:,} {'candidate lies' if one else 'candidates lie'} outside of this frame"
        keys.append(tag("span", text))
    return join(front_figure(view, numbers=numbers), tag("p", *keys, class_="legend"))


def _row(member: Member, *, number: int, timed: bool) -> Markup:
    low, high = member.test_top1_interval
    accuracy = tag("small", percent_span(low, high))
    cells = [
        tag("td", str(number), class_="index", data_value=number),
        tag(
            "td",
            tag("a", member.name, href=f"#network-{number}"),
            class_="words name",
            data_value=member.name,
        ),
        tag(
            "td",
            percent(member.test_top1, decimals=2),
            accuracy,
            data_value=member.test_top1,
            class_="strong",
        ),
        tag("td", percent(member.search_top1, decimals=2), data_value=member.search_top1),
    ]
    if timed:
        cells += _latency_cells(member)
    cells += [
        tag("td", byte_size(member.size_bytes), data_value=member.size_bytes),
        tag("td", short(member.mmacs), data_value=member.mmacs),
        tag("td", count(member.params), data_value=member.params),
        tag("td", byte_size(member.peak_bytes), data_value=member.peak_bytes),
        tag("td", str(member.resolution), data_value=member.resolution),
    ]
    files = {"ONNX": member.onnx_path, "weights": member.weights_path, "code": member.rebuild_path}
    links = [tag("a", label, href=link(path)) for label, path in files.items() if path]
    cells.append(tag("td", *links, class_="words files"))
    return tag("tr", *cells, id=f"row-{number}", data_member=number)


def _latency_cells(member: Member) -> list[Markup]:
    if member.latency_ms is None:
        return [tag("td", NONE, data_value=-1), tag("td", NONE, data_value=-1)]
    interval = member.latency_interval_ms
    bounds = None if interval is None else tag("small", f"{short(interval[0])}{TO}{short(interval[1])}")
    warning = tag("small", "unstable", class_="warning") if member.unstable else None
    ratio = member.latency_ratio
    return [
        tag(
            "td",
            milliseconds(member.latency_ms),
            bounds,
            warning,
            data_value=member.latency_ms,
            class_="strong",
        ),
        tag(
            "td",
            NONE if ratio is None else f"{short(ratio)} {TIMES}",
            data_value=-1 if ratio is None else ratio,
        ),
    ]


def _decision_table(stages: Mapping[str, Mapping[str, str]]) -> Markup | None:
    if not stages:
        return None
    kinds = list(dict.fromkeys(kind for values in stages.values() for kind in values))
    head = tag("tr", *(tag("th", title, scope="col") for title in ("stage", *kinds)))
    rows = [
        tag("tr", tag("th", stage, scope="row"), *(tag("td", values.get(kind, "")) for kind in kinds))
        for stage, values in stages.items()
    ]
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_="decisions")
    return tag("div", whole, class_="wide")


def _strip(precisions: Mapping[str, str], *, labelled: bool) -> Markup | None:
    if not precisions:
        return None
    cells = [
        tag(
            "span",
            tag("b", stage) if labelled else None,
            precision if labelled else None,
            class_=f"cell bits-{_bits(precision)}",
        )
        for stage, precision in precisions.items()
    ]
    words = ", ".join(f"{stage} {precision}" for stage, precision in precisions.items())
    return tag("span", *cells, class_="strip labelled" if labelled else "strip", role="img", aria_label=words)


def _bits(precision: str) -> int:
    """The bits of the weights: `w8a8` is 8, `fp32` is 32."""
    digits = "".join(character if character.isdigit() else " " for character in precision).split()
    return int(digits[0]) if digits and len(digits[0]) < 3 else 32
