from __future__ import annotations

from dataclasses import replace

import pytest

from nestling.report import ReportContent, Tuned, report_html
from nestling.report.markdown import front_markdown
from nestling.report.tuned import cells, table
from nestling.report.units import percent


@pytest.fixture
def content(content: ReportContent) -> ReportContent:
    """The usual content, and a network that was trained further."""
    tuned = Tuned(
        name="000000000000-tuned-abc123",
        arch_key="0" * 12,
        from_scratch=False,
        epochs=25.0,
        teacher="largest",
        search_before=0.944,
        search_after=0.9525,
        test_before=0.951,
        test_before_interval=(0.93, 0.97),
        test_after=0.9612,
        test_after_interval=(0.94, 0.98),
        latency_ms=0.213,
        unstable=True,
        onnx_path="exports/000000000000-tuned-abc123/model.onnx",
        before_path="exports/000000000000-tuned-abc123/model_before.onnx",
    )
    return replace(content, tuned=(tuned,))


def test_a_tuned_network_is_told_with_its_accuracies_before_and_after(content: ReportContent) -> None:
    told = cells(content.tuned[0])
    figures = [percent(value, decimals=2) for value in (0.944, 0.9525, 0.951, 0.9612)]
    assert told[1:4] == ("25 epochs further, taught by largest", *figures[:2])
    assert told[4].startswith(f"{figures[2]} (")
    assert told[5].startswith(f"{figures[3]} (")
    assert told[6].endswith("ms (unstable)")
    for text in (report_html(content), front_markdown(content)):
        assert all(cell in text for cell in (told[0], *told[1:4]))
        assert "./exports/000000000000-tuned-abc123/model.onnx" in text


@pytest.mark.parametrize(
    ("from_scratch", "teacher", "qat", "words"),
    [
        (True, "largest", None, "25 epochs from scratch, taught by largest"),
        (True, "none", None, "25 epochs from scratch"),
        (False, "none", None, "25 epochs further"),
        (False, "resnet18", None, "25 epochs further, taught by resnet18"),
        (False, "parent", "lsq", "25 epochs further in its precisions (LSQ), taught by itself in floats"),
        (False, "largest", "ofq", "25 epochs further in its precisions (OFQ), taught by largest"),
    ],
)
def test_it_is_said_how_a_network_was_trained(
    content: ReportContent, from_scratch: bool, teacher: str, qat: str | None, words: str
) -> None:
    tuned = replace(content.tuned[0], from_scratch=from_scratch, teacher=teacher, qat=qat)
    assert cells(tuned)[1] == words


def test_without_tuned_networks_there_is_no_table(content: ReportContent) -> None:
    bare = replace(content, tuned=())
    assert table(bare) is None
    assert "Trained further" not in report_html(bare)
    assert "Search, before" not in front_markdown(bare)


def test_tuned_networks_survive_the_report_s_json(content: ReportContent) -> None:
    assert ReportContent.from_json(content.to_json()).tuned == content.tuned


def test_a_tuned_network_s_names_and_paths_stay_text(content: ReportContent) -> None:
    evil = replace(
        content.tuned[0], name="<img src=x>|", teacher="<b>", onnx_path="javascript:x", before_path="//evil/x"
    )
    html, markdown = (make(replace(content, tuned=(evil,))) for make in (report_html, front_markdown))
    assert "<img" not in html + markdown
    assert 'href="./javascript%3Ax"' in html
    assert 'href=".///evil/x"' in html
    rows = [line for line in markdown.splitlines() if line.startswith("|") and "img" in line]
    assert len(rows) == 1
    assert rows[0].count("|") - rows[0].count("\\|") == 9
