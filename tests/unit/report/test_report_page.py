from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nestling.report import Member, ReportContent, TriedArch, report_html, write_report
from nestling.report.figures import FrontView
from nestling.report.markdown import front_markdown
from nestling.report.picture import front_png
from nestling.report.units import MINUS, percent
from nestling.report.words import by_stage, headline, member_numbers, verdicts
from nestling.search import Objective
from nestling.space import Choice, Value

EMPTY = ReportContent("Nothing", "2026-11-21", "nestling run x.toml")
HOSTILE = """</script></style><img src=x onerror=alert(1)>"'&<b>$|`\n"""


class Page(HTMLParser):
    """Reads a page, insists that every tag is closed in order, and keeps elements, links and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "input", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if all(a.get(name.rstrip("_")) == value for name, value in wanted.items())]


def hostile(value: Any, *, key: str = "") -> Any:
    """`value` with every text in it replaced by one that tries to break out of the page."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: hostile(getattr(value, field.name), key=field.name) for field in fields(value)}
        return type(value)(**changed)
    if isinstance(value, tuple):
        return tuple(hostile(item, key=key) for item in value)
    if isinstance(value, dict):
        return {
            name if key == "metrics" else HOSTILE + str(name): hostile(item) for name, item in value.items()
        }
    if isinstance(value, str) and key not in {"state", "direction", "metric"}:
        return HOSTILE + value
    return value


def test_every_tag_is_closed(content: ReportContent) -> None:
    page = Page(report_html(content))
    assert len(page.all("tr", id="row-1")) == 1


def test_nothing_is_loaded_from_anywhere(content: ReportContent) -> None:
    html = report_html(content)
    page = Page(html)
    assert not [attributes for _, attributes in page.elements if "src" in attributes]
    assert {name for name, _ in page.elements}.isdisjoint({"link", "img", "iframe", "object", "base"})
    links = [attributes["href"] for attributes in page.all("a")]
    assert links
    assert all(link.startswith(("#", "./")) for link in links)
    assert "url(" not in html
    assert not re.search(r"https?:", html)


def test_the_policy_lets_only_the_own_script_run(content: ReportContent) -> None:
    page = Page(report_html(content))
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
    ]


def test_hostile_names_stay_text(content: ReportContent) -> None:
    evil: ReportContent = hostile(content)
    page = Page(report_html(evil))
    assert "img" not in {name for name, _ in page.elements}
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert len(page.scripts) == 2
    assert any(text.startswith(HOSTILE.strip()[:30]) for text in page.text)
    tips = json.loads(page.scripts[0])
    assert all(HOSTILE.split("\n")[0] in said for said in tips.values() if said.startswith("1 "))


def test_a_path_cannot_become_a_script_or_another_host(content: ReportContent, member: Member) -> None:
    paths = replace(
        member, onnx_path="javascript:alert(1)", weights_path="//evil.example/x", rebuild_path="a b#c.py"
    )
    page = Page(report_html(replace(content, members=(paths,))))
    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert links == ["./javascript%3Aalert%281%29", ".///evil.example/x", "./a%20b%23c.py"]


def test_the_table_holds_the_numbers_of_the_content(content: ReportContent) -> None:
    cells = re.findall(r'<tr id="row-(\d)".*?</tr>', report_html(content), flags=re.S)
    assert cells == ["1", "2", "3"]
    for number, member in enumerate(content.ordered_members, start=1):
        row = re.search(rf'<tr id="row-{number}".*?</tr>', report_html(content), flags=re.S)
        assert row is not None
        values = [a["data-value"] for _, a in Page(row.group()).elements if "data-value" in a]
        assert values[1] == member.name
        assert [float(values[index]) for index in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)] == [
            number,
            member.test_top1,
            member.search_top1,
            member.latency_ms,
            member.latency_ratio,
            member.size_bytes,
            member.mmacs,
            member.params,
            member.peak_bytes,
            member.resolution,
        ]


def test_a_point_stands_where_its_member_was_measured(content: ReportContent) -> None:
    view = FrontView.of(content, metric="latency_ms")
    assert view is not None
    points = Page(report_html(content)).all("circle", class_="member")
    stable = [m for m in content.ordered_members if not m.unstable]
    assert len(points) == len(stable) == 2
    for point, member in zip(points, stable, strict=True):
        assert member.latency_ms is not None
        assert float(point["cx"].rstrip("%")) == pytest.approx(100 * view.x.at(member.latency_ms), abs=0.01)
        height = 100 * (1 - view.y.at(100 * member.test_top1))
        assert float(point["cy"].rstrip("%")) == pytest.approx(height, abs=0.01)


def test_every_point_of_the_front_leads_to_its_row(content: ReportContent) -> None:
    page = Page(report_html(content))
    targets = {a["href"] for a in page.all("a", class_="point")}
    assert targets == {"#row-1", "#row-2", "#row-3"}
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    internal = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert internal <= set(ids)


def test_a_poor_candidate_does_not_flatten_the_front(content: ReportContent) -> None:
    poor = TriedArch(9, "9" * 12, {}, "complete", {"top1": 0.1, "latency_ms": 0.5})
    view = FrontView.of(replace(content, trials=(*content.trials, poor)), metric="latency_ms")
    assert view is not None
    assert view.outside == 1
    assert view.y.low > 88


def test_every_mark_with_a_tip_has_one(content: ReportContent) -> None:
    page = Page(report_html(content))
    tips = json.loads(page.scripts[0])
    marks = {a["data-tip"] for _, a in page.elements if "data-tip" in a}
    assert marks == {"m1", "m2", "m3", "t0", "t1", "t3"}
    assert marks <= set(tips)


def test_the_headline_says_the_range_and_the_device(content: ReportContent) -> None:
    said = headline(content).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert (
        said
        == "3 networks from 0.210 ms to 1.90 ms, 95.1 % to 98.6 % test accuracy, measured on a small board."
    )


def test_the_headline_of_one_network_has_no_range(content: ReportContent, member: Member) -> None:
    said = headline(replace(content, members=(member,))).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert said == "1 network at 0.210 ms, 95.1 % test accuracy, measured on a small board."


def test_notes_are_in_the_page_and_in_the_markdown(content: ReportContent) -> None:
    note = content.notes[0]
    assert note in report_html(content)
    assert note in front_markdown(content)


def test_blocks_are_said_together_and_idle_choices_are_not(content: ReportContent) -> None:
    small, *_, large = content.ordered_members
    assert by_stage(small.decisions, idle=content.idle(small.decisions))["s1"]["kernel"] == "3"
    assert by_stage(large.decisions, idle=content.idle(large.decisions)) == {
        "": {"resolution": "32"},
        "s1": {"width": "32", "depth": "2", "kernel": "5, 3"},
    }


def test_choices_of_a_family_without_stages_keep_their_whole_names() -> None:
    decisions: dict[str, Value] = {"depths.2": 3, "layer1.0.conv1.width": 16, "stem.width": 8, "model": "a"}
    assert by_stage(decisions, idle=()) == {
        "": {"depths.2": "3", "layer1.0.conv1.width": "16", "model": "a"},
        "stem": {"width": "8"},
    }


def variants(content: ReportContent) -> dict[str, ReportContent]:
    untimed = [
        replace(m, latency_ms=None, latency_interval_ms=None, latency_ratio=None) for m in content.members
    ]
    macs, size = Objective("mmacs", "minimise"), Objective("size_mb", "minimise")
    free = tuple(replace(member, size_bytes=0, mmacs=0.0) for member in content.members[:1])
    choices = tuple(Choice(f"s1.b{block}.kernel", (3, 5)) for block in range(60))
    crowd = tuple(
        TriedArch(
            n,
            str(n),
            {c.name: 3 + 2 * (n % 2) for c in choices},
            "complete",
            {"top1": 0.9, "latency_ms": 1.0},
        )
        for n in range(300)
    )
    same = TriedArch(0, "a", {}, "complete", {"top1": 1.0, "latency_ms": 1.0})
    return {
        "empty": EMPTY,
        "only failures": replace(EMPTY, trials=(TriedArch(0, "a", {}, "failed", {}, "crash"),)),
        "one member": replace(content, members=content.members[:1], trials=(), training=()),
        "no members": replace(content, members=()),
        "no training": replace(content, training=()),
        "one training point": replace(content, training=content.training[:1]),
        "training without epochs": replace(
            content, training=tuple(replace(p, epoch=None) for p in content.training)
        ),
        "macs as the cost": replace(content, members=tuple(untimed), objectives=(macs,)),
        "latency wanted, not measured": replace(content, members=tuple(untimed)),
        "three objectives": replace(content, objectives=(*content.objectives, size)),
        "unknown metric": replace(content, objectives=(Objective("energy_mj", "minimise"),)),
        "a crowd and 60 choices": replace(content, trials=crowd, choices=choices),
        "perfect accuracy": replace(EMPTY, trials=(same, replace(same, number=1, arch_key="b"))),
        "a free network": replace(content, members=free, objectives=(macs,)),
    }


@pytest.mark.parametrize("name", variants(EMPTY))
def test_a_report_of_every_shape_is_whole(content: ReportContent, name: str) -> None:
    shape = variants(content)[name]
    page = Page(report_html(shape))
    assert page.all("h1")
    assert len(page.all("tbody")) >= (1 if shape.members else 0)
    assert front_markdown(shape).count("| [ONNX]") == len(shape.members)
    assert ReportContent.from_json(shape.to_json()) == shape


def test_sections_without_content_are_left_out() -> None:
    page = Page(report_html(EMPTY))
    titles = [
        text
        for text in page.text
        if text in {"Training", "The networks", "What the search tried", "Repeat it"}
    ]
    assert titles == ["Repeat it"]


@pytest.mark.parametrize("name", ["empty", "one member", "three objectives"])
def test_the_picture_is_a_png_of_the_size_that_is_said(content: ReportContent, name: str) -> None:
    picture = Image.open(io.BytesIO(front_png(variants(content)[name])))
    picture.load()
    assert (picture.format, picture.size) == ("PNG", (1440, 880))


def test_a_picture_with_a_strange_title_is_drawn(content: ReportContent) -> None:
    strange = replace(content, title="$x_{$ 雏鸟 " + "w" * 200, device_name="d" * 300)
    assert front_png(strange).startswith(b"\x89PNG")


def test_the_picture_of_the_same_content_is_the_same(content: ReportContent) -> None:
    assert front_png(content) == front_png(content)


def test_a_markdown_cell_cannot_break_its_row(content: ReportContent, member: Member) -> None:
    evil = replace(content, members=(replace(member, name="a|b\n<script>"),))
    row = next(line for line in front_markdown(evil).splitlines() if "ONNX" in line)
    assert "a\\|b &lt;script&gt;" in row


def test_the_markdown_table_has_as_many_cells_in_every_row(content: ReportContent) -> None:
    rows = [line for line in front_markdown(content).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(content.members)
    assert len({row.count("|") for row in rows}) == 1


def test_write_report_leaves_four_files_and_nothing_else(content: ReportContent, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    files = write_report(content, folder)
    written = [files.html, files.png, files.markdown, files.json]
    assert sorted(folder.iterdir()) == sorted(written)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in written)
    assert ReportContent.from_json(files.json.read_text()) == content
    assert files.html.read_text() == report_html(content)


def test_a_write_that_fails_leaves_the_old_report(
    content: ReportContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_report(content, tmp_path)
    before = files.json.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestling.run.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(EMPTY, tmp_path)
    assert files.json.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


def test_a_member_keeps_its_number_everywhere(content: ReportContent) -> None:
    assert member_numbers(content) == {"0" * 12: 1, "2" * 12: 2, "1" * 12: 3}
    html = report_html(content)
    for number, member in enumerate(content.ordered_members, start=1):
        assert f'<a href="#network-{number}">{member.name}</a>' in html


def test_the_gap_between_search_and_test_is_the_mean_over_the_networks(content: ReportContent) -> None:
    # 0.944 - 0.951, 0.944 - 0.98 and 0.981 - 0.986
    (told,) = verdicts(content)
    assert f"is 1.6 points below test accuracy on average ({MINUS}3.6 to {MINUS}0.5 above" in told
    assert "leave 1.7 points on either side open" in told
    lucky = replace(content, members=tuple(replace(m, search_top1=0.99) for m in content.members))
    assert "is 1.8 points above test accuracy" in verdicts(lucky)[0]
    assert told in report_html(content)
    assert "1.6 points below" in front_markdown(content)
    assert verdicts(EMPTY) == []


def test_the_gain_over_networks_that_nobody_chose_is_said_where_it_is_known(content: ReportContent) -> None:
    _, told = verdicts(replace(content, improvement=(0.041, -0.002, 0.08)))
    assert f"the front is {percent(0.041)} better than networks of the same multiply-accumulates" in told
    assert f"{MINUS}{percent(0.002)} to {percent(0.08)}" in told
    _, worse = verdicts(replace(content, improvement=(-0.041, -0.08, -0.002)))
    assert f"is {percent(0.041)} worse" in worse


def test_what_training_cost_is_on_the_page(content: ReportContent) -> None:
    assert "2.20 T (forecast 2.00 T)" in report_html(content)
    assert "2.20 T (forecast 2.00 T)" not in report_html(replace(content, training_cost={}))
