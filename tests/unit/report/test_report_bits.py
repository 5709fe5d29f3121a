from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nestling.report import LayerBits, ReportContent, report_html
from nestling.report.bits import bit_maps, merged, words
from nestling.report.units import count
from nestling.report.words import member_numbers


def layer(
    name: str, precision: str = "w8a8", weight_bits: float = 8, activation_bits: float = 8
) -> LayerBits:
    return LayerBits(name, "Conv", precision, weight_bits, activation_bits, 1_000_000, 2_000)


@pytest.fixture
def layered(content: ReportContent) -> ReportContent:
    """Three networks, the middle one without layers, and the sensitivity of the largest."""
    large, small, middle = content.members
    return replace(
        content,
        members=(
            replace(
                large, layers=(layer("stem", "fp32", 32, 32), layer("s1.0"), layer("s1.1"), layer("head"))
            ),
            replace(small, layers=(layer("stem"), layer("s1.0", "w4", 4, 32), layer("head"))),
            middle,
        ),
        sensitivity={
            "stem": {"w8a8": 1e-3, "w4": 1e-1},
            "s1.0": {"w8a8": 1e-5, "w4": 1e-3},
            "s1.1": {"w8a8": 0.0, "w4": 1e-3},
            "head": {"w8a8": 1e-4, "w4": 1e-2},
        },
    )


def _bars(markup: str, label: str) -> list[tuple[float, float]]:
    """Left edge and height in percent of the bars of the picture whose words begin with `label`."""
    picture = next(svg for svg in markup.split("<svg")[1:] if f'aria-label="{label}' in svg).split("</svg>")[
        0
    ]
    found = re.findall(r'<rect x="([\d.]+)%"[^>]* height="([\d.]+)%"', picture)
    return [(float(left), float(height)) for left, height in found]


def test_a_bar_is_as_high_as_its_layer_has_bits_and_stands_at_its_layer(layered: ReportContent) -> None:
    markup = bit_maps(layered, member_numbers(layered))
    assert markup is not None
    large, small = _bars(markup, "large:"), _bars(markup, "small:")
    assert len(large) == 8  # weights and activations of four layers
    assert len(small) == 6
    weights = [height for _, height in large[::2]]
    assert weights[0] == 80
    assert weights[1] == pytest.approx(80 * 3 / 5)
    assert [left for left, _ in small[::2]] == [large[0][0], large[2][0], large[6][0]]
    assert "middle" not in markup


def test_the_words_tell_what_the_bars_show(layered: ReportContent) -> None:
    assert words(layered.members[0].layers) == "stem fp32, s1.0 to head w8a8"
    page = report_html(layered)
    assert 'aria-label="large: stem fp32, s1.0 to head w8a8"' in page
    assert "Most sensitive to w8a8: stem (1.0e-03 nats), head (1.0e-04 nats), s1.0 (1.0e-05 nats)" in page
    assert f"s1.0: w4\nConv, {count(1_000_000)} multiply-accumulates" in page


def test_sensitivities_of_all_precisions_share_one_logarithmic_scale(layered: ReportContent) -> None:
    markup = bit_maps(layered, member_numbers(layered))
    assert markup is not None
    coarse, fine = _bars(markup, "Most sensitive to w4"), _bars(markup, "Most sensitive to w8a8")
    heights = [height for _, height in coarse]
    assert heights == [100, pytest.approx(53), pytest.approx(53), pytest.approx(76.5)]
    assert [height for _, height in fine] == [pytest.approx(53), pytest.approx(6), pytest.approx(29.5)]


def test_networks_of_floats_only_have_no_picture(content: ReportContent, layered: ReportContent) -> None:
    assert bit_maps(content, member_numbers(content)) is None
    plain = (layer("stem", "fp32", 32, 32),)
    members = tuple(replace(member, layers=plain) for member in layered.members)
    floats = replace(layered, members=members)
    assert bit_maps(floats, member_numbers(floats)) is None


def test_layers_of_networks_of_other_depths_keep_their_order() -> None:
    assert merged([["a", "b.0", "c"], ["a", "b.0", "b.1", "c"], ["a", "x", "c"]]) == [
        "a",
        "x",
        "b.0",
        "b.1",
        "c",
    ]
    assert merged([]) == []


def test_layers_and_sensitivity_survive_the_json(layered: ReportContent) -> None:
    assert ReportContent.from_json(layered.to_json()) == layered
