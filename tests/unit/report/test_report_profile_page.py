from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nestling.profile import Conditions, Elsewhere, FileProfile, Fingerprint, Kernel, MadeUp, Measurement
from nestling.report import profile_html

FINGERPRINT = Fingerprint(
    device="ort:cpu?threads=1",
    cpu="A CPU",
    instructions=("avx2",),
    cores=2,
    platform="Linux x86_64",
    runtime="onnxruntime 1.0",
    reference="0123456789ab",
    int8_saturates=False,
)


def kernel(name: str, op: str, microseconds: float) -> Kernel:
    return Kernel(name, op, "CPUExecutionProvider", ("float", "float"), ("float",), microseconds)


@pytest.fixture
def profile() -> FileProfile:
    taken = Measurement(FINGERPRINT, (0.004,) * 40, (0.001,) * 40, 0.02, 0.01)
    nodes = [kernel("<stem>", "Conv", 3000.0), kernel("head", "Gemm", 500.0), kernel("relu", "Relu", 500.0)]
    return FileProfile(
        Path("folder/net.onnx"), taken, (MadeUp("images", "float32", (1, 3, 8, 8)),), {}, tuple(nodes)
    )


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_loads_nothing(profile: FileProfile) -> None:
    page = profile_html([profile])
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "&lt;stem&gt;" in page
    assert "<stem>" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert not re.search(r"<script|https?://|@import|url\(", page)


def test_the_strip_is_as_wide_as_the_nodes_take_long(profile: FileProfile) -> None:
    strip = re.search(r'<svg class="node-strip".*?</svg>', profile_html([profile]))
    assert strip is not None
    spans = re.findall(r'<rect x="([\d.]+)%" y="0" width="([\d.]+)%"', strip[0])
    assert [tuple(map(float, span)) for span in spans] == [(0, 75), (75, 12.5), (87.5, 12.5)]


def test_a_bar_is_as_long_as_its_node_takes_beside_the_dearest(profile: FileProfile) -> None:
    bars = re.findall(
        r'<svg class="node-bar"[^>]*><rect x="0" y="0" width="([\d.]+)%"', profile_html([profile])
    )
    assert [float(bar) for bar in bars] == [100.0, 16.67, 16.67]


def test_every_class_of_the_page_has_a_style(profile: FileProfile) -> None:
    page = profile_html([profile])
    style, _, body = page.partition("</style>")
    used = {name for names in re.findall(r'class="([^"]+)"', body) for name in names.split()}
    assert {name for name in used if not re.search(rf"\.{name}\b", style)} == set()


def test_an_operator_has_one_shade_on_every_device(profile: FileProfile) -> None:
    other = dataclasses.replace(
        profile,
        measurement=dataclasses.replace(
            profile.measurement, fingerprint=dataclasses.replace(FINGERPRINT, device="openvino:cpu?threads=1")
        ),
        nodes=(kernel("head", "Gemm", 900.0), kernel("stem", "Conv", 100.0)),
    )
    page = profile_html([profile, other])
    shades: dict[str, str] = {}
    for name, shade in re.findall(r"<td>(Conv|Gemm)</td>.*?class=\"(node-\d)\"", page):
        assert shades.setdefault(name, shade) == shade
    assert len(set(shades.values())) == 2


def test_what_is_doubtful_is_on_the_page(profile: FileProfile) -> None:
    taken = dataclasses.replace(
        profile.measurement, conditions=Conditions(interrupted=0.5), elsewhere=Elsewhere(0.25, 0.125)
    )
    page = profile_html([dataclasses.replace(profile, measurement=taken, joules={"package-0": 0.5})])
    assert "other programs interrupted 50% of the pairs" in page
    assert "12.5" in page
    assert "J a run (package-0)" in page


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        profile_html([])
