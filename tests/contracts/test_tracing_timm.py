"""What timm's families compute, the graph computes, and so does the file in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from nestling.export import check_logits, to_onnx
from nestling.models.graph import Graph, trace

Options = dict[str, Any]

QUICK: list[tuple[str, int, Options]] = [
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
    ("cait_xxs24_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 32}),
    ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ("convnextv2_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ("cs3darknet_s", 32, {}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48}),
    ("eca_resnext26ts", 32, {}),
    ("edgenext_xx_small", 32, {}),
    ("efficientvit_m0", 64, {}),
    ("eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 1, "embed_dim": 48}),
    ("fasternet_t0", 32, {}),
    ("ghostnetv2_100", 64, {}),
    ("gmlp_ti16_224", 32, {"img_size": 32}),
    ("levit_128s", 64, {"img_size": 64}),
    ("mixnet_s", 32, {}),
    ("mobilevitv2_050", 32, {}),
    ("poolformer_s12", 32, {}),
    ("pvt_v2_b0", 32, {"depths": (1, 1, 1, 1)}),
    ("repvgg_a0", 32, {}),
    ("resnest14d", 32, {}),
    ("resnet26d", 32, {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    ("resnetblur50", 32, {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    ("resnetv2_50d_gn", 32, {}),
    ("skresnet18", 32, {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)}),
    (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "depths": (2, 1), "embed_dim": 24, "num_heads": (2, 3)},
    ),
    ("swinv2_tiny_window8_256", 64, {"img_size": 64, "depths": (2, 1), "embed_dim": 24, "num_heads": (2, 3)}),
    ("vit_relpos_small_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48}),
    ("xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 32}),
]
"""A timm model, the resolution it is traced at, and what makes it small."""

SLOW: list[tuple[str, int, Options]] = [
    ("coat_tiny", 64, {"img_size": 64}),
    ("coatnet_nano_rw_224", 64, {"img_size": 64}),
    ("crossvit_tiny_240", 240, {}),
    ("densenetblur121d", 64, {}),
    ("focalnet_tiny_srf", 64, {}),
    ("gcvit_xxtiny", 224, {}),
    ("halonet26t", 256, {}),
    ("hrnet_w18_small", 64, {}),
    ("mobilenetv5_300m", 64, {}),
    ("mvitv2_tiny", 64, {}),
    ("nasnetalarge", 96, {}),
    ("resnetv2_50x1_bit", 64, {}),
    ("twins_svt_small", 64, {}),
    ("volo_d1_224", 224, {}),
]


@pytest.mark.parametrize(("name", "resolution", "options"), QUICK, ids=[name for name, *_ in QUICK])
def test_a_small_network_is_the_same_in_its_file(name: str, resolution: int, options: Options) -> None:
    _compare(name, resolution, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resolution", "options"), SLOW, ids=[name for name, *_ in SLOW])
def test_a_network_is_the_same_in_its_file(name: str, resolution: int, options: Options) -> None:
    _compare(name, resolution, options)


def _compare(name: str, resolution: int, options: Options) -> None:
    torch.manual_seed(0)
    network = _with_random_weights(timm.create_model(name, num_classes=10, **options))
    graph = trace(network, resolution=resolution)
    images = torch.randn(2, 3, resolution, resolution)
    with torch.no_grad():
        expected = network(images).numpy()
    check_logits(expected, graph.run(images).numpy(), tolerance=1e-4)
    assert graph.shapes == _shapes(graph, images[:1])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    file = to_onnx(graph, dynamic_batch=True).SerializeToString()
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, {"images": images.numpy()})[0])
    check_logits(expected, got, tolerance=2e-4)


def _shapes(graph: Graph, image: Tensor) -> dict[str, tuple[int, ...]]:
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tuple(tensor.shape)
        return tensor

    graph.run(image, after=note)
    return seen


def _with_random_weights(network: nn.Module) -> nn.Module:
    """`network` in eval mode, with statistics as after training and nothing that starts at zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.3)
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, 0, 0.05)
    return network.eval()
