from __future__ import annotations

import pytest

from nestling.models import convnext, mobilenet, resnet, vit
from nestling.space import Arch


@pytest.mark.parametrize(
    ("layers", "place", "prefixes"),
    [
        (mobilenet.layers, "s2", {"blocks.1"}),
        (mobilenet.layers, "s2.b3", {"blocks.1.2"}),
        (mobilenet.layers, "s2.conv_dw", {"blocks.1.*.conv_dw"}),
        (mobilenet.layers, "s2.b3.conv_dw", {"blocks.1.2.conv_dw"}),
        (mobilenet.layers, "stem", {"conv_stem", "bn1"}),
        (resnet.layers, "s2.b1", {"layer2.0"}),
        (resnet.layers, "s2.conv1", {"layer2.*.conv1"}),
        (vit.layers, "s1.b2", {"blocks.1"}),
        (vit.layers, "s1.attn.qkv", {"blocks.*.attn.qkv"}),
        (convnext.layers, "s2", {"stages.1.blocks", "stages.1.downsample"}),
        (convnext.layers, "s2.b1", {"stages.1.blocks.0", "stages.1.downsample"}),
        (convnext.layers, "s2.b2", {"stages.1.blocks.1"}),
        (convnext.layers, "s2.mlp.fc1", {"stages.1.blocks.*.mlp.fc1"}),
        (convnext.layers, "s2.downsample", {"stages.1.downsample"}),
    ],
)
def test_a_place_is_a_stage_a_block_or_their_layers(layers, place, prefixes) -> None:  # type: ignore[no-untyped-def]
    assert set(layers(place)) == prefixes


def test_a_layer_of_an_end_is_named_alone_or_within() -> None:
    assert mobilenet.layers("head.classifier")[0] == "classifier"
    assert "stem.1" in convnext.layers("stem.1")
    assert "blocks.0" not in mobilenet.layers("head.blocks.0")


def test_a_place_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'neck' is no place of a network; those are stem, head, s1"):
        resnet.layers("neck")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("s1.precision", True),
        ("s1.b2.precision", True),
        ("s1.conv_dw.precision", True),
        ("s1.b2.se.conv_reduce.precision", True),
        ("head.classifier.precision", True),
        ("neck.precision", False),
        ("precision", False),
        ("s1.conv_dw.kernel", False),
    ],
)
def test_a_family_reads_the_precisions_of_its_stages_and_ends(name: str, known: bool) -> None:
    arch = Arch(((name, "fp32"),))
    if known:
        mobilenet.COLUMNS.check(arch)
    else:
        with pytest.raises(ValueError, match=f"no choice '{name}'"):
            mobilenet.COLUMNS.check(arch)
