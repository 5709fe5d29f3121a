"""Both writers of ONNX files agree: our own, operator by operator, and PyTorch's exporter, its fallback."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from nestling import pipeline
from nestling.config import load_config
from nestling.export import check_logits, load_onnx, official_export, save_onnx, to_onnx
from nestling.models.convert import convert_timm
from nestling.models.families import family
from nestling.models.graph import trace
from nestling.space import SearchSpace, load_space

ROOT = Path(__file__).parents[2]
SPACES = sorted((ROOT / "search_spaces").glob("*.toml"))
SMALL = {
    "mobilenet": """
        family = "mobilenet"
        resolution = 16
        act = "hard_swish"
        stages = [{ block = "mbconv", width = [8, 16], depth = 1, kernel = [3, 5], expand = 2, se = 0.25 }]
        stem.width = 8
        head = { kind = "efficientnet", width = 16 }
        """,
    "resnet": """
        family = "resnet"
        resolution = 16
        act = "relu"
        stages = [{ block = "basic", width = [8, 16], depth = [1, 2], expand = [1.0, 2.0], stride = 2 }]
        stem = { kind = "3x3", width = [8, 16], stride = 1, pool = false }
        """,
    "convnext": """
        family = "convnext"
        resolution = 16
        stages = [{ width = [8, 16], depth = [1, 2], kernel = [3, 5], expand = [2, 3] }]
        stem.stride = 4
        """,
    "vit": """
        family = "vit"
        resolution = 16
        patch = 4
        head_dim = 8
        pool = "avg"
        stages = [{ depth = 1, heads = [1, 2], mlp = [2, 3] }]
        embed.width = [16, 24]
        """,
    "timm": """
        family = "timm"
        model = "test_resnet"
        resolution = 32
        "layers.0" = [1, 2]
        """,
}
"""A small space of each family, tried by default: for larger ones the exporter takes seconds."""
CONVERTED = ("convnext_atto", "efficientnet_b0", "mobilenetv3_small_100", "regnetx_002", "resnet18")
SIDE = 64
RESHAPES = {"Reshape", "Flatten"}


@pytest.mark.filterwarnings("default")  # those of the exporter
@pytest.mark.parametrize("name", SMALL)
def test_both_writers_agree_on_the_smallest_and_a_random_network_of_every_family(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "space.toml").write_text(SMALL[name])
    compare_two(load_space(tmp_path / "space.toml"), folder=tmp_path)


def test_every_family_of_the_spaces_is_tried_by_default() -> None:
    assert {load_space(path).family for path in SPACES} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_both_writers_agree_on_every_space(path: Path, tmp_path: Path) -> None:
    space = load_space(path)
    if "resolution" in space.by_name:
        values = space.by_name["resolution"].values
        space = space.with_constants({"resolution": min((int(v) for v in values), default=SIDE)})
    compare_two(space, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CONVERTED)
def test_both_writers_agree_on_networks_converted_from_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    supernet = convert_timm(name, resolution=SIDE, classes=5).supernet()
    compare(supernet.materialize(supernet.space.smallest), resolution=SIDE, folder=tmp_path)


def compare_two(space: SearchSpace, *, folder: Path) -> None:
    """Both writers agree on the smallest network of `space`, and on a random other one."""
    space = space.with_constants({"classes": 5})
    rng = random.Random(0)
    other = next(arch for arch in iter(lambda: space.sample(rng), None) if arch != space.smallest)
    for arch in (space.smallest, other):
        torch.manual_seed(0)
        compare(family(space.family).build(arch), resolution=_resolution(space), folder=folder)


def compare(network: nn.Module, *, resolution: int, folder: Path) -> None:
    """Both files give the same logits, and ours has no more operators than the other.

    Reshapes apart: they move no number, and with them a linear layer is one product with its bias in it.
    """
    network = _with_statistics(network)
    ours, official = folder / "ours.onnx", folder / "official.onnx"
    images = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))
    save_onnx(to_onnx(trace(network, resolution=resolution, image=images[:1])), ours)
    official_export(network, official, resolution=resolution)
    expected = run(official, images.numpy())
    assert len(np.unique(expected)) > 1
    check_logits(expected, run(ours, images.numpy()), tolerance=1e-4)
    counts = [
        sum(node.op_type not in RESHAPES for node in load_onnx(path).graph.node) for path in (ours, official)
    ]
    assert counts[0] <= counts[1]


def run(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"images": image[None]})[0]) for image in images])


def _resolution(space: SearchSpace) -> int:
    return space.smallest.integer("resolution") if "resolution" in space.by_name else SIDE


def _with_statistics(network: nn.Module) -> nn.Module:
    """`network` in evaluation mode, with statistics as after training, and logits that are not all zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.3)
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, 0, 0.05)
    return network.eval()


MODULE = """
import torch
from torch import nn


class Waves(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        return self.head(torch.sin(self.norm(self.stem(images))).mean((2, 3)))


def build(arch):
    return Waves(arch["width"], arch["classes"])
"""

SPACE = """
family = "waves_of_a_user:build"
width = [4, 8]
"stem.precision" = ["w8a8", "fp32"]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_whose_networks_cannot_be_traced_goes_through_in_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waves_of_a_user.py").write_text(MODULE)
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [f"space={tmp_path / 'space.toml'}", "train.strategy=sandwich", "search.trials=2"]
    config = load_config(ROOT / "tests" / "toy.toml", overrides=[*overrides, "search.warm_start=2"])
    notes: list[str] = []

    class Listening(pipeline.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    members, _ = pipeline.run_all(config, tmp_path / "run", listener=Listening())
    assert [note for note in notes if "dropped w8a8 from stem.precision" in note and "sin" in note]
    assert members
    for member in members:
        card = json.loads((tmp_path / "run" / "exports" / member["name"] / "card.json").read_text())
        assert card["writer"] == "torch.onnx.export"
        assert card["latency_ms"] > 0
        assert card["test_total"] == 60
        assert card["layers"] == []
        assert "Sin" in {
            node.op_type
            for node in load_onnx(tmp_path / "run" / "exports" / member["name"] / "model.onnx").graph.node
        }
    assert "torch.onnx.export" in (tmp_path / "run" / "report.md").read_text()
