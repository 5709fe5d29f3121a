"""The front as a Markdown table, for a README or a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from nestling.report.content import Member, ReportContent
from nestling.report.markup import link
from nestling.report.tuned import TITLES, cells
from nestling.report.units import NONE, byte_size, count, milliseconds, percent, percent_span, short
from nestling.report.words import headline, member_numbers, verdicts

_SPECIAL = str.maketrans(
    {
        **{character: f"\\{character}" for character in "\\`*_[]|~"},
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "\n": " ",
        "\r": " ",
    }
)


def front_markdown(content: ReportContent) -> str:
    """Title, headline, notes, tables of the members and of the fine-tuned, and the command to repeat."""
    lines = [f"# {_text(content.title)}", "", _text(headline(content)), ""]
    lines += [f"> {_text(note)}\n" for note in content.notes]
    if content.members:
        lines += [*_table(content), ""]
        lines.append(
            f"Test accuracy with its 95 % interval, from the exported files. {_text(content.created)}."
        )
        lines.append("")
        for sentence in verdicts(content):
            lines += [_text(sentence), ""]
    if content.tuned:
        lines += [*_tuned_table(content), "", "Before: the same network with the supernet's weights.", ""]
    fence = _fence(content.command)
    lines += [fence, content.command, fence, ""]
    return "\n".join(lines)


def _table(content: ReportContent) -> list[str]:
    members = content.ordered_members
    timed = any(member.latency_ms is not None for member in members)
    numbers = member_numbers(content)
    titles = [
        "#",
        "Network",
        "Test accuracy",
        *(["Latency"] if timed else []),
        "File size",
        "MMACs",
        "Parameters",
    ]
    titles += ["Peak memory", "Pixels", "File"]
    rules = [":--" if title in {"Network", "File"} else "--:" for title in titles]
    rows = [_row(member, number=numbers[member.arch_key], timed=timed) for member in members]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows)]


def _row(member: Member, *, number: int, timed: bool) -> Sequence[str]:
    low, high = member.test_top1_interval
    cells = [
        str(number),
        _text(member.name),
        f"{percent(member.test_top1, decimals=2)} ({percent_span(low, high)})",
    ]
    if timed:
        latency = NONE if member.latency_ms is None else milliseconds(member.latency_ms)
        cells.append(f"{latency} (unstable)" if member.unstable else latency)
    cells += [
        byte_size(member.size_bytes),
        short(member.mmacs),
        count(member.params),
        byte_size(member.peak_bytes),
        str(member.resolution),
        f"[ONNX]({link(member.onnx_path)})" if member.onnx_path else NONE,
    ]
    return cells


def _tuned_table(content: ReportContent) -> list[str]:
    rules = [":--", ":--", *["--:"] * (len(TITLES) - 2), ":--"]
    rows = [[*map(_text, cells(tuned)), f"[ONNX]({link(tuned.onnx_path)})"] for tuned in content.tuned]
    return [f"| {' | '.join(row)} |" for row in ((*TITLES, "File"), rules, *rows)]


def _text(text: str) -> str:
    return text.translate(_SPECIAL)


def _fence(text: str) -> str:
    """Backticks enough that `text` cannot end the block."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence
