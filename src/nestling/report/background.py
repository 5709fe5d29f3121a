"""The lower half of the page: training, search, circumstances, how to repeat. An empty section is None."""

from __future__ import annotations

from collections.abc import Sequence

from nestling.report.content import ReportContent
from nestling.report.figures import area_figure, progress_figure, training_figures
from nestling.report.markup import Markup, fact_list, join, section, tag
from nestling.report.plot import Point
from nestling.report.tried import Usage, by_time, failures, front_growth, usages
from nestling.report.units import (
    duration,
    metric_named,
    percent,
)
from nestling.search import Limit

MOST_USAGES = 12
"""Choices shown before the rest is folded away."""
MOST_FAILURES = 12
TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"))


def training(content: ReportContent) -> Markup | None:
    """The training curves."""
    figures = training_figures(content.training, shrinking_step=content.shrinking_step)
    if not figures:
        return None
    keys = []
    if any(point.largest_top1 is not None for point in content.training):
        keys.append(tag("span", "largest network", class_="key one"))
    if any(point.smallest_top1 is not None for point in content.training):
        keys.append(tag("span", "smallest network", class_="key two"))
    if content.shrinking_step is not None:
        keys.append(tag("span", "smaller networks join", class_="key dashed"))
    legend = tag("p", *keys, class_="legend") if keys else None
    return section("Training", tag("div", *figures, class_="pair"), legend)


def search(content: ReportContent) -> Markup | None:
    """What the search tried: each objective by trial, the values that the front uses, and the failures."""
    if not content.trials:
        return None
    states = [trial.state for trial in content.trials]
    words = [f"{states.count('complete'):,} candidates evaluated"]
    words += [f"{states.count('duplicate'):,} proposed twice"] if "duplicate" in states else []
    words += [f"{states.count('failed'):,} failed"] if "failed" in states else []
    words += [f"{sum(t.on_front for t in content.trials):,} on the front"]
    if content.limits:
        bounds = [_limit(limit) for limit in content.limits]
        words.append("limits: " + ", ".join(bounds))
    figures = [progress_figure(content.trials, goal) for goal in content.objectives]
    growth = front_growth(content)
    figures.append(area_figure(growth))
    figures.append(_area_by_time(by_time(content, growth)))
    shown = [figure for figure in figures if figure is not None]
    legend = tag(
        "p",
        tag("span", "a candidate", class_="key dot"),
        tag("span", "best so far", class_="key one"),
        class_="legend",
    )
    return section(
        "What the search tried",
        tag("p", "; ".join(words) + ".", class_="intro"),
        tag("div", *shown, class_="pair") if shown else None,
        legend if shown else None,
        _usage_block(usages(content)),
        _failure_block(content),
    )


def circumstances(content: ReportContent) -> Markup | None:
    """Device, data, search space, versions and the time that each stage took."""
    times = {stage: duration(seconds) for stage, seconds in content.seconds.items()}
    if len(times) > 1:
        times["all"] = duration(sum(content.seconds.values()))
    device = {"name": content.device_name, **content.device} if content.device_name else content.device
    groups = {
        "Device": device,
        "Data": content.data,
        "Search space": content.space_summary,
        "Training": content.training_cost,
        "Time": times,
        "Versions": content.versions,
    }
    cards = [
        tag("div", tag("h3", name), fact_list(facts), class_="card")
        for name, facts in groups.items()
        if facts
    ]
    return section("Where these numbers come from", tag("div", *cards, class_="cards")) if cards else None


def repeat(content: ReportContent) -> Markup:
    """The command that repeats the run and the configuration behind it."""
    command = tag(
        "div",
        tag("pre", tag("code", content.command)),
        tag("button", "Copy", type="button", class_="copy"),
        class_="command",
    )
    config = tag("details", tag("summary", "Configuration"), tag("pre", tag("code", content.config)))
    return section("Repeat it", command, tag("div", config, class_="folds") if content.config else None)


def _area_by_time(growth: Sequence[Point]) -> Markup | None:
    if len(growth) < 2:
        return None
    width, unit = next(((w, u) for w, u in TIME_UNITS if growth[-1][0] >= 2 * w), TIME_UNITS[-1])
    label = f"Time of evaluation, of all workers ({unit})"
    return area_figure([(seconds / width, volume) for seconds, volume in growth], x_label=label)


def _limit(limit: Limit) -> str:
    metric = metric_named(limit.metric)
    relation = "at most" if limit.is_ceiling else "at least"
    return f"{metric.title.lower()} {relation} {limit.bound * metric.factor:g} {metric.unit}".rstrip()


def _usage_block(found: Sequence[Usage]) -> Markup | None:
    if not found:
        return None

    def strip(usage: Usage, shares: tuple[float, ...], *, whose: str) -> Markup:
        cells = [
            tag(
                "span",
                str(value),
                class_="cell",
                style=f"--share:{share:.3f}",
                title=f"{whose}: {percent(share)}",
            )
            for value, share in zip(usage.choice.values, shares, strict=True)
        ]
        return tag("span", *cells, class_="shares")

    def rows(part: Sequence[Usage]) -> Markup:
        head = tag(
            "tr", *(tag("th", title, scope="col") for title in ("Choice", "All candidates", "On the front"))
        )
        body = [
            tag(
                "tr",
                tag("th", usage.choice.name, scope="row"),
                tag("td", strip(usage, usage.tried, whose="of all candidates")),
                tag("td", strip(usage, usage.front, whose="of the front")),
            )
            for usage in part
        ]
        return tag(
            "div", tag("table", tag("thead", head), tag("tbody", *body), class_="usage"), class_="wide"
        )

    rest = found[MOST_USAGES:]
    words = "The stronger its colour, the more often a value was used. The largest shifts come first."
    return join(
        tag("h3", "Values that the front uses"),
        tag("p", words, class_="intro"),
        rows(found[:MOST_USAGES]),
        tag("div", tag("details", tag("summary", _more(rest, "choice")), rows(rest)), class_="folds")
        if rest
        else None,
    )


def _failure_block(content: ReportContent) -> Markup | None:
    found = failures(content.trials)
    if not found:
        return None

    def items(part: Sequence[tuple[str, list[int]]]) -> Markup:
        lines = []
        for reason, numbers in part:
            named = ", ".join(str(number) for number in numbers[:8]) + (", …" if len(numbers) > 8 else "")
            trials = f"{len(numbers)} trials: {named}" if len(numbers) > 1 else f"trial {named}"
            lines.append(tag("li", reason, tag("small", f" ({trials})")))
        return tag("ul", *lines, class_="failures")

    rest = found[MOST_FAILURES:]
    return join(
        tag("h3", "Candidates that failed"),
        items(found[:MOST_FAILURES]),
        tag("div", tag("details", tag("summary", _more(rest, "reason")), items(rest)), class_="folds")
        if rest
        else None,
    )


def _more(rest: Sequence[object], noun: str) -> str:
    return f"{len(rest)} more {noun}{'s' if len(rest) > 1 else ''}"
