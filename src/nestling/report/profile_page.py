"""The page of a profile: what files take on devices, and where their time goes, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from nestling.profile import FileProfile, Kernel
from nestling.report.markup import Markup, fact_list, join, section, tag
from nestling.report.units import NONE, TO, byte_size, milliseconds, percent, short

SHADES = 6
"""Operators that have a shade of their own, dearest first; the rest share the last one."""
MOST_ROWS = 40
"""Nodes in the table, dearest first; the picture has all."""


def profile_html(profiles: Sequence[FileProfile]) -> str:
    """One page that loads nothing from anywhere and has no script.

    Raises:
        ValueError: no profiles.
    """
    if not profiles:
        raise ValueError("a page of profiles needs at least one")
    names = list(dict.fromkeys(profile.path.name for profile in profiles))
    title = f"Profile of {', '.join(names)}"
    style = resources.files("nestling.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'",
        ),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    shades = _shades(profiles)
    parts = [_node_section(profile, shades) for profile in profiles if profile.nodes]
    body = tag("body", tag("main", tag("h1", title), _table(profiles), *parts, _conditions(profiles)))
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")


def _table(profiles: Sequence[FileProfile]) -> Markup:
    headings = (
        "file",
        "device",
        "median",
        "95 %",
        "p90",
        "p99",
        "x reference",
        "first run",
        "loading",
        "memory",
    )
    rows = []
    for profile in profiles:
        taken = profile.measurement
        low, high = taken.interval_ms
        warning = tag("small", " unstable", class_="warning") if taken.unstable else None
        peak = taken.conditions.peak_bytes
        rows.append(
            tag(
                "tr",
                tag("td", profile.path.name),
                tag("td", taken.device),
                tag("td", milliseconds(taken.latency_ms), warning),
                tag("td", f"{short(low)}{TO}{short(high)}"),
                tag("td", short(taken.p90_ms)),
                tag("td", short(taken.p99_ms)),
                tag("td", short(taken.ratio)),
                tag("td", milliseconds(taken.first_seconds * 1e3)),
                tag("td", milliseconds(taken.load_seconds * 1e3)),
                tag("td", NONE if peak is None else byte_size(round(peak))),
            )
        )
    reasons = [
        tag("li", f"{profile.path.name} on {profile.measurement.device}: {reason}")
        for profile in profiles
        for reason in profile.measurement.unstable_because
    ]
    return section(
        "Latency",
        _rows_of(headings, rows, named=2),
        tag("ul", *reasons, class_="notes") if reasons else None,
        tag(
            "p",
            "Each file is timed in turns with a fixed reference model in the same process; the interval is "
            "that of the median.",
            class_="caption",
        ),
    )


def _node_section(profile: FileProfile, shades: dict[str, int]) -> Markup:
    whole = profile.nodes_ms or 1.0
    dearest = sorted(profile.nodes, key=_milliseconds, reverse=True)
    longest = _milliseconds(dearest[0]) or 1.0
    rows = []
    for node in dearest[:MOST_ROWS]:
        share = _milliseconds(node) / whole
        bar = tag(
            "svg",
            tag(
                "rect",
                x="0",
                y="0",
                width=f"{100 * _milliseconds(node) / longest:.2f}%",
                height="100%",
                class_=_shade(node, shades),
            ),
            class_="node-bar",
            aria_hidden="true",
        )
        rows.append(
            tag(
                "tr",
                tag("td", node.name or NONE),
                tag("td", node.op),
                tag("td", " ".join(dict.fromkeys(node.reads))),
                tag("td", milliseconds(_milliseconds(node))),
                tag("td", percent(share)),
                tag("td", bar),
            )
        )
    left = len(dearest) - MOST_ROWS
    latency = profile.measurement.latency_ms
    return section(
        f"{profile.path.name} on {profile.measurement.device}, node by node",
        _strip(profile, shades),
        tag("p", *_legend(profile, shades), class_="legend"),
        _rows_of(("node", "operator", "reads", "time", "share", ""), rows, named=3),
        tag(
            "p",
            f"{len(profile.nodes)} nodes take {milliseconds(profile.nodes_ms)} by the runtime's profiler, "
            f"which costs time itself; the whole file takes {milliseconds(latency)} without it.",
            f" The {left} cheapest nodes are not in the table." if left > 0 else None,
            class_="caption",
        ),
    )


def _rows_of(headings: Sequence[str], rows: Sequence[Markup], *, named: int) -> Markup:
    """A table that scrolls by itself where it is too wide; after `named` columns of words come figures."""
    head = tag("tr", *(tag("th", heading) for heading in headings))
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_=f"figures named-{named}")
    return tag("div", whole, class_="wide")


def _strip(profile: FileProfile, shades: dict[str, int]) -> Markup:
    """Every node in the order of running, as wide as it takes long."""
    whole, left = profile.nodes_ms or 1.0, 0.0
    parts = []
    for node in profile.nodes:
        width = 100 * _milliseconds(node) / whole
        words = f"{node.name} ({node.op}): {milliseconds(_milliseconds(node))}"
        parts.append(
            tag(
                "rect",
                tag("title", words),
                x=f"{left:.3f}%",
                y="0",
                width=f"{width:.3f}%",
                height="100%",
                class_=_shade(node, shades),
            )
        )
        left += width
    dearest = ", ".join(f"{op} {percent(ms / whole)}" for op, _, ms in profile.by_operator()[:3])
    return tag("svg", *parts, class_="node-strip", role="img", aria_label=f"Time by node; most: {dearest}")


def _legend(profile: FileProfile, shades: dict[str, int]) -> list[Markup]:
    whole = profile.nodes_ms or 1.0
    found = []
    others = 0.0
    for op, count, ms in profile.by_operator():
        if op in shades:
            text = f"{op} ({count}) {percent(ms / whole)}"
            found.append(tag("span", text, class_=f"key node-{shades[op]}"))
        else:
            others += ms
    if others:
        found.append(tag("span", f"others {percent(others / whole)}", class_=f"key node-{SHADES}"))
    return found


def _conditions(profiles: Sequence[FileProfile]) -> Markup:
    facts: dict[str, str] = {}
    for profile in profiles:
        taken = profile.measurement
        told = taken.conditions
        words = [str(taken.fingerprint), f"{len(taken.seconds)} runs"]
        words += [f"fed with {', '.join(map(str, profile.inputs))}"] if profile.inputs else []
        words += [f"load {told.load:.2f}"] if told.load is not None else []
        words += [f"kept waiting {percent(told.waited)} of the time"] if told.waited is not None else []
        words += [f"{told.celsius:.0f} degrees Celsius"] if told.celsius is not None else []
        words += [f"{told.mhz:,.0f} MHz"] if told.mhz is not None else []
        words += [f"{short(joules)} J a run ({name})" for name, joules in profile.joules.items()]
        if taken.elsewhere is not None:
            moved = taken.elsewhere
            words.append(f"{percent(moved.kernels)} of nodes ({percent(moved.time)} of time) ran elsewhere")
        facts[f"{profile.path.name}, {taken.device}"] = "; ".join(words)
    return section("Circumstances", fact_list(facts))


def _shades(profiles: Sequence[FileProfile]) -> dict[str, int]:
    """A number for each of the dearest operators over all profiles: the same shade on every device."""
    times: dict[str, float] = {}
    for profile in profiles:
        whole = profile.nodes_ms or 1.0
        for op, _, ms in profile.by_operator():
            times[op] = times.get(op, 0.0) + ms / whole
    dearest = sorted(times, key=lambda op: -times[op])[:SHADES]
    return {op: number for number, op in enumerate(dearest)}


def _shade(node: Kernel, shades: dict[str, int]) -> str:
    return f"node-{shades.get(node.op, SHADES)}"


def _milliseconds(node: Kernel) -> float:
    return (node.microseconds or 0.0) / 1e3
