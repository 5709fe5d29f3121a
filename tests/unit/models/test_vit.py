from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nestling.export import to_onnx
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.graph import Graph, trace
from nestling.models.supernet import Supernet, at_resolution
from nestling.models.vit import build, layers, rebuild
from nestling.quant import QuantPolicy, insert_qdq, observe, simulate
from nestling.space import Arch, Choice, Need, SearchSpace, Value
from nestling.space.files import load_space

SPACES = Path(__file__).parents[3] / "search_spaces"
HEAD_DIM = 4
# in no block do the heads together make up the width of the network
SMALL = {"resolution": 8, "embed.width": 18, "s1.depth": 2, "s1.b1.heads": 2, "s1.b2.heads": 3}


@pytest.fixture(scope="module")
def vits() -> SearchSpace:
    """Two or three blocks of one to three heads of four channels, for images of 8, 12 or 16 pixels."""
    rows: list[tuple[str, tuple[Value, ...]]] = [
        ("resolution", (8, 12, 16)),
        ("classes", (5,)),
        ("patch", (4,)),
        ("head_dim", (HEAD_DIM,)),
        ("pool", ("token", "avg")),
        ("embed.width", (10, 18, 22)),
        ("s1.depth", (2, 3)),
    ]
    blocks = [
        Choice(f"s1.b{block}.{column}", values, (Need("s1.depth", block),) if block > 2 else ())
        for block in (1, 2, 3)
        for column, values in (("heads", (1, 2, 3)), ("mlp", (1.5, 2, 2.5)))
    ]
    return SearchSpace("vit", (*(Choice(name, values) for name, values in rows), *blocks))


@pytest.fixture
def supernet(vits: SearchSpace) -> Supernet:
    """A supernet in evaluation mode, no two of whose weights are alike."""
    torch.manual_seed(0)
    supernet = Supernet(vits, build).eval()
    for parameter in supernet.parameters():
        parameter.data.normal_(std=0.3)
    return supernet


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Four images (4, 3, 16, 16)."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def change(arch: Arch, **values: Value) -> Arch:
    return Arch(tuple({**arch, **{k.replace("__", "."): v for k, v in values.items()}}.items()))


def small(vits: SearchSpace, **values: Value) -> Arch:
    return vits.canonical({**vits.largest, **SMALL, **{k.replace("__", "."): v for k, v in values.items()}})


def attention(network: nn.Module, block: int) -> Attention:
    found = network.get_submodule(f"blocks.{block}.attn")
    assert isinstance(found, Attention)
    return found


def computed_by_hand(large: Mapping[str, Tensor], arch: Arch, images: Tensor) -> Tensor:
    """The logits of `arch`, written out head by head from slices of the largest network's tensors."""
    width, heads_of_large = (
        arch.integer("embed.width"),
        large["blocks.0.attn.proj.weight"].shape[1] // HEAD_DIM,
    )

    def norm(tokens: Tensor, name: str) -> Tensor:
        weight, bias = large[f"{name}.weight"][:width], large[f"{name}.bias"][:width]
        return F.layer_norm(tokens, (width,), weight, bias, eps=1e-6)

    maps = F.conv2d(
        images, large["patch_embed.proj.weight"][:width], large["patch_embed.proj.bias"][:width], 4
    )
    side = maps.shape[-1]
    token = large["cls_token"][..., :width].expand(len(images), 1, width)
    tokens = torch.cat([token, maps.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + resample_abs_pos_embed(large["pos_embed"], [side, side], [4, 4])[..., :width]
    for block in range(arch.integer("s1.depth")):
        name = f"blocks.{block}"
        seen, after = norm(tokens, f"{name}.norm1"), large[f"{name}.attn.proj.bias"][:width]
        for head in range(arch.integer(f"s1.b{block + 1}.heads")):
            query, key, value = (
                seen @ large[f"{name}.attn.qkv.weight"][start : start + HEAD_DIM, :width].T
                + large[f"{name}.attn.qkv.bias"][start : start + HEAD_DIM]
                for start in ((part * heads_of_large + head) * HEAD_DIM for part in range(3))
            )
            mixed = (query @ key.transpose(1, 2) / HEAD_DIM**0.5).softmax(-1) @ value
            columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            after = after + mixed @ large[f"{name}.attn.proj.weight"][:width, columns].T
        tokens = tokens + after
        inner = int(width * float(arch[f"s1.b{block + 1}.mlp"]))
        weights = [large[f"{name}.mlp.fc{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")]
        hidden = F.gelu(
            F.linear(norm(tokens, f"{name}.norm2"), weights[0][:inner, :width], weights[1][:inner])
        )
        tokens = tokens + F.linear(hidden, weights[2][:width, :inner], weights[3][:width])
    tokens = norm(tokens, "norm")
    pooled = tokens[:, 0] if arch["pool"] == "token" else tokens[:, 1:].mean(1)
    return F.linear(pooled, large["head.weight"][:, :width], large["head.bias"])


def test_the_network_is_what_the_choices_say(vits: SearchSpace) -> None:
    network = build_shapes(build, small(vits, s1__b2__mlp=1.5, pool="avg"))
    assert type(network) is VisionTransformer
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    assert shapes["pos_embed"] == (1, 1 + 2 * 2, 18)
    assert shapes["patch_embed.proj.weight"] == (18, 3, 4, 4)
    assert [shapes[f"blocks.{i}.attn.qkv.weight"] for i in (0, 1)] == [(3 * 2 * 4, 18), (3 * 3 * 4, 18)]
    assert [shapes[f"blocks.{i}.attn.proj.weight"] for i in (0, 1)] == [(18, 2 * 4), (18, 3 * 4)]
    assert [shapes[f"blocks.{i}.mlp.fc1.weight"] for i in (0, 1)] == [(45, 18), (27, 18)]
    assert shapes["head.weight"] == (5, 18)
    assert not any(name.startswith("blocks.2") for name in shapes)
    assert vars(network)["global_pool"] == "avg"


def test_a_choice_of_all_blocks_gives_way_to_a_blocks_own(vits: SearchSpace) -> None:
    decided: dict[str, Value] = {k: v for k, v in vits.largest.items() if not k.startswith("s1.b")}
    arch = Arch(tuple({**decided, "s1.heads": 3, "s1.mlp": 2, "s1.b2.heads": 1}.items()))
    network = build_shapes(build, arch)
    assert [attention(network, block).num_heads for block in range(3)] == [3, 1, 3]


def test_with_heads_as_wide_as_the_network_it_is_timms_own(pictures: Tensor) -> None:
    decided = {
        "resolution": 16, "classes": 5, "patch": 4, "head_dim": 6, "embed.width": 18,
        "s1.depth": 2, "s1.heads": 3, "s1.mlp": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    network = build(Arch(tuple(decided.items()))).eval()
    theirs = VisionTransformer(16, 4, num_classes=5, embed_dim=18, depth=2, num_heads=3).eval()
    theirs.load_state_dict(network.state_dict())
    assert torch.equal(network(pictures), theirs(pictures))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("resolution", [8, 12, 16])
def test_a_subnet_computes_with_the_first_heads_and_the_resampled_positions(
    supernet: Supernet, pictures: Tensor, pool: str, resolution: int
) -> None:
    arch = small(supernet.space, resolution=resolution, pool=pool)
    state = dict(supernet.largest.named_parameters())
    expected = computed_by_hand(state, arch, at_resolution(pictures, arch))
    torch.testing.assert_close(supernet(pictures, arch), expected, rtol=1e-4, atol=1e-4)


def test_of_fused_queries_keys_and_values_each_is_cut_head_by_head(supernet: Supernet) -> None:
    arch = small(supernet.space)
    network = supernet.materialize(arch)
    for block, heads in ((0, 2), (1, 3)):
        large, cut = attention(supernet.largest, block), attention(network, block)
        rows = large.qkv.weight.reshape(3, 3, HEAD_DIM, 22)[:, :heads, :, :18]
        assert torch.equal(cut.qkv.weight.reshape(3, heads, HEAD_DIM, 18), rows)
        assert large.qkv.bias is not None
        assert cut.qkv.bias is not None
        biases = large.qkv.bias.reshape(3, 3, HEAD_DIM)[:, :heads]
        assert torch.equal(cut.qkv.bias.reshape(3, heads, HEAD_DIM), biases)
        assert torch.equal(cut.proj.weight, large.proj.weight[:18, : heads * HEAD_DIM])


def test_smaller_heads_are_the_first_channels_of_each_head(supernet: Supernet) -> None:
    arch = change(small(supernet.space), head_dim=3)
    cut, large = attention(supernet.materialize(arch), 0), attention(supernet.largest, 0)
    rows = large.qkv.weight.reshape(3, 3, HEAD_DIM, 22)[:, :2, :3, :18]
    assert torch.equal(cut.qkv.weight.reshape(3, 2, 3, 18), rows)
    columns = large.proj.weight.reshape(22, 3, HEAD_DIM)[:18, :2, :3]
    assert torch.equal(cut.proj.weight.reshape(18, 2, 3), columns)


def test_shared_and_materialized_agree_to_the_last_bit(supernet: Supernet, pictures: Tensor) -> None:
    rng = random.Random(5)
    archs = [supernet.space.sample(rng) for _ in range(5)]
    assert len({arch["resolution"] for arch in archs}) > 1
    for arch in archs:
        own = supernet.materialize(arch)(at_resolution(pictures, arch))
        assert torch.equal(supernet(pictures, arch), own)


def test_gradients_reach_the_whole_table_of_positions_of_the_largest(
    supernet: Supernet, pictures: Tensor
) -> None:
    supernet(pictures, small(supernet.space, resolution=8)).square().sum().backward()
    gradient = supernet.largest.get_parameter("pos_embed").grad
    assert gradient is not None
    assert (gradient[0, :, :18].abs().sum(1) > 0).all()  # the class token and all 4 x 4 positions
    assert not gradient[..., 18:].any()


def test_gradients_reach_the_lent_heads_and_blocks_alone(supernet: Supernet, pictures: Tensor) -> None:
    supernet(pictures, small(supernet.space)).square().sum().backward()
    weight = attention(supernet.largest, 0).qkv.weight
    assert weight.grad is not None
    touched = weight.grad.reshape(3, 3, HEAD_DIM, 22).abs().sum((2, 3)) > 0
    assert touched.tolist() == [[True, True, False]] * 3
    assert attention(supernet.largest, 2).qkv.weight.grad is None


def test_both_pools_have_the_same_weights(vits: SearchSpace) -> None:
    shapes = [
        {
            name: tensor.shape
            for name, tensor in build_shapes(build, small(vits, pool=pool)).named_parameters()
        }
        for pool in ("token", "avg")
    ]
    assert shapes[0] == shapes[1]


def test_the_layers_of_all_stages_are_the_layers_of_the_network(vits: SearchSpace) -> None:
    prefixes = [prefix for stage in ("stem", "s1.b1", "s1.b2", "s1.b3", "head") for prefix in layers(stage)]
    assert layers("s1") == ("blocks",)
    assert layers("s1.b3") == ("blocks.2",)
    for name, found in build_shapes(build, vits.largest).named_modules():
        if not list(found.children()):
            assert len([p for p in prefixes if name == p or name.startswith(f"{p}.")]) == 1, name


@pytest.mark.parametrize("values", [{"pool": "avg", "act": "relu"}, {"qkv_bias": False}])
def test_the_source_that_rebuilds_a_network_needs_timm_alone(
    supernet: Supernet, pictures: Tensor, values: dict[str, Value]
) -> None:
    arch = change(small(supernet.space, resolution=12), **values)
    source = rebuild(arch)
    assert "nestling" not in source
    names: dict[str, Any] = {}
    exec(source, names)
    theirs, network = names["network"].eval(), build(arch).eval()
    theirs.load_state_dict(network.state_dict())
    images = at_resolution(pictures, arch)
    assert torch.equal(theirs(images), network(images))


def run_onnx(model: onnx.ModelProto, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))


@pytest.fixture
def graph(supernet: Supernet) -> Graph:
    """A subnet of unequal heads, for images of 16 pixels."""
    return trace(supernet.materialize(small(supernet.space, resolution=16)), resolution=16)


def test_the_onnx_file_of_a_subnet_computes_what_the_subnet_computes(
    supernet: Supernet, graph: Graph, pictures: Tensor
) -> None:
    model = to_onnx(graph, dynamic_batch=True)
    onnx.checker.check_model(model, full_check=True)
    expected = supernet(pictures, small(supernet.space, resolution=16)).detach()
    torch.testing.assert_close(run_onnx(model, pictures), expected, rtol=1e-4, atol=1e-4)


def test_stages_are_quantized_one_by_one(graph: Graph, pictures: Tensor) -> None:
    def integers(*stages: str) -> set[str]:
        policy = QuantPolicy(tuple((prefix, "w8a8") for stage in stages for prefix in layers(stage)))
        ranges = observe(graph, policy, [pictures], reduce_range=True)
        expected = simulate(graph, ranges).run(pictures)
        got = run_onnx(insert_qdq(to_onnx(graph, dynamic_batch=True), ranges), pictures)
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()
        return {operator.layer for operator in graph.operators if f"{operator.name}.weight" in ranges}

    projections = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert integers("stem") == {"patch_embed.proj"}
    assert integers("head") == {"head"}
    assert integers("s1.b2") == {f"blocks.1.{name}" for name in projections}
    assert integers("s1") == {f"blocks.{block}.{name}" for block in (0, 1) for name in projections}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s1__width": 8}, "no choice 's1.width'; a stage has depth, heads, mlp"),
        ({"embed": 8}, "no choice 'embed'; .*embed.width"),
        ({"s1": 8}, "no choice 's1'"),
        ({"s2__depth": 2}, "has one row, s1, not s1, s2"),
        ({"resolution": 18}, "resolution is 18; with a patch of 4 it is a multiple"),
        ({"s1__depth": 0}, "s1.depth is 0; it is a whole number of at least 1"),
        ({"s1__b2__heads": 0}, "s1.b2.heads is 0; it is a whole number of at least 1"),
        ({"s1__b2__mlp": 0.01}, "s1.b2.mlp is 0.01; it is a number of inner channels"),
        ({"s1__b2__mlp": "wide"}, "s1.b2.mlp is 'wide'; it is a number of inner channels"),
        ({"pool": "max"}, "pool is 'max'; known: token, avg"),
        ({"pool": "token", "class_token": False}, "without that token, pool is 'avg'"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes'; it is true or false"),
        ({"act": "swishy"}, "act is 'swishy'; it is an activation of timm's"),
    ],
)
def test_a_choice_that_no_network_has_is_refused_by_name(
    vits: SearchSpace, values: dict[str, Value], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(change(vits.largest, **values))


def test_a_missing_choice_is_named(vits: SearchSpace) -> None:
    with pytest.raises(KeyError, match=r"s1\.heads"):
        build(Arch(tuple((name, value) for name, value in vits.largest.items() if name != "s1.b3.heads")))


def test_the_network_that_autoformer_found_outside_its_space_has_its_published_size() -> None:
    path = SPACES / "autoformer_tiny.toml"
    published = tomllib.loads(path.read_text(encoding="utf-8"))["published"]
    found = published["found"]
    decided = dict(load_space(path).with_constants({"classes": published["classes"]}).largest)
    decided |= {"embed.width": found["width"], "s1.depth": len(found["heads"])}
    for column in ("heads", "mlp"):
        decided |= {f"s1.b{block}.{column}": value for block, value in enumerate(found[column], start=1)}
    ours = cost(build_shapes(build, Arch(tuple(decided.items()))), 224)
    assert ours.params == pytest.approx(found["mparams"] * 1e6, rel=0.02)
    assert ours.macs == pytest.approx(found["mmacs"] * 1e6, rel=0.02)


@pytest.mark.parametrize(("name", "per_block"), [("tiny", 2 * 2), ("small", 3 * 3)])
def test_the_spaces_of_autoformer_decide_heads_and_mlp_in_every_block(name: str, per_block: int) -> None:
    widths, precisions = 3, 2**3
    space = load_space(SPACES / f"autoformer_{name}.toml")
    assert space.size == precisions * widths * sum(per_block**depth for depth in (12, 13, 14))
