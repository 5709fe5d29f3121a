from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nestling.profile import Fingerprint, Measurement, WorkerDevice, connect

WEIGHT = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
"""The only weights of the tiny model: a 3x3 convolution of 3 channels to 4, without padding."""


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def tiny_model() -> Callable[[int | str], onnx.ModelProto]:
    """Makes convolution -> mean over the map: (batch, 3, 8, 8) -> (batch, 4)."""

    def make(batch: int | str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Conv", ["images", "weight"], ["maps"], name="stem"),
            helper.make_node("GlobalAveragePool", ["maps"], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
        ]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])],
            [numpy_helper.from_array(WEIGHT, "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model

    return make


@pytest.fixture
def tiny(tmp_path: Path, tiny_model: Callable[[int | str], onnx.ModelProto]) -> Path:
    return save(tmp_path / "tiny.onnx", tiny_model(1))


@pytest.fixture
def tiny_logits() -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What the tiny model computes, in NumPy."""

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))
        maps = np.einsum("nchwij,kcij->nkhw", windows, WEIGHT)
        logits: NDArray[np.float32] = maps.mean(axis=(2, 3)).astype(np.float32)
        return logits

    return compute


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model of a few hundred bytes that never ends."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["carried", "carried"], ["twice"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [1, 3, 8, 8]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, [1, 3, 8, 8]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "go", "images"], ["out"], body=body)],
        "endless",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 8, 8])],
        [
            numpy_helper.from_array(np.array(2**62, np.int64), "turns"),
            numpy_helper.from_array(np.array(True), "go"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return save(tmp_path / "endless.onnx", model)


@pytest.fixture(scope="session")
def cpu() -> Iterator[WorkerDevice]:
    """A real worker, shared by the tests that leave it alive."""
    with connect("ort:cpu", seconds=0.05, timeout_seconds=60) as device:
        yield device


@pytest.fixture
def fingerprint() -> Fingerprint:
    return Fingerprint(
        device="ort:cpu?threads=1",
        cpu="A CPU",
        instructions=("avx2",),
        cores=2,
        platform="Linux x86_64",
        runtime="onnxruntime 1.0",
        reference="0123456789ab",
        int8_saturates=True,
    )


@pytest.fixture
def measured(fingerprint: Fingerprint) -> Callable[..., Measurement]:
    """Makes a measurement out of milliseconds."""

    def make(*milliseconds: float, reference: tuple[float, ...] = ()) -> Measurement:
        return Measurement(
            fingerprint=fingerprint,
            seconds=tuple(number / 1e3 for number in milliseconds),
            reference_seconds=tuple(number / 1e3 for number in reference or (1.0,) * len(milliseconds)),
            load_seconds=0.5,
            first_seconds=0.25,
        )

    return make
