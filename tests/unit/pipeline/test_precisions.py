from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nestling.pipeline import precisions as table
from nestling.pipeline.precisions import Finding, probe, usable
from nestling.pipeline.probes import PROBES, WEIGHTED
from nestling.profile import (
    DeviceError,
    Fingerprint,
    Kernel,
    LineLostError,
    Measurement,
    MeasurementStore,
    OptimizedOp,
    WorkerDevice,
    WorkerLostError,
    connect,
)
from nestling.quant import PRECISIONS, Format, Precision


@pytest.fixture(scope="module")
def cpu() -> Iterator[WorkerDevice]:
    with connect("ort:cpu", seconds=0.05, timeout_seconds=60) as device:
        yield device


class Other:
    """The device `cpu`, but for what a test changes."""

    def __init__(self, cpu: WorkerDevice, **changes: Any) -> None:
        self.cpu, self.changes, self.asked = cpu, changes, 0
        self.name, self.fingerprint = cpu.name, changes.get("fingerprint", cpu.fingerprint)

    def kernels(self, path: Path) -> tuple[Kernel, ...]:
        self.asked += 1
        losses: list[Exception] = self.changes.get("losses", [])
        if losses:
            raise losses.pop(0)
        if "error" in self.changes:
            raise DeviceError(f"{self.name}, {path}: {self.changes['error']}")
        found: tuple[Kernel, ...] = self.changes.get("kernels") or self.cpu.kernels(path)
        return found

    def optimized_ops(self, path: Path) -> tuple[OptimizedOp, ...] | None:
        return None if self.changes.get("compiles") else self.cpu.optimized_ops(path)

    def predict(self, path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if path.name == "fp32.onnx" and "plain" in self.changes:
            raise self.changes["plain"]
        factor: np.float32 = self.changes.get("factor", np.float32(1))
        return factor * self.cpu.predict(path, images)

    def compare(self, path: Path, other: Path, *, seconds: float) -> Measurement:
        assert path.exists()
        assert other.exists()
        slips: list[Exception] = self.changes.get("slips", [])
        if slips:
            raise slips.pop(0)
        return Measurement(self.fingerprint, (1.0,) * 10, (2.5,) * 10, seconds, 0.1)


def _probe(device: Any, kind: str, **options: Any) -> Finding:
    [found] = probe(device, ["fp32", "w8a8"], kinds=[kind], **options)
    return found


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("Conv", "QLinearConv of uint8"),
        ("grouped Conv", "QLinearConv of uint8"),
        ("Gemm", "QGemm of uint8"),
        ("MaxPool", "MaxPool of uint8"),
        ("Add", "QLinearAdd of uint8"),
        ("HardSwish", "QLinearMul of uint8"),
    ],
)
def test_the_cpu_executes_these_on_integers_as_simulated(cpu: WorkerDevice, kind: str, kernel: str) -> None:
    found = _probe(cpu, kind)
    assert (found.status, found.right) == ("executed", True)
    assert kernel in found.why


def test_what_runs_in_floats_between_integers_is_simulated(cpu: WorkerDevice) -> None:
    found = _probe(cpu, "Gelu")
    assert (found.status, found.right, found.why) == ("simulated", True, "Gelu of floats")


def test_what_a_runtime_compiles_and_does_not_tell_is_usable(cpu: WorkerDevice) -> None:
    provider = "OpenVINOExecutionProvider"
    compiled = Kernel(f"{provider}_{provider}_348_0_0", f"{provider}_348_0", provider, ("float",), ("float",))
    found = _probe(Other(cpu, compiles=True, kernels=(compiled,)), "Conv")
    assert (found.status, found.why, found.right) == ("untold", f"compiled by {provider}", True)
    assert usable(["fp32", "w8a8"], [found]) == (("fp32", "w8a8"), {})


def test_a_device_that_computes_something_else_is_found_out(cpu: WorkerDevice) -> None:
    found = _probe(Other(cpu, factor=np.float32(0.9)), "Conv")
    assert (found.status, found.right) == ("executed", False)
    assert usable(["fp32", "w8a8"], [found])[1].keys() == {"w8a8"}


def test_the_probes_have_sums_of_products_beyond_16_bits() -> None:
    # so that the arithmetic of x86 without VNNI, if its weights kept 8 bits, would show
    for kind in ("Conv", "Gemm"):
        graph = PROBES[kind].graph(timed=False)
        weight = next(operator.constant() for operator in graph.operators if operator.kind == kind)[0]
        integers = (weight / weight.abs().max() * 127).round().flatten().sort().values
        least = PROBES[kind].images(4, timed=False).quantile(0.5) * 255
        assert float(least * integers[:2].sum()) > 32767


def test_an_error_of_the_runtime_is_a_refusal_that_tells_it(cpu: WorkerDevice) -> None:
    found = _probe(Other(cpu, error="no kernel\n for this"), "Conv")
    assert (found.status, found.right) == ("refused", False)
    assert found.why == f"{cpu.name}: no kernel for this"


def test_a_worker_lost_once_says_nothing_about_the_precision(cpu: WorkerDevice, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "measurements.db")
    device = Other(cpu, losses=[WorkerLostError("killed"), WorkerLostError("late")])
    found = _probe(device, "Add", store=store)
    assert (found.status, device.asked) == ("executed", 3)
    assert _probe(device, "Add", store=store) == found


def test_a_precision_that_loses_every_worker_is_refused_until_asked_again(
    cpu: WorkerDevice, tmp_path: Path
) -> None:
    store = MeasurementStore(tmp_path / "measurements.db")
    device = Other(cpu, losses=[WorkerLostError(f"{cpu.name}: crashed") for _ in range(3)])
    found = _probe(device, "Add", store=store)
    assert (found.status, found.why) == (
        "refused",
        f"3 workers were lost on it; the last one: {cpu.name}: crashed",
    )
    assert _probe(device, "Add", store=store).status == "executed"


@pytest.mark.parametrize("plain", [WorkerLostError("killed again"), DeviceError("no kernel for floats")])
def test_where_floats_fail_after_lost_workers_the_device_is_to_blame(
    cpu: WorkerDevice, plain: DeviceError
) -> None:
    device = Other(cpu, losses=[WorkerLostError("killed") for _ in range(3)], plain=plain)
    with pytest.raises(type(plain), match=str(plain)):
        _probe(device, "Add")


def test_a_line_that_is_lost_says_nothing_about_the_precision(cpu: WorkerDevice) -> None:
    device = Other(cpu, losses=[LineLostError("cut")])
    with pytest.raises(LineLostError, match="cut"):
        _probe(device, "Add")


def test_a_worker_lost_while_timing_says_nothing_about_the_precision(cpu: WorkerDevice) -> None:
    device = Other(cpu, slips=[WorkerLostError("killed"), WorkerLostError("killed")])
    found = _probe(device, "Conv", timed=True)
    assert found.status == "executed"
    assert found.speedup == pytest.approx(2.5)


def test_a_precision_whose_timing_costs_every_worker_is_refused_where_floats_are_timed(
    cpu: WorkerDevice, tmp_path: Path
) -> None:
    store = MeasurementStore(tmp_path / "measurements.db")
    found = _probe(Other(cpu, slips=[WorkerLostError("killed")] * 3), "Conv", timed=True, store=store)
    assert (found.status, found.lost) == ("refused", True)
    again = _probe(Other(cpu), "Conv", timed=True, store=store)  # of the moment: nothing was remembered
    assert again.status == "executed"


def test_a_device_that_times_nothing_refuses_no_precision(cpu: WorkerDevice) -> None:
    with pytest.raises(WorkerLostError, match="killed"):
        _probe(Other(cpu, slips=[WorkerLostError("killed")] * 4), "Conv", timed=True)


def test_a_device_that_is_not_there_refuses_no_precision(cpu: WorkerDevice) -> None:
    def gone() -> Fingerprint:
        raise DeviceError("no such board")

    class Missing(Other):
        fingerprint = property(lambda _: gone(), lambda *_: None)

    with pytest.raises(DeviceError, match="no such board"):
        _probe(Missing(cpu), "Add")


def test_speed_and_size_are_those_of_the_layer_beside_fp32(cpu: WorkerDevice) -> None:
    found = _probe(Other(cpu), "Conv", timed=True)
    assert found.speedup == pytest.approx(2.5)
    assert found.size is not None
    assert 0.25 < found.size < 0.3
    assert not found.unstable


def test_a_kept_finding_is_not_made_again_on_the_same_device_alone(cpu: WorkerDevice, tmp_path: Path) -> None:
    device, store = Other(cpu), MeasurementStore(tmp_path / "measurements.db")
    found = _probe(device, "Add", store=store)
    assert _probe(device, "Add", store=store) == found
    assert device.asked == 1
    newer = Other(cpu, fingerprint=replace(cpu.fingerprint, runtime="onnxruntime 9.0"))
    _probe(newer, "Add", store=store)
    assert newer.asked == 1


def test_precisions_for_research_are_simulated_without_asking(
    cpu: WorkerDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Format(bits=2, signed=True, symmetric=True, per_channel=True)
    monkeypatch.setattr(table, "PRECISIONS", {**PRECISIONS, "tiny": Precision("tiny", narrow, None)})
    device: Any = Other(cpu)
    [found] = probe(device, ["tiny"], kinds=["Conv"])
    assert (found.status, found.error, device.asked) == ("simulated", None, 0)
    assert usable(["tiny"], [found]) == ((), {"tiny": usable(["tiny"], [])[1]["tiny"]})
    assert usable(["tiny"], [found], research=True) == (("tiny",), {})


def _kernels(*read: str) -> tuple[Kernel, ...]:
    return (Kernel("stem", "Conv", "CPUExecutionProvider", read, ("float",)),)


@pytest.mark.parametrize(
    ("floats", "read", "status"),
    [
        ("float16", "float", "simulated"),
        ("float16", "float16", "executed"),
        ("bfloat16", "float16", "simulated"),
        ("float32", "uint4", "executed"),
    ],
)
def test_the_types_that_a_kernel_reads_tell_whether_it_computes_so(
    floats: Any, read: str, status: str
) -> None:
    graph = PROBES["Conv"].graph(timed=False)
    kernels = _kernels("float", read)
    precision = Precision("any", None, None, floats=floats)
    assert table._judge(kernels, graph, precision, PROBES["Conv"])[0] == status


def _findings(**statuses: str) -> list[Finding]:
    kinds: Mapping[str, str] = {"conv": "Conv", "gemm": "Gemm"}
    return [Finding("w8a8", kinds[kind], status, "so", 0.0) for kind, status in statuses.items()]  # type: ignore[arg-type]


def test_a_precision_is_dropped_where_any_of_its_layers_is_refused() -> None:
    kept, dropped = usable(["w8a8", "fp32"], _findings(conv="executed", gemm="refused"))
    assert (kept, dropped) == (("fp32",), {"w8a8": "Gemm is refused (so)"})
    assert usable(["w8a8"], _findings(conv="executed", gemm="refused"), kinds=["Conv"])[0] == ("w8a8",)


def test_a_precision_that_would_all_be_computed_in_floats_is_dropped() -> None:
    assert "computed in 32-bit floats" in usable(["w8a8"], _findings(conv="simulated"))[1]["w8a8"]
    assert usable(["w8a8"], _findings(conv="simulated", gemm="executed"))[0] == ("w8a8",)


def test_every_probe_has_the_operator_that_it_is_for() -> None:
    for found in PROBES.values():
        assert found.subjects(found.graph(timed=False)), found.kind


@pytest.mark.parametrize("timed", [False, True])
def test_groups_of_a_grouped_convolution_have_many_channels(timed: bool) -> None:
    graph = PROBES["grouped Conv"].graph(timed=timed)
    shapes = [operator.constant().shape for operator in graph.operators if operator.weight is not None]
    assert {shape[1] for shape in shapes[1:]} == ({16} if timed else {8})
    assert "grouped Conv" in WEIGHTED


def test_a_probe_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    PROBES["Conv"].graph(timed=False)
    assert torch.equal(torch.rand(1), expected)


def test_two_fingerprints_do_not_share_what_was_found(tmp_path: Path, cpu: WorkerDevice) -> None:
    store = MeasurementStore(tmp_path / "measurements.db")
    other: Fingerprint = replace(cpu.fingerprint, cpu="another")
    store.remember("a", "one", fingerprint=cpu.fingerprint)
    store.remember("a", "two", fingerprint=cpu.fingerprint)
    assert store.recall("a", fingerprint=cpu.fingerprint) == "two"
    assert store.recall("a", fingerprint=other) is None
    assert len(store) == 0


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_computes_unsigned_bytes_on_integers() -> None:
    with connect("openvino:cpu") as device:
        found = probe(device, ["w8a8", "bf16"], kinds=("Conv", "Gemm"))
        narrow = "amx_int8" in device.fingerprint.instructions  # where there is one, there is bfloat16 too
    told = {(one.precision, one.kind): one.status for one in found}
    assert told["w8a8", "Conv"] == told["w8a8", "Gemm"] == "executed"
    assert (told["bf16", "Conv"] == told["bf16", "Gemm"] == "executed") or not narrow
    assert all(one.right for one in found)
