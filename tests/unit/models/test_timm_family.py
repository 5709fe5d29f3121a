from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.models import timm_family
from nestling.models.supernet import Supernet
from nestling.models.timm_arguments import alike, recipe_of, source
from nestling.space import Arch, Choice, SearchSpace, Value


def arch_of(model: str, **more: Value) -> Arch:
    return Arch((("model", model), *more.items()))


def vit(**more: Value) -> Arch:
    small: dict[str, Value] = {"classes": 5, "resolution": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return arch_of("vit_tiny_patch16_224", **(small | more))


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def built(arch: Arch) -> nn.Module:
    with torch.device("meta"):
        return timm_family.build(arch)


def rebuilt(arch: Arch) -> nn.Module:
    scope: dict[str, Any] = {}
    with torch.device("meta"):
        exec(timm_family.rebuild(arch), scope)
    network = scope["network"]
    assert isinstance(network, nn.Module)
    return network


@pytest.mark.parametrize(
    "model", ["resnet18", "test_vit", "mobilenetv3_small_050", "test_byobnet"]
)  # fmt: skip
def test_without_choices_a_network_is_the_one_that_timm_creates(model: str) -> None:
    with torch.device("meta"):
        expected = timm.create_model(model)
    assert type(built(arch_of(model))) is type(expected)
    assert shapes(built(arch_of(model))) == shapes(expected)


def test_an_argument_changes_what_timm_changes() -> None:
    arch = vit()
    with torch.device("meta"):
        expected = timm.create_model(
            "vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=32
        )
    assert shapes(built(arch)) == shapes(expected)


@pytest.mark.parametrize(
    ("arch", "argument", "expected"),
    [
        (arch_of("resnet18", **{"layers.0": 1, "layers.3": 1}), "layers", (1, 2, 2, 1)),
        (arch_of("levit_128s", **{"num_heads.1": 3}), "num_heads", (4, 3, 8)),
        (arch_of("regnetx_002", **{"cfg.depth": 7}), "cfg", 7),
        (arch_of("efficientnet_b0", **{"block_args.2": 1}), "block_args", 1),
        (arch_of("efficientnet_b0", **{"block_args.2.*.exp_ratio": 3.0}), "block_args", 3.0),
        (arch_of("efficientnet_b0", **{"round_chs_fn.multiplier": 0.5}), "round_chs_fn", 0.5),
    ],
)
def test_dots_lead_into_lists_tables_configurations_and_partials(
    arch: Arch, argument: str, expected: object
) -> None:
    changed = timm_family.changes(arch)[argument]
    found: object = changed
    match list(arch)[-1]:
        case "cfg.depth":
            found = changed.depth
        case "block_args.2":
            found = len(changed[2])
        case "block_args.2.*.exp_ratio":
            found = changed[2][1]["exp_ratio"]
        case "round_chs_fn.multiplier":
            found = changed.keywords["multiplier"]
    assert found == expected


def test_the_recipe_of_a_model_is_untouched_by_what_is_built_from_it() -> None:
    before = str(recipe_of("efficientnet_b0").arguments["block_args"])
    built(arch_of("efficientnet_b0", **{"block_args.1.*.exp_ratio": 2.0}))
    assert str(recipe_of("efficientnet_b0").arguments["block_args"]) == before


def test_precisions_are_no_arguments_and_are_named_by_layer() -> None:
    arch = arch_of("resnet18", **{"layer1.0.precision": "w8a8"})
    assert shapes(built(arch)) == shapes(built(arch_of("resnet18")))
    assert timm_family.layers("layer1.0") == ("layer1.0",)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (Arch(()), "model = "),
        (arch_of("resnet81"), "no model 'resnet81'; did you mean 'resnet"),
        (arch_of("hf-hub:timm/resnet18"), "no model"),
        (arch_of("resnet18", layer=2), "no 'layer'; did you mean 'layers'"),
        (arch_of("resnet18", **{"layers.4": 2}), "no '4'; there is 0, 1, 2, 3"),
        (arch_of("resnet18", **{"zero_init_last.a": 2}), "nothing inside"),
        (arch_of("efficientnet_b0", **{"block_args.2": 3}), "block_args.2 is 3; it says how many of 2"),
        (arch_of("vit_tiny_patch16_224", num_heads=5), "num_heads = 5: AssertionError"),
        (arch_of("ecaresnet50d_pruned"), "stored shapes"),
    ],
)
def test_a_wrong_model_argument_or_value_is_refused_by_name(arch: Arch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_family.build(arch)


@pytest.mark.parametrize(
    ("arch", "entry"),
    [
        (vit(depth=1, mlp_ratio=2.0), "timm.create_model("),
        (arch_of("resnet18", classes=4, **{"layers.1": 1}), "timm.create_model("),
        (arch_of("regnetx_002", **{"cfg.depth": 7}), "timm.models.regnet.RegNet("),
        (arch_of("mobilenetv2_050", **{"block_args.3": 1}), "timm.models.efficientnet.EfficientNet("),
    ],
)
def test_the_source_of_a_network_makes_it_without_nestling(arch: Arch, entry: str) -> None:
    text = timm_family.rebuild(arch)
    assert entry in text
    assert "nestling" not in text
    assert shapes(rebuilt(arch)) == shapes(built(arch))


def test_what_has_no_name_has_no_source() -> None:
    with pytest.raises(ValueError, match="no name that can be imported"):
        source({"a": [lambda: 0]})


def test_partials_are_alike_where_function_and_arguments_are() -> None:
    first, second = (
        recipe_of(name).arguments["round_chs_fn"] for name in ("efficientnet_b0", "efficientnet_b1")
    )
    assert first is not second
    assert alike([first], [second])
    assert not alike([first], [recipe_of("efficientnet_b2").arguments["round_chs_fn"]])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of `vit()`."""
    torch.manual_seed(3)
    torch.save({"state_dict": timm_family.build(vit()).state_dict()}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_the_largest_network_has_the_logits_of_the_pretrained_one(checkpoint: Path, images: Tensor) -> None:
    arch = vit(pretrained=str(checkpoint))
    plain = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=32,
        checkpoint_path=str(checkpoint),
    ).eval()  # fmt: skip
    space = SearchSpace("timm", tuple(Choice(name, (value,)) for name, value in arch.items()))
    supernet = Supernet(space, timm_family.build, largest=timm_family.pretrained(arch)).eval()
    assert torch.equal(supernet(images, space.largest), plain(images))


def test_positions_of_pretrained_weights_are_interpolated_as_timm_does(checkpoint: Path) -> None:
    network = timm_family.pretrained(vit(resolution=48, pretrained=str(checkpoint)))
    expected = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=48,
        pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint), "num_classes": 5},
    )  # fmt: skip
    assert torch.equal(network.get_parameter("pos_embed"), expected.get_parameter("pos_embed"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"embed_dim": 12}, r"do not fit.*pos_embed"),
        ({"depth": 3}, r"do not fit.*blocks\.2"),
        ({"depth": 1}, r"do not fit.*blocks\.1"),
        ({"classes": 6}, r"do not fit.*head"),
    ],
)
def test_pretrained_weights_that_do_not_fit_are_refused_by_tensor(
    checkpoint: Path, more: dict[str, Value], message: str
) -> None:
    decisions = {**vit(), **more, "pretrained": str(checkpoint)}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        timm_family.pretrained(Arch(tuple(decisions.items())))


def test_weights_that_are_nowhere_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        timm_family.pretrained(vit(pretrained="nowhere.pth"))
    with pytest.raises(ValueError, match="pretrained is 3"):
        timm_family.pretrained(vit(pretrained=3))
    with pytest.raises(ValueError, match="timm has no weights of resnet200"):
        timm_family.pretrained(arch_of("resnet200", pretrained=True))
