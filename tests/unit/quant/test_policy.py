from __future__ import annotations

import numpy as np
import pytest

from nestling.quant import PRECISIONS, Format, QuantPolicy


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ("blocks.1.0.conv", "w8a8"),
        ("blocks.1", "w8a8"),
        ("blocks.1.2", "fp32"),
        ("blocks.1.2.conv", "fp32"),
        ("blocks.10.conv", "fp32"),
        ("head", "fp32"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_prefix_of_whole_steps_wins_in_any_order(
    layer: str, precision: str, turned: bool
) -> None:
    rules = (("blocks.1", "w8a8"), ("blocks.1.2", "fp32"))
    assert QuantPolicy(rules[::-1] if turned else rules).precision(layer) == PRECISIONS[precision]


def test_the_empty_prefix_covers_every_layer() -> None:
    policy = QuantPolicy((("", "w8a8"), ("head", "fp32")))
    assert [policy.precision(layer).name for layer in ("", "blocks.0", "head.fc")] == ["w8a8", "w8a8", "fp32"]


def test_without_a_rule_a_layer_is_fp32() -> None:
    assert QuantPolicy().precision("blocks.0") == PRECISIONS["fp32"]


def test_an_unknown_precision_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'blocks': unknown precision 'w8a9'; did you mean 'w8a8'\?"):
        QuantPolicy((("blocks", "w8a9"),))


def test_two_rules_for_one_prefix_are_refused() -> None:
    with pytest.raises(ValueError, match="two rules for 'blocks'"):
        QuantPolicy((("blocks", "w8a8"), ("blocks", "fp32")))


def test_a_format_has_the_limits_of_its_integer_type() -> None:
    formats = [PRECISIONS["w8a8"].weight, PRECISIONS["w8a8"].activation]
    for format, dtype in zip(formats, ("int8", "uint8"), strict=True):
        assert isinstance(format, Format)
        assert format.dtype == dtype
        assert (format.low, format.high) == (np.iinfo(dtype).min, np.iinfo(dtype).max)
