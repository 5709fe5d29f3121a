from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from nestling.export import (
    ExportMismatch,
    check_logits,
    export_weights,
    load_onnx,
    official_export,
    save_onnx,
    to_onnx,
    verify,
    with_metadata,
)
from nestling.file_keys import file_key
from nestling.models.graph import trace
from nestling.models.operators import COMPUTE

Floats = NDArray[np.float32]


def run_onnx(model: onnx.ModelProto | Path, images: Floats) -> Floats:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def random_images(count: int, resolution: int) -> Tensor:
    return torch.randn(count, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        return self._function(images)


def _rows(images: Tensor) -> Tensor:
    return images.flatten(2).transpose(1, 2)


_WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
_KERNEL = torch.randn(6, 3, 3, 2, generator=torch.Generator().manual_seed(2))

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Conv": lambda x: F.conv2d(x, _KERNEL, stride=2, padding=(1, 0)),
    "Gemm": lambda x: F.linear(x.mean((2, 3)), _WEIGHT[:, :3], _WEIGHT[0]),
    "MatMul": lambda x: F.linear(x, _WEIGHT, _WEIGHT[0]) @ x.transpose(2, 3),
    "Add": lambda x: x + x * 2 + 1,
    "Sub": lambda x: x.sigmoid() - x - 1,
    "Mul": lambda x: x * x.mean((2, 3), keepdim=True),
    "Div": lambda x: x / (x.sigmoid() + 1) / 3,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": lambda x: F.hardswish(4 * x),
    "HardSigmoid": lambda x: F.hardsigmoid(4 * x),
    "Clip": lambda x: F.relu6(4 * x) + x.clamp(min=-1),
    "LeakyRelu": lambda x: F.leaky_relu(x, 0.2),
    "Elu": lambda x: F.elu(x, 0.5),
    "Gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "Softmax": lambda x: x.softmax(1),
    "LayerNormalization": lambda x: F.layer_norm(x, (8,), _WEIGHT[0], _WEIGHT[1], 1e-3),
    "GlobalAveragePool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "ReduceMean": lambda x: x.mean(2) + x.mean(3),
    "AveragePool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) + F.adaptive_avg_pool2d(x, 4),
    "MaxPool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "Pad": lambda x: (
        F.pad(F.pad(x, (1, 2, 0, 3)), (3, 0, 2, 0), mode="reflect") + F.pad(x, (3, 3, 2, 3), value=2)
    ),
    "Flatten": lambda x: x.view(x.shape[0], -1),
    "Reshape": lambda x: x.reshape(x.shape[0], 3, 4, -1),
    "Transpose": lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 2),
    "Concat": lambda x: torch.cat((x, x.sigmoid()), dim=1),
    "Slice": lambda x: x[:, 1:, :, 1:6:2] + x.chunk(2, dim=3)[1][:, :2, :, :3],
    "Gather": lambda x: x[:, 1] + x.unbind(1)[2] + x.flip(3)[:, [0, 2]].mean(1),
    "ConvTranspose": lambda x: F.conv_transpose2d(x, _KERNEL[:3], _WEIGHT[0, :3], 2, 1, (1, 0), 1),
    "Pow": lambda x: x.abs() ** 1.5,
    "Abs": torch.abs,
    "Exp": torch.exp,
    "Log": lambda x: (x.abs() + 1).log(),
    "Sqrt": lambda x: x.exp().sqrt(),
    "Reciprocal": lambda x: 1 / x.exp(),
    "PRelu": lambda x: F.prelu(x, _WEIGHT[0, :3]),
    "Softplus": lambda x: F.softplus(x * 5),
    "InstanceNormalization": lambda x: F.instance_norm(x, weight=_WEIGHT[0, :3]) + F.group_norm(x, 1),
    "ReduceSum": lambda x: x.sum(1) + x.sum((2, 3), keepdim=True)[:, 0],
    "ReduceMax": lambda x: x.amax((1, 2)),
    "ReduceL2": lambda x: F.normalize(x, dim=1),
    "Unsqueeze": lambda x: torch.stack((x, -x), dim=2),
    "Squeeze": lambda x: x[:, :1].squeeze(1),
    "Tile": lambda x: x.repeat(1, 2, 1, 1) + x[:, :1].expand(-1, 6, -1, -1),
    "Resize": lambda x: F.interpolate(x, 13) + F.interpolate(x, (13, 13), mode="bilinear"),
    "Expand": lambda x: torch.cat((_WEIGHT[None, :1, :3].expand(x.shape[0], -1, -1), _rows(x)), dim=1),
}
"""For every operator kind, a function on images (N, 3, 8, 8) that needs it."""


def test_every_operator_kind_is_tried() -> None:
    assert FUNCTIONS.keys() == COMPUTE.keys() - {"Cast"}  # which is no part of a traced network


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_operator_computes_in_onnx_runtime_what_it_computes_in_pytorch(kind: str) -> None:
    graph = trace(Calls(FUNCTIONS[kind]).eval(), resolution=8)
    assert kind in {operator.kind for operator in graph.operators}
    images = random_images(3, 8)
    expected = FUNCTIONS[kind](images)
    torch.testing.assert_close(graph.run(images), expected)
    got = torch.from_numpy(run_onnx(to_onnx(graph, dynamic_batch=True), images.numpy()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_zeros_before_a_maximum_count_in_the_file_too() -> None:
    def function(images: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(-images.abs() - 1, (1, 1, 1, 1)), 3, 2)

    images = random_images(1, 8)
    got = run_onnx(to_onnx(trace(Calls(function).eval(), resolution=8)), images.numpy())
    torch.testing.assert_close(torch.from_numpy(got), function(images))
    assert got.max() == pytest.approx(0)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18", "tf_efficientnet_lite0"])
def test_a_file_computes_what_the_network_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    path = tmp_path / "model.onnx"
    save_onnx(to_onnx(trace(network, resolution=32)), path)
    images = random_images(1, 32)
    with torch.no_grad():
        expected = network(images)
    model = verify(path, images, expected=expected, run=run_onnx)
    assert model.worst_error < 1e-5
    assert (model.path, model.resolution) == (path, 32)
    assert model.key == file_key(path)
    assert model.size_bytes == path.stat().st_size


def test_attention_with_a_class_token_is_written_with_either_batch() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).eval()
    graph = trace(network, resolution=32)
    images = random_images(2, 32)
    with torch.no_grad():
        expected = network(images).numpy()
    check_logits(expected, run_onnx(to_onnx(graph, dynamic_batch=True), images.numpy()), tolerance=1e-5)
    check_logits(expected[:1], run_onnx(to_onnx(graph), images[:1].numpy()), tolerance=1e-5)


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()


def test_a_file_says_its_names_shapes_and_versions() -> None:
    model = to_onnx(trace(_small(), resolution=4))
    onnx.checker.check_model(model, full_check=True)
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [axis.dim_value for axis in images.type.tensor_type.shape.dim] == [1, 3, 4, 4]
    assert [axis.dim_value for axis in logits.type.tensor_type.shape.dim] == [1, 2]
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Clip", "Flatten", "Gemm"]


def test_a_dynamic_batch_is_named_in_the_shapes() -> None:
    model = to_onnx(trace(_small(), resolution=4), dynamic_batch=True)
    ends = (*model.graph.input, *model.graph.output)
    assert [end.type.tensor_type.shape.dim[0].dim_param for end in ends] == ["N", "N"]


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = with_metadata(to_onnx(trace(_small(), resolution=4)), {"x": "1", "y": "2"})
        save_onnx(model, tmp_path / name)
    assert file_key(tmp_path / "a") == file_key(tmp_path / "b")


def test_metadata_is_added_to_a_copy_and_replaces_what_has_its_name() -> None:
    plain = to_onnx(trace(_small(), resolution=4))
    model = with_metadata(with_metadata(plain, {"arch": "old", "classes": "2"}), {"arch": "new"})
    assert {entry.key: entry.value for entry in model.metadata_props} == {"arch": "new", "classes": "2"}
    assert not plain.metadata_props


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    model = to_onnx(trace(_small(), resolution=4))
    save_onnx(model, tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx") == model
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestling.run.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save_onnx(to_onnx(trace(_small(), resolution=4)), path)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_are_the_state_dict(tmp_path: Path) -> None:
    network = _small()
    export_weights(network, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_the_worst_error_is_relative_to_the_largest_logit() -> None:
    expected = np.array([[2.0, -8.0]], dtype=np.float32)
    got = np.array([[2.4, -8.0]], dtype=np.float32)
    assert check_logits(expected, got, tolerance=0.1) == pytest.approx(0.05)
    with pytest.raises(ExportMismatch, match=r"5\.00e-02 of their scale"):
        check_logits(expected, got, tolerance=0.01)


@pytest.mark.parametrize(
    ("got", "message"),
    [([[1.0, 2.0]], r"shape \(1, 2\)"), ([[1.0, float("nan"), 0.0]], "not finite")],
)
def test_logits_that_cannot_be_compared_are_refused(got: list[list[float]], message: str) -> None:
    with pytest.raises(ExportMismatch, match=message):
        check_logits(np.zeros((1, 3), dtype=np.float32), np.asarray(got, dtype=np.float32), tolerance=1.0)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(to_onnx(trace(_small(), resolution=4)), path)
    images = random_images(1, 4)
    with pytest.raises(ExportMismatch, match="differ"):
        verify(path, images, expected=torch.tensor([[9.0, -9.0]]), run=run_onnx)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18"])
def test_both_writers_agree(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    official, ours = tmp_path / "official.onnx", tmp_path / "ours.onnx"
    official_export(network, official, resolution=32, dynamic_batch=True)
    save_onnx(to_onnx(trace(network, resolution=32), dynamic_batch=True), ours)
    images = random_images(4, 32).numpy()
    assert check_logits(run_onnx(official, images), run_onnx(ours, images), tolerance=1e-5) < 1e-5
    assert len(load_onnx(ours).graph.node) <= len(load_onnx(official).graph.node)
