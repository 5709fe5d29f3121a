from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nestling.profile import (
    Address,
    DeviceError,
    DevicesGoneError,
    LineLostError,
    MeasurementStore,
    WorkerDevice,
    WorkerLostError,
    connect,
    file_key,
    worker,
)
from nestling.profile.address import parse_address
from nestling.profile.devices import transport_to
from nestling.profile.quiet import QuietTimes
from nestling.profile.reference import reference_model
from nestling.profile.transport import Answer
from nestling.profile.transport_adb import AdbProcess
from nestling.profile.transport_local import LocalProcess
from nestling.profile.transport_ssh import SshProcess
from nestling.profile.worker import SETTINGS, OrtRuntime

Model = Callable[[int | str], onnx.ModelProto]
Compute = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class FakeTransport:
    """A worker out of a script: `faults` maps a verb to what befalls it, once."""

    def __init__(self, faults: Mapping[str, str | Mapping[str, Any] | WorkerLostError] | None = None) -> None:
        self.faults = dict(faults or {})
        self.again: dict[str, list[str | WorkerLostError]] = {}
        """What befalls a verb when it is asked next, and then."""
        self.running = False
        self.starts = 0
        self.cpu, self.machine = "A CPU", "one"
        self.nanoseconds = 3_000_000, 1_000_000
        """Of the file and of the reference model."""
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def start(self) -> None:
        self.running = True
        self.starts += 1

    def stop(self) -> None:
        self.running = False

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        assert self.running
        verb = request["verb"]
        self.asked.append((verb, {**request, "bytes": len(blob), "timeout_seconds": timeout_seconds}))
        fault = self.again[verb].pop(0) if self.again.get(verb) else self.faults.pop(verb, None)
        if isinstance(fault, WorkerLostError):
            self.running = False
            raise fault
        if isinstance(fault, str):
            return Answer({"refused": fault}, b"")
        if fault is not None:
            return Answer(fault, b"")
        if verb == "hello":
            return Answer(
                {
                    "cpu": self.cpu,
                    "machine": self.machine,
                    "instructions": [],
                    "cores": 2,
                    "platform": "Linux x86_64",
                    "runtime": "onnxruntime 1.0",
                    "int8_saturates": False,
                },
                b"",
            )
        if verb == "load":
            return Answer({"load_seconds": 0.1, "first_seconds": 0.2}, b"")
        if verb == "time":
            times = np.array([[took] * 40 for took in self.nanoseconds], "<i8")
            return Answer({"gauged": 1_300_000.0}, times.tobytes())
        if verb == "predict":
            return Answer({"shape": [2, 4]}, np.zeros((2, 4), "<f4").tobytes())
        return Answer({}, b"")

    def timings(self) -> list[dict[str, Any]]:
        return [request for verb, request in self.asked if verb == "time"]

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.asked]


def fake_device(
    transport: FakeTransport,
    *,
    store: MeasurementStore | None = None,
    quiet: QuietTimes | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> WorkerDevice:
    return WorkerDevice(
        Address("cpu"),
        transport=transport,
        seconds=1,
        tolerance=0.01,
        timeout_seconds=5,
        store=store,
        quiet=quiet,
        sleep=sleep,
    )


def test_a_measurement_is_what_the_worker_timed(tiny: Path) -> None:
    device = fake_device(FakeTransport())
    taken = device.measure(tiny)
    assert taken.latency_ms == pytest.approx(3)
    assert taken.ratio == pytest.approx(3)
    assert (taken.load_seconds, taken.first_seconds) == (0.1, 0.2)
    assert taken.fingerprint == device.fingerprint
    assert not taken.unstable


def test_the_same_file_is_never_timed_twice(tiny: Path, tmp_path: Path) -> None:
    transport, store = FakeTransport(), MeasurementStore(tmp_path / "m.sqlite")
    taken = fake_device(transport, store=store).measure(tiny)
    copy = tmp_path / "another_name.onnx"
    copy.write_bytes(tiny.read_bytes())
    assert fake_device(transport, store=store).measure(copy) == taken
    assert transport.verbs().count("time") == 1
    copy.write_bytes(tiny.read_bytes() + b"\0")
    fake_device(transport, store=store).measure(copy)
    assert transport.verbs().count("time") == 2


def see_it_faster(device: WorkerDevice, transport: FakeTransport, path: Path) -> None:
    """Measures another file, at `path`, while nobody slows the device."""
    transport.nanoseconds = (3_000_000, 1_000_000)
    path.write_bytes(b"another file")
    device.measure(path)


def test_what_was_measured_on_a_busy_machine_is_measured_again_once_it_was_seen_faster(
    tiny: Path, tmp_path: Path
) -> None:
    transport, store = FakeTransport(), MeasurementStore(tmp_path / "m.sqlite")
    device = fake_device(transport, store=store, quiet=QuietTimes(tmp_path / "devices.db"))
    transport.nanoseconds = (3_600_000, 1_500_000)
    assert device.measure(tiny).ratio == pytest.approx(2.4)
    assert not device.doubts(tiny)
    see_it_faster(device, transport, tmp_path / "other.onnx")
    assert device.doubts(tiny)
    assert device.measure(tiny).ratio == pytest.approx(3)
    assert not device.doubts(tiny)
    assert device.measure(tiny).ratio == pytest.approx(3)
    assert transport.verbs().count("time") == 3
    assert [taken.ratio for taken in store.unstable()] == pytest.approx([2.4])


def test_a_doubt_outlives_a_worker_that_is_lost_while_the_file_is_timed_again(
    tiny: Path, tmp_path: Path
) -> None:
    transport, store = FakeTransport(), MeasurementStore(tmp_path / "m.sqlite")
    device = fake_device(transport, store=store, quiet=QuietTimes(tmp_path / "devices.db"))
    transport.nanoseconds = (3_600_000, 1_500_000)
    slow = device.measure(tiny)
    see_it_faster(device, transport, tmp_path / "other.onnx")
    transport.faults["time"] = WorkerLostError("the worker was ended by SIGKILL")
    with pytest.raises(WorkerLostError):
        device.measure(tiny)
    assert device.doubts(tiny)
    assert slow in store.all()
    transport.nanoseconds = (3_600_000, 1_500_000)  # busy again
    assert device.measure(tiny).unstable
    assert device.doubts(tiny)


def test_the_worker_is_told_the_devices_best_and_gauges_by_it(tiny: Path, tmp_path: Path) -> None:
    transport = FakeTransport()
    device = fake_device(transport, quiet=QuietTimes(tmp_path / "devices.db"))
    assert device.compare(tiny, tiny, seconds=1).conditions.slowed is None  # it is not known yet
    assert device.measure(tiny).conditions.slowed == 1.0
    assert "best" not in transport.timings()[-1]
    device.measure(tiny)
    beside = device.compare(tiny, tiny, seconds=1)
    for asked in transport.timings()[-2:]:
        assert (asked["gauge"], asked["best"]) == ("reference", pytest.approx(1_000_000))
    assert beside.conditions.slowed == pytest.approx(1.3)
    assert beside.unstable


def test_a_machine_of_another_place_has_another_best(tiny: Path, tmp_path: Path) -> None:
    quiet = QuietTimes(tmp_path / "devices.db")
    transports = [FakeTransport(), FakeTransport()]
    transports[1].machine, transports[1].nanoseconds = "another", (4_500_000, 1_500_000)
    taken = [fake_device(transport, quiet=quiet).measure(tiny) for transport in transports]
    assert taken[0].fingerprint == taken[1].fingerprint
    assert taken[0].machine != taken[1].machine
    assert [one.conditions.slowed for one in taken] == [1.0, 1.0]


def test_a_lost_worker_fails_one_call_and_is_replaced_for_the_next(tiny: Path) -> None:
    transport = FakeTransport({"time": WorkerLostError("the worker was ended by SIGSEGV")})
    device = fake_device(transport)
    with pytest.raises(WorkerLostError, match=r"ort:cpu\?threads=1, .*tiny\.onnx: .*SIGSEGV"):
        device.measure(tiny)
    assert device.measure(tiny).latency_ms == pytest.approx(3)
    assert transport.starts == 2
    assert transport.verbs().count("hello") == 2


def test_a_refused_file_leaves_the_worker_running_and_nothing_behind(tiny: Path) -> None:
    transport = FakeTransport({"time": "Fail: no kernel"})
    device = fake_device(transport)
    with pytest.raises(DeviceError, match="Fail: no kernel"):
        device.measure(tiny)
    assert transport.asked[-1][0] == "drop"
    assert transport.asked[-1][1]["models"] == ["candidate"]
    device.measure(tiny)
    assert transport.starts == 1


def test_after_a_file_that_spoilt_the_runtime_the_next_one_has_a_new_worker(tiny: Path) -> None:
    transport = FakeTransport({"time": {"refused": "CUDA error: device-side assert triggered", "ends": True}})
    device = fake_device(transport)
    with pytest.raises(DeviceError, match="device-side assert triggered") as caught:
        device.measure(tiny)
    assert type(caught.value) is DeviceError  # of this file, not a worker that was lost
    assert transport.asked[-1][0] == "time"  # nothing is asked of a worker that goes
    assert device.measure(tiny).latency_ms == pytest.approx(3)
    assert transport.starts == 2


def test_a_call_gets_what_is_left_of_the_time_limit(tiny: Path) -> None:
    transport = FakeTransport()
    fake_device(transport).measure(tiny)
    limits = [asked["timeout_seconds"] for verb, asked in transport.asked if verb in ("load", "time")][1:]
    assert 5 >= limits[0] > limits[1] > 4
    assert all(asked["limit_seconds"] == asked["timeout_seconds"] for _, asked in transport.asked)


def test_a_device_that_was_there_and_cannot_be_started_any_more_is_gone(tiny: Path) -> None:
    transport = FakeTransport({"hello": "onnxruntime is not installed"})
    device = fake_device(transport)
    with pytest.raises(DeviceError, match="not installed"):  # it was never there
        device.start()
    device.start()
    transport.stop()
    transport.faults["hello"] = "not installed"
    starts = transport.starts
    with pytest.raises(DevicesGoneError, match=r"any more: .*not installed; the same command continues when"):
        device.measure(tiny)
    assert transport.starts == starts + 1  # asked again, it would say the same
    assert not transport.running
    assert device.measure(tiny).latency_ms == pytest.approx(3)


@pytest.mark.parametrize("verb", ["hello", "load"])  # the reference model is loaded, too
def test_a_worker_that_is_lost_while_it_starts_is_started_twice_more_after_pauses(
    verb: str, tiny: Path
) -> None:
    slept: list[float] = []
    transport = FakeTransport()
    device = fake_device(transport, sleep=slept.append)

    def lost(times: int) -> list[str | WorkerLostError]:
        return [WorkerLostError("the worker was ended by SIGKILL") for _ in range(times)]

    for begun in (False, True):
        transport.stop()
        slept.clear()
        transport.again[verb] = lost(2)
        assert device.start().cpu == "A CPU"
        assert slept == [1.0, 4.0]
        transport.stop()
        transport.again[verb] = lost(3)
        if begun:
            with pytest.raises(DevicesGoneError, match=r"any more: .*SIGKILL"):
                device.measure(tiny)
        else:
            with pytest.raises(WorkerLostError, match="SIGKILL"):
                fake_device(transport, sleep=slept.append).start()
        assert not transport.running
    assert device.measure(tiny).latency_ms == pytest.approx(3)


def test_a_line_that_cannot_be_had_does_not_make_a_device_gone(tiny: Path) -> None:
    transport = FakeTransport()
    device = fake_device(transport, sleep=lambda _: pytest.fail("it was tried again"))
    device.start()
    transport.stop()
    transport.faults["hello"] = LineLostError("no route")
    with pytest.raises(LineLostError, match="no route"):
        device.measure(tiny)


def test_a_device_that_has_become_another_is_gone(tiny: Path) -> None:
    transport = FakeTransport()
    device = fake_device(transport)
    device.start()
    transport.stop()
    transport.cpu = "Another CPU"
    with pytest.raises(DevicesGoneError, match=r"A CPU.* and is now .*Another CPU"):
        device.measure(tiny)


def test_held_images_are_sent_once(tiny: Path) -> None:
    transport, images = FakeTransport(), np.zeros((2, 3, 8, 8), np.float32)
    device = fake_device(transport)

    def sent() -> int:
        device.predict(tiny, images, key="search")
        return transport.verbs().count("hold")

    assert [sent(), sent()] == [1, 1]
    images[1, 2, 3, 4] = 1  # other images under the same key must not be answered from the old ones
    assert [sent(), sent()] == [2, 2]
    transport.stop()
    assert [sent(), sent()] == [3, 3]


def test_images_without_a_key_are_forgotten(tiny: Path) -> None:
    transport = FakeTransport()
    fake_device(transport).predict(tiny, np.zeros((2, 3, 8, 8), np.float32))
    assert transport.asked[-1][0] == "drop"
    assert transport.asked[-1][1]["arrays"] == ["images"]


@pytest.mark.parametrize("images", [np.zeros((0, 3, 8, 8), np.float32), np.zeros((1, 3, 8, 8))])
def test_images_that_are_none_are_refused(images: NDArray[np.float32], tiny: Path) -> None:
    with pytest.raises(ValueError, match="images must be float32 and not empty"):
        fake_device(FakeTransport()).predict(tiny, images)


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"timeout_seconds=1\.0 must be above seconds=1\.5"):
        connect("ort:cpu", timeout_seconds=1.0)
    with pytest.raises(DeviceError, match="tolerance=0 must be above zero"):
        connect("ort:cpu", tolerance=0)


# From here on with a real worker.


def test_a_real_file_is_measured(cpu: WorkerDevice, tiny: Path) -> None:
    taken = cpu.measure(tiny)
    assert 0 < taken.ratio < 1
    assert taken.device == "ort:cpu?threads=1"
    assert min(taken.load_seconds, taken.first_seconds) > 0
    assert taken.fingerprint.runtime == f"onnxruntime {onnxruntime.__version__} (settings {SETTINGS})"


CPU_EP = "CPUExecutionProvider"
ENTRIES = {
    "session.load_model_format": "ONNX",
    "optimization.disable_specified_optimizers": "WeightBiasQuantization",
    "session.qdqisint8allowed": "1",
    "session.force_spinning_stop": "1",
}
ALONE = {"session.disable_cpu_ep_fallback": "1"}
OPENVINO_CONFIG = {"CPU": {"INFERENCE_NUM_THREADS": "2", "INFERENCE_PRECISION_HINT": "f32"}}


@pytest.mark.parametrize(
    ("target", "allow_fallback", "entries", "providers"),
    [
        ("cpu", False, ENTRIES, [CPU_EP]),
        ("cuda", False, ENTRIES | ALONE, ["CUDAExecutionProvider"]),
        ("cuda", True, ENTRIES, ["CUDAExecutionProvider", CPU_EP]),
        ("tensorrt", False, ENTRIES | ALONE, ["TensorrtExecutionProvider"]),
        ("tensorrt", True, ENTRIES, ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU_EP]),
        ("openvino", False, ENTRIES | ALONE, [("core 0", {"load_config": json.dumps(OPENVINO_CONFIG)})]),
        ("openvino", True, ENTRIES, [("core 0", {"load_config": json.dumps(OPENVINO_CONFIG)})]),
    ],
)
def test_what_is_set_for_a_session_has_its_number(
    target: str,
    allow_fallback: bool,
    entries: dict[str, str],
    providers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: dict[str, Any] = {"entries": {}, "attributes": {}, "providers": []}

    class Noting(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            noted["entries"][key] = value
            super().add_session_config_entry(key, value)

        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            noted["providers"] += [(device.name, options) for device in devices]

        def __setattr__(self, name: str, value: object) -> None:
            noted["attributes"][name] = value
            super().__setattr__(name, value)

    class Session:
        def __init__(self, _: bytes, options: object, **further: Any) -> None:
            assert isinstance(options, Noting)
            noted["providers"] += further.pop("providers", [])
            noted["further"] = further

        def get_providers(self) -> list[str]:
            return [worker.PROVIDERS[target]]

        def get_inputs(self) -> list[object]:
            return []

    def plugged(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            ep_name=worker.PROVIDERS["openvino"], device=SimpleNamespace(type="CPU"), name=name
        )

    present = [worker.PROVIDERS[name] for name in ("tensorrt", "cuda", "cpu")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: present)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *_: None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [plugged("core 0"), plugged("core 1")])
    monkeypatch.setattr(onnxruntime, "SessionOptions", Noting)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(worker, "plugin_library", lambda _: Path("plugin.so"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    OrtRuntime(target, 2, allow_fallback=allow_fallback).open(b"", with_nodes=False)
    attributes = {"intra_op_num_threads": 2, "inter_op_num_threads": 1, "log_severity_level": 3}
    # Whoever changes these raises SETTINGS: what was measured with others is another measurement.
    expected = {"entries": entries, "attributes": attributes, "providers": providers, "further": {}}
    assert (SETTINGS, noted) == (2, expected)


def test_a_bigger_network_has_the_bigger_ratio(cpu: WorkerDevice, tiny: Path, tmp_path: Path) -> None:
    same = tmp_path / "reference.onnx"
    same.write_bytes(reference_model())
    assert cpu.measure(tiny).ratio < cpu.measure(same).ratio / 2


@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_predictions_are_right_whatever_the_file_s_batch(
    batch: int | str, cpu: WorkerDevice, tmp_path: Path, tiny_model: Model, tiny_logits: Compute
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_model(batch).SerializeToString())
    images = np.random.default_rng(1).standard_normal((35, 3, 8, 8)).astype(np.float32)
    for key in (None, f"images{batch}", f"images{batch}"):
        assert cpu.predict(path, images, key=key) == pytest.approx(tiny_logits(images), abs=1e-5)


def test_images_of_another_shape_are_refused(cpu: WorkerDevice, tiny: Path) -> None:
    with pytest.raises(DeviceError, match=r"'images' takes \(3, 8, 8\), the images are \(3, 9, 9\)"):
        cpu.predict(tiny, np.zeros((1, 3, 9, 9), np.float32))


def quantized(path: Path) -> Path:
    """Two convolutions of which only the first is quantized, then a layer with a bias."""
    rng = np.random.default_rng(0)
    arrays = {
        "scale": np.float32(0.02),
        "zero": np.uint8(0),
        "weight.int8": rng.integers(-60, 60, (16, 3, 3, 3)).astype(np.int8),
        "weight.scale": np.full(16, 0.01, np.float32),
        "weight.zero": np.zeros(16, np.int8),
        "float.weight": rng.standard_normal((16, 16, 3, 3)).astype(np.float32),
        "float.bias": np.zeros(16, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["images.q"]),
        helper.make_node("DequantizeLinear", ["images.q", "scale", "zero"], ["images.dq"]),
        helper.make_node(
            "DequantizeLinear", ["weight.int8", "weight.scale", "weight.zero"], ["weight"], axis=0
        ),
        helper.make_node("Conv", ["images.dq", "weight"], ["a"], name="quantized"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["a.q"]),
        helper.make_node("DequantizeLinear", ["a.q", "scale", "zero"], ["a.dq"]),
        helper.make_node("Conv", ["a.dq", "float.weight", "float.bias"], ["b"], name="float"),
        helper.make_node("QuantizeLinear", ["b", "scale", "zero"], ["b.q"]),
        helper.make_node("DequantizeLinear", ["b.q", "scale", "zero"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 16, 8, 8])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_the_optimized_graph_shows_the_precision_that_each_layer_got(
    cpu: WorkerDevice, tmp_path: Path
) -> None:
    ops = cpu.optimized_ops(quantized(tmp_path / "q.onnx")) or ()
    quantized_ops = [op.name for op in ops if op.op.endswith("QLinearConv")]
    assert quantized_ops == ["quantized"]
    left = {(op.name, op.op) for op in ops}
    assert left & {("b_nchwc", "com.microsoft.nchwc.Conv"), ("float", "Conv")}


def test_a_device_that_does_not_tell_its_graph_says_so(
    cpu: WorkerDevice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.transport, "exchange", lambda *_, **__: Answer({"nodes": None}, b""))
    assert cpu.optimized_ops(tiny) is None


@pytest.mark.skipif(worker.plugin_library("openvino") is None, reason="needs onnxruntime-ep-openvino")
def test_openvino_behind_onnx_runtime_does_not_tell_its_graph(tiny: Path) -> None:
    with connect("ort:openvino", seconds=0.02, timeout_seconds=60) as device:
        assert device.optimized_ops(tiny) is None
        assert [kernel.provider for kernel in device.kernels(tiny)] == ["OpenVINOExecutionProvider"]


def test_the_kernels_tell_what_types_they_read(cpu: WorkerDevice, tmp_path: Path) -> None:
    kernels = cpu.kernels(quantized(tmp_path / "q.onnx"))
    convolutions = {kernel.op: kernel for kernel in kernels if kernel.op.endswith("Conv")}
    assert {"uint8", "int8"} <= set(convolutions["QLinearConv"].reads)
    assert set(convolutions["Conv"].reads) == {"float"}
    assert {kernel.provider for kernel in kernels} == {"CPUExecutionProvider"}


def test_a_file_can_be_timed_beside_another_one(cpu: WorkerDevice, tiny: Path, tmp_path: Path) -> None:
    other = quantized(tmp_path / "q.onnx")
    measurement = cpu.compare(tiny, other, seconds=0.02)
    assert len(measurement.seconds) == len(measurement.reference_seconds) >= 10
    assert measurement.fingerprint.reference == file_key(other)[:12] != cpu.fingerprint.reference
    assert cpu.measure(tiny).fingerprint == cpu.fingerprint


def test_the_optimized_graph_tells_what_each_node_reads_and_writes(cpu: WorkerDevice, tiny: Path) -> None:
    nodes = cpu.optimized_ops(tiny) or ()
    written = {name for node in nodes for name in node.writes}
    assert "logits" in written
    assert "images" in nodes[0].reads
    assert {name for node in nodes[1:] for name in node.reads} & written


def test_corrupted_files_are_refused_and_the_worker_lives_on(
    cpu: WorkerDevice, tiny: Path, tmp_path: Path
) -> None:
    content, pid = tiny.read_bytes(), worker_pid(cpu)
    rng = np.random.default_rng(0)
    broken = tmp_path / "broken.onnx"
    for damaged in (b"", b"text", content[:-30], content[:50], rng.bytes(500)):
        broken.write_bytes(damaged)
        with pytest.raises(DeviceError, match=r"broken\.onnx: "):
            cpu.measure(broken)
    with pytest.raises(DeviceError, match=r"missing\.onnx cannot be read: No such file"):
        cpu.measure(tmp_path / "missing.onnx")
    assert cpu.measure(tiny).latency_ms > 0
    assert worker_pid(cpu) == pid


def test_external_data_is_refused(cpu: WorkerDevice, tmp_path: Path, tiny_model: Model) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(tiny_model(1), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(DeviceError, match="'weight' is stored outside the file"):
        cpu.measure(path)


def test_a_runtime_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(DeviceError) as caught:
        connect("ort:cuda")
    said = str(caught.value)
    assert "ort:cuda needs CUDAExecutionProvider" in said
    assert "CPUExecutionProvider; pip install onnxruntime-gpu" in said


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"threads=9999, but this process may use \d+ cores"):
        connect("ort:cpu?threads=9999")


def test_a_hang_is_ended_at_the_limit_and_the_next_call_works(tiny: Path, endless: Path) -> None:
    with connect("ort:cpu", seconds=0.05, timeout_seconds=1.0) as device:
        pid, begun = worker_pid(device), time.monotonic()
        with pytest.raises(WorkerLostError, match=r"endless\.onnx: no answer to 'load' within 1 s") as caught:
            device.measure(endless)
        assert time.monotonic() - begun < 3.0
        assert "may take 1 s, of which" in str(caught.value)
        assert "profile.timeout_seconds" in str(caught.value)
        assert not Path(f"/proc/{pid}").exists()
        device.timeout_seconds = 30.0
        assert device.measure(tiny).latency_ms > 0
        assert worker_pid(device) != pid


def test_a_kill_in_the_middle_of_a_measurement_is_a_failure_with_its_cause(tiny: Path) -> None:
    with connect("ort:cpu", seconds=20.0, tolerance=1e-9) as device:
        timer = threading.Timer(0.5, os.kill, [worker_pid(device), signal.SIGKILL])
        timer.start()
        with pytest.raises(WorkerLostError, match=r"tiny\.onnx: .*ended by SIGKILL .*during 'time'$"):
            device.measure(tiny)
        timer.join()
        device.seconds = 0.05
        assert device.measure(tiny).latency_ms > 0


def test_too_little_memory_is_a_refusal_that_leaves_the_worker_alive(tiny: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.onnx"
    graph = helper.make_graph(
        [helper.make_node("Expand", ["images", "shape"], ["out"])],
        "large",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2**16, 2**16])],
        [numpy_helper.from_array(np.array([2**16, 2**16], np.int64), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    large.write_bytes(model.SerializeToString())
    with connect("ort:cpu?memory=8G", seconds=0.05) as device:
        pid = worker_pid(device)
        with pytest.raises(DeviceError, match=r"large\.onnx: .*[Aa]lloc"):
            device.measure(large)
        assert device.measure(tiny).latency_ms > 0
        assert worker_pid(device) == pid


def test_a_worker_leaves_nothing_on_the_disk_and_reports_to_nobody(tiny: Path, tmp_path: Path) -> None:
    # The runtime's telemetry would keep its files in these two.
    home = tmp_path / "home"
    home.mkdir()
    command = ("env", f"HOME={home}", f"TMPDIR={home}", sys.executable, "-P", worker.__file__)
    with WorkerDevice(
        Address("cpu"), transport=LocalProcess(command), seconds=0.02, tolerance=0.01, timeout_seconds=60
    ) as device:
        assert device.measure(tiny).latency_ms > 0
        assert device.kernels(tiny)
    assert list(home.iterdir()) == []


def worker_pid(device: WorkerDevice) -> int:
    assert isinstance(device.transport, LocalProcess)
    assert device.transport.pid is not None
    return device.transport.pid


@pytest.mark.parametrize(
    ("device", "modules"),
    [
        ("ort:cpu", ("numpy", "onnxruntime")),
        ("openvino:cpu", ("numpy", "openvino")),
        ("torch:cpu", ("numpy", "torch", "onnx")),
    ],
)
def test_a_board_needs_its_own_runtime_alone(device: str, modules: tuple[str, ...]) -> None:
    for line in ("ssh://board", "adb://serial"):
        transport = transport_to(parse_address(f"{line}/{device}"))
        assert isinstance(transport, SshProcess | AdbProcess)
        assert transport.modules == modules
