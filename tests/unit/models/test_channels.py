from __future__ import annotations

from nestling.models.channels import ChannelGroup, channel_groups
from nestling.models.mobilenet import build
from nestling.space import SearchSpace


def by_axis(groups: tuple[ChannelGroup, ...]) -> dict[tuple[str, int], ChannelGroup]:
    return {axis: group for group in groups for axis in group.axes}


def test_a_group_holds_every_axis_that_the_channels_index(space: SearchSpace) -> None:
    group = by_axis(channel_groups(build(space.largest)))["blocks.1.1.conv_pwl.weight", 1]
    assert group.size == 72
    prefix = "blocks.1.1."
    norms = [f"{bn}.{t}" for bn in ("bn1", "bn2") for t in ("weight", "bias", "running_mean", "running_var")]
    expected = {(prefix + name, 0) for name in ("conv_pw.weight", "conv_dw.weight", *norms)}
    expected |= {(prefix + "se.conv_reduce.weight", 1), (prefix + "conv_pwl.weight", 1)}
    expected |= {(prefix + "se.conv_expand.weight", 0), (prefix + "se.conv_expand.bias", 0)}
    assert set(group.axes) == expected
    assert set(group.readers) == {(prefix + "se.conv_reduce.weight", 1), (prefix + "conv_pwl.weight", 1)}


def test_residual_connections_put_a_whole_stage_in_one_group(space: SearchSpace) -> None:
    group = by_axis(channel_groups(build(space.largest)))["blocks.1.2.conv_pwl.weight", 0]
    for block in range(3):
        assert (f"blocks.1.{block}.conv_pwl.weight", 0) in group.axes
    assert ("blocks.2.0.conv_pw.weight", 1) in group.readers


def test_input_output_and_grouped_convolutions_keep_their_order(space: SearchSpace) -> None:
    found = by_axis(channel_groups(build(space.largest)))
    for axis in (
        ("conv_stem.weight", 1),
        ("classifier.weight", 0),
        ("classifier.bias", 0),
        ("blocks.2.0.conv_dw.weight", 0),
        ("blocks.2.0.conv_pwl.weight", 1),
    ):
        assert axis not in found
