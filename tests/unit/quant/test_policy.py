from __future__ import annotations

import numpy as np
import pytest

from nestling.quant import PRECISIONS, Format, QuantPolicy, covers, most_exact


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


@pytest.mark.parametrize(
    ("prefix", "layer", "covered"),
    [
        ("blocks.*.conv", "blocks.1.conv", True),
        ("blocks.*.conv", "blocks.1.conv.inner", True),
        ("blocks.*.conv", "blocks.conv", False),
        ("blocks.*.conv", "blocks.1.conv2", False),
        ("*.attn.q|k|v", "0.attn.k", True),
        ("*.attn.q|k|v", "0.attn.qk", False),
        ("blocks.1", "blocks", False),
    ],
)
def test_a_step_of_a_prefix_may_be_any_name_or_one_of_several(prefix: str, layer: str, covered: bool) -> None:
    assert covers(prefix, layer) is covered


def test_more_steps_decide_and_then_the_name_before_the_names_before_any() -> None:
    ranked = ["", "a", "*.*", "*.b|c", "*.b", "a.*", "a.b|c", "a.b", "*.*.d"]
    for count in range(1, len(ranked) + 1):
        for order in (ranked[:count], ranked[:count][::-1]):
            assert most_exact(order, "a.b.d") == ranked[count - 1]
    assert most_exact(["x", "a.c"], "a.b.d") is None


def test_rules_as_exact_as_each_other_are_refused() -> None:
    policy = QuantPolicy((("a.b|c", "w8a8"), ("a.c|d", "fp32")))
    assert policy.precision("a.b").name == "w8a8"
    with pytest.raises(ValueError, match=r"as exact for the layer 'a\.c'"):
        policy.precision("a.c")
