"""The report of a run: an HTML page that needs no network, a picture, a Markdown table, and its JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from nestling.report import background, bits, networks, tuned
from nestling.report.content import ReportContent
from nestling.report.markdown import front_markdown
from nestling.report.markup import Markup, join, tag
from nestling.report.picture import front_png
from nestling.report.words import member_numbers, tips
from nestling.run import write_atomically


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report was written."""

    html: Path
    png: Path
    markdown: Path
    json: Path


def write_report(content: ReportContent, folder: Path) -> ReportFiles:
    """The report in `folder`, which is made where it is missing. Each file appears whole or not at all.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(
        html=folder / "report.html",
        png=folder / "front.png",
        markdown=folder / "report.md",
        json=folder / "report.json",
    )
    write_atomically(files.json, content.to_json().encode())
    write_atomically(files.markdown, front_markdown(content).encode())
    write_atomically(files.png, front_png(content))
    write_atomically(files.html, report_html(content).encode())
    return files


def report_html(content: ReportContent) -> str:
    """The whole page. Its policy lets it run its own script only, and load nothing from anywhere."""
    numbers = member_numbers(content)
    style, script = _resource("page.css"), _resource("page.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; base-uri 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", content.title),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag(
            "main",
            networks.heading(content),
            networks.front(content, numbers),
            networks.table(content, numbers),
            networks.details(content, numbers),
            bits.bit_maps(content, numbers),
            tuned.table(content),
            background.training(content),
            background.search(content),
            background.circumstances(content),
            background.repeat(content),
        ),
        tag("div", id="tip", role="tooltip", hidden="hidden"),
        tag("script", _script_json(tips(content)), type="application/json", id="tips"),
        tag("script", Markup(script)),
    )
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")


def _script_json(value: dict[str, str]) -> Markup:
    """JSON that cannot end the script element which holds it."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _resource(name: str) -> str:
    return resources.files("nestling.report").joinpath(name).read_text(encoding="utf-8")
