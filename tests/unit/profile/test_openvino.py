from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from nestling.profile import DeviceError, WorkerDevice, connect, openvino_runtime
from nestling.profile.openvino_runtime import SETTINGS, ForeignRuntime, computed_in
from nestling.profile.reference import reference_model

needed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture(scope="module")
def openvino() -> Iterator[WorkerDevice]:
    with connect("openvino:cpu", seconds=0.05) as device:
        yield device


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="openvino is installed")
def test_without_the_package_it_is_named() -> None:
    with pytest.raises(DeviceError, match="needs the package openvino; pip install openvino"):
        connect("openvino:cpu")


@needed
def test_it_computes_what_the_file_says(
    openvino: WorkerDevice,
    tmp_path: Path,
    tiny_model: Callable[[int | str], onnx.ModelProto],
    tiny_logits: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    images = np.random.default_rng(1).standard_normal((35, 3, 8, 8)).astype(np.float32)
    for batch in (1, 4, "batch"):
        path = tmp_path / f"{batch}.onnx"
        path.write_bytes(tiny_model(batch).SerializeToString())
        assert openvino.predict(path, images) == pytest.approx(tiny_logits(images), abs=1e-5)


@needed
def test_floats_stay_32_bits_wide_unless_16_are_asked_for(openvino: WorkerDevice, tmp_path: Path) -> None:
    path = tmp_path / "reference.onnx"
    path.write_bytes(reference_model())
    precisions = {op.precision for op in openvino.optimized_ops(path) or () if op.op == "Convolution"}
    assert precisions == {"f32"}
    if "amx_int8" in openvino.fingerprint.instructions:
        with connect("openvino:cpu?dtype=bf16", seconds=0.05) as device:
            narrow = {op.precision for op in device.optimized_ops(path) or () if op.op == "Convolution"}
        assert narrow == {"bf16"}


@needed
def test_it_tells_the_time_of_each_layer(openvino: WorkerDevice, tmp_path: Path) -> None:
    path = tmp_path / "reference.onnx"
    path.write_bytes(reference_model())
    kernels = openvino.kernels(path, runs=3)
    assert {"stem", "stage4.block1.project"} <= {kernel.name for kernel in kernels}
    assert all(kernel.microseconds is not None and kernel.microseconds >= 0 for kernel in kernels)


@needed
def test_a_file_that_is_none_is_refused(openvino: WorkerDevice, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny.read_bytes()[:-30])
    with pytest.raises(DeviceError, match=r"broken\.onnx"):
        openvino.measure(broken)
    assert openvino.measure(tiny).latency_ms > 0


@needed
def test_its_threads_are_those_of_the_address(openvino: WorkerDevice) -> None:
    assert openvino.fingerprint.device == "openvino:cpu?threads=1"
    assert openvino.fingerprint.runtime.startswith("openvino 20")
    assert openvino.fingerprint.runtime.endswith(f" (settings {SETTINGS})")
    with pytest.raises(DeviceError, match="dtype='f16' must be one of: f32, bf16"):
        connect("openvino:cpu?dtype=f16")


def test_how_openvino_is_told_to_compute_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(read_model=lambda model: model, compile_model=lambda *told: compiled.append(told))
    fake = SimpleNamespace(__version__="2099.1.0-12345-abc", Core=lambda: core)
    monkeypatch.setitem(sys.modules, "openvino", fake)
    monkeypatch.setattr(openvino_runtime, "Session", lambda compiled: compiled)
    compiled: list[tuple[object, ...]] = []
    made = ForeignRuntime(2, {}, refusal=RuntimeError)
    made.open(b"model", with_nodes=False)
    assert made.name == f"openvino 2099.1.0 (settings {SETTINGS})"
    # Whoever changes these raises SETTINGS: what was measured with others is another measurement.
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": 2,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    assert (SETTINGS, compiled) == (1, [(b"model", "CPU", config)])


@pytest.mark.parametrize(
    ("primitive", "stated", "precision"),
    [
        ("brgconv_avx512_amx_I8", "u8", "u8"),
        ("brgemm_avx512_amx_i8", "i8", "i8"),
        ("brgconv_avx512_f32", "i8", "f32"),  # it reads bytes, and computes in floats
        ("brgconv_avx512_amx_bf16", "bf16", "bf16"),
        ("ref_any", "f32", "f32"),
        ("", "f16", "f16"),
    ],
)
def test_the_code_that_ran_tells_what_was_computed_in(primitive: str, stated: str, precision: str) -> None:
    assert computed_in(primitive, stated) == precision
