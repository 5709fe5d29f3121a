from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestling.config import load_config
from nestling.export import ExportMismatch
from nestling.models.graph import trace
from nestling.pipeline.candidate import (
    COARSE_TOLERANCE,
    COARSE_TYPICAL,
    FP32_TOLERANCE,
    HALF_TOLERANCE,
    ROUNDED_TOLERANCE,
    ROUNDED_TYPICAL,
    Candidate,
    write_candidate,
)
from nestling.pipeline.floats import FloatNetwork
from nestling.pipeline.measuring import latency_metrics, measure
from nestling.pipeline.verifying import check_precisions, verify_candidate
from nestling.pipeline.workbench import Workbench, even_batch
from nestling.pipeline.writing import simulated, write_file
from nestling.profile import (
    DeviceError,
    DevicePool,
    DevicesGoneError,
    Fingerprint,
    Measurement,
    OptimizedOp,
    WorkerDevice,
    connect,
)
from nestling.profile.measurement import Conditions
from nestling.quant import Quantized, QuantPolicy, quantize
from nestling.quant.layers import layers
from nestling.run import Run
from nestling.search import EvaluationFailed
from nestling.space import Arch

TESTS = Path(__file__).parents[2]


class Optimizing:
    """Stands for a device whose runtime makes `ops` of every file."""

    def __init__(self, ops: list[tuple[str, str]]) -> None:
        self.ops = tuple(OptimizedOp(name, op) for name, op in ops)

    def optimized_ops(self, _: Path) -> tuple[OptimizedOp, ...]:
        return self.ops


@pytest.fixture(scope="module")
def two_layers() -> tuple[Quantized, QuantPolicy]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten()).eval()
    policy = QuantPolicy((("0", "w8a8"),))
    return quantize(trace(network, resolution=8), policy, [torch.rand(2, 3, 8, 8)]), policy


class Untold:
    """Stands for a device whose runtime compiles a file and does not tell what became of it."""

    def optimized_ops(self, _: Path) -> None:
        return None


def test_a_file_of_which_the_runtime_does_not_tell_the_graph_is_not_refused_for_that(
    two_layers: tuple[Quantized, QuantPolicy],
) -> None:
    quantized, policy = two_layers
    device: Any = Untold()
    check_precisions(device, Path("model.onnx"), quantized, policy)


def _check(two_layers: tuple[Quantized, QuantPolicy], first: str, second: str) -> None:
    quantized, policy = two_layers
    names = [operator.name for operator in quantized.graph.operators if operator.kind == "Conv"]
    device: Any = Optimizing([(names[0], first), (names[1], second), ("x", "QuantizeLinear")])
    check_precisions(device, Path("model.onnx"), quantized, policy)


def test_a_file_that_keeps_to_its_policy_passes(two_layers: tuple[Quantized, QuantPolicy]) -> None:
    _check(two_layers, "com.microsoft.QLinearConv", "Conv")


def test_a_layer_quantized_against_the_policy_is_named(two_layers: tuple[Quantized, QuantPolicy]) -> None:
    with pytest.raises(ExportMismatch, match="2 is computed on integers"):
        _check(two_layers, "com.microsoft.QLinearConv", "com.microsoft.QLinearConv")


def test_a_layer_left_in_float_against_the_policy_is_named(
    two_layers: tuple[Quantized, QuantPolicy],
) -> None:
    with pytest.raises(ExportMismatch, match="0 is computed in float"):
        _check(two_layers, "com.microsoft.nchwc.Conv", "Conv")


def _before_4_bits(first: str, rectifier: nn.Module) -> tuple[Quantized, QuantPolicy]:
    """A layer in precision `first`, its `rectifier`, and one in w4a4 that reads it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), rectifier, nn.Conv2d(4, 2, 6), nn.Flatten()).eval()
    policy = QuantPolicy((("0", first), ("2", "w4a4")))
    return quantize(trace(network, resolution=8), policy, [torch.rand(2, 3, 8, 8)]), policy


INTEGERS, FLOATS = "com.microsoft.QLinearConv", "com.microsoft.nchwc.Conv"


@pytest.mark.parametrize("rectifier", [nn.ReLU(), nn.Identity(), nn.ReLU6()], ids=lambda r: type(r).__name__)
def test_before_4_bits_only_a_layer_with_a_relu6_may_be_computed_either_way(
    rectifier: nn.Module, cpu: WorkerDevice, tmp_path: Path
) -> None:
    quantized, policy = _before_4_bits("w8a8", rectifier)
    write_file(quantized, tmp_path / "model.onnx")
    check_precisions(cpu, tmp_path / "model.onnx", quantized, policy)
    _check((quantized, policy), INTEGERS, FLOATS)
    if isinstance(rectifier, nn.ReLU6):
        _check((quantized, policy), FLOATS, FLOATS)
    else:
        with pytest.raises(ExportMismatch, match="0 is computed in float"):
            _check((quantized, policy), FLOATS, FLOATS)


def test_a_layer_in_floats_before_4_bits_is_not_computed_on_integers() -> None:
    with pytest.raises(ExportMismatch, match="0 is computed on integers"):
        _check(_before_4_bits("fp32", nn.ReLU6()), INTEGERS, FLOATS)


@pytest.mark.parametrize(("count", "size"), [(257, 129), (256, 256), (1, 1), (512, 256), (513, 171)])
def test_images_are_cut_into_batches_of_nearly_the_same_size(count: int, size: int) -> None:
    assert even_batch(count, at_most=256) == size


@pytest.fixture(scope="module")
def cpu() -> Iterator[WorkerDevice]:
    with connect("ort:cpu", seconds=0.05, timeout_seconds=60) as device:
        yield device


class Residual(nn.Module):
    """A sum of what two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 6)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).relu()
        logits: Tensor = self.head((self.inner(maps) + maps).relu())
        return logits.flatten(1)


@pytest.mark.parametrize("precision", ["w8a8", "w8a8-signed", "w8a8-signed-tensor"])
def test_a_residual_network_is_computed_on_integers_signed_or_not(
    precision: str, cpu: WorkerDevice, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path, images = tmp_path / "model.onnx", torch.rand(4, 3, 8, 8)
    policy = QuantPolicy((("", precision),))
    quantized = quantize(trace(Residual().eval(), resolution=8), policy, [images])
    write_file(quantized, path)
    check_precisions(cpu, path, quantized, policy)
    sums = [op.op for op in cpu.optimized_ops(path) or () if op.op.endswith("Add")]
    assert sums == ["com.microsoft.QLinearAdd"]
    got = cpu.predict(path, images.numpy())
    expected = simulated(quantized, images).logits.numpy()
    assert abs(got - expected).max() < 0.03 * abs(expected).max()


RECTIFIED = """
family = "mobilenet"
resolution = 16
act = "relu6"
stages = [
  { block = "mbconv", width = 8, depth = 1, kernel = 3, expand = 1, precision = ["w4a4", "fp32"] },
]
head = { kind = "efficientnet", width = 8, precision = ["w4a4", "fp32"] }
stem = { width = 8, precision = ["w8a8", "fp32"] }
"""


@pytest.fixture
def rectified(cpu: WorkerDevice, tmp_path: Path) -> Workbench:
    """A run whose networks have ReLU6 behind a stem in w8a8, read in w4a4; on the CPU, untrained."""
    (tmp_path / "space.toml").write_text(RECTIFIED)
    (tmp_path / "config.toml").write_text((TESTS / "toy.toml").read_text().replace("toy_space", "space"))
    config = load_config(tmp_path / "config.toml", overrides=['quant.keep={first = "w8a8"}'])
    bench = Workbench(Run.create(tmp_path / "run", config))
    vars(bench).update(supernet=bench.new_supernet().eval(), device=cpu)
    return bench


def test_a_relu6_between_a_layer_in_8_bits_and_one_in_4_is_no_failure(rectified: Workbench) -> None:
    arch = rectified.space.smallest
    candidate = write_candidate(rectified, arch, rectified.candidate_path(arch))
    assert candidate.quantized is not None
    told = {layer.precision for layer in layers(candidate.quantized.graph, candidate.policy)}
    assert told == {"w8a8", "w4a4"}
    stem = next(operator for operator in candidate.quantized.graph.operators if operator.kind == "Clip")
    assert candidate.quantized.ranges[stem.name].dtype == "uint4"
    assert candidate.worst_error < COARSE_TOLERANCE


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_tells_which_layers_it_computes_on_integers(
    two_layers: tuple[Quantized, QuantPolicy], tmp_path: Path
) -> None:
    quantized, policy = two_layers
    write_file(quantized, tmp_path / "model.onnx")
    with connect("openvino:cpu") as device:
        check_precisions(device, tmp_path / "model.onnx", quantized, policy)
        with pytest.raises(ExportMismatch, match="0 is computed on integers"):
            check_precisions(device, tmp_path / "model.onnx", quantized, QuantPolicy(()))


def restless(spread: float) -> Measurement:
    """A measurement whose ratios are 1 and 1 + `spread`, half of them each."""
    fingerprint = Fingerprint("ort:cpu?threads=1", "A CPU", (), 1, "Linux", "ort", "0" * 12, False)
    return Measurement(fingerprint, (0.001, 0.001 * (1 + spread)) * 20, (0.001,) * 40, 0.1, 0.1)


def slowed(times: float) -> Measurement:
    """A measurement with a tight interval, of a device that others slowed."""
    return replace(restless(0.001), conditions=Conditions(slowed=times))


class Restless:
    """A device that gives one after the other of `taken`, numbers for `restless`; notes what was done."""

    name = "ort:cpu?threads=1"

    def __init__(self, *taken: float | Measurement) -> None:
        self.left = [one if isinstance(one, Measurement) else restless(one) for one in taken]
        self.done: list[object] = []

    def measure(self, path: Path) -> Measurement:
        self.done.append(path.name)
        if not self.left:
            raise DeviceError("gone")
        return self.left.pop(0)


def timed(*taken: float | Measurement) -> tuple[Measurement, list[object]]:
    device: Any = Restless(*taken)
    found = measure(device, Path("net"), pauses=(0.0, 3.0), sleep=device.done.append)
    return found, device.done


def test_an_unstable_measurement_is_taken_again_later_until_it_is_stable() -> None:
    assert timed(0.01) == (restless(0.01), ["net"])
    assert timed(0.2, 0.01) == (restless(0.01), ["net", 0.0, "net"])
    assert timed(0.2, 0.3, 0.01) == (restless(0.01), ["net", 0.0, "net", 3.0, "net"])


def test_a_device_that_others_slow_is_not_asked_again_and_its_figure_counts_last() -> None:
    assert timed(slowed(1.4)) == (slowed(1.4), ["net"])
    assert timed(0.2, slowed(1.4)) == (restless(0.2), ["net", 0.0, "net"])
    assert timed(0.2, slowed(1.1)) == (slowed(1.1), ["net", 0.0, "net"])


class Boards(DevicePool):
    """A pool in which two processes measure, each on a board of its own."""

    def __init__(self, meeting: threading.Barrier) -> None:
        self.meeting = meeting

    @property
    def name(self) -> str:
        return "pool:ssh://a/ort:cpu,ssh://b/ort:cpu"

    def measure(self, path: Path) -> Measurement:
        self.meeting.wait(5)
        return restless(0.01 if path == Path("net") else 1.0)


def test_the_boards_of_a_pool_measure_at_once() -> None:
    meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as searches:
        taken = list(searches.map(lambda _: measure(Boards(meeting), Path("net")), range(2)))
    assert taken == [restless(0.01)] * 2


def test_where_all_are_unstable_the_steadiest_counts_and_the_record_tells() -> None:
    found, done = timed(0.3, 0.2, 0.4)
    assert found == restless(0.2)
    assert len(done) == 5
    assert latency_metrics(found, reference_ms=2.0)["latency_unstable"] == 1
    assert latency_metrics(restless(0.01), reference_ms=2.0)["latency_unstable"] == 0


def test_a_device_that_is_lost_while_measuring_again_is_a_failure() -> None:
    with pytest.raises(EvaluationFailed, match="gone"):
        timed(0.2)


def test_a_device_that_is_gone_is_no_failure_of_the_candidate() -> None:
    class Gone:
        name = "ort:cpu"

        def measure(self, _: Path) -> Measurement:
            raise DevicesGoneError("onnxruntime is not installed")

    device: Any = Gone()
    with pytest.raises(DevicesGoneError, match="not installed"):
        measure(device, Path("net"))


def test_a_device_that_cannot_be_opened_is_no_failure_of_the_candidate(tmp_path: Path) -> None:
    class Bench:
        checked_images = SimpleNamespace(array=lambda size: np.zeros((1, 3, size, size), np.float32))

        @property
        def device(self) -> None:
            raise DeviceError("no such device")

    bench: Any = Bench()
    written: Any = SimpleNamespace(resolution=8, path=tmp_path / "net.onnx")
    with pytest.raises(DeviceError, match="no such device"):
        verify_candidate(bench, written)


ALL_BITS = QuantPolicy((("", "w8a8"),))


@pytest.mark.parametrize(
    ("policy", "exact", "expected"),
    [
        (ALL_BITS, True, (FP32_TOLERANCE, None)),
        (ALL_BITS, False, (ROUNDED_TOLERANCE, ROUNDED_TYPICAL)),
        (QuantPolicy((("", "w4a4"),)), True, (COARSE_TOLERANCE, COARSE_TYPICAL)),
        (QuantPolicy((("0", "w8a8"), ("2", "fp16"))), True, (ROUNDED_TOLERANCE, ROUNDED_TYPICAL)),
        (QuantPolicy((("", "fp16"),)), True, (HALF_TOLERANCE, None)),
        (QuantPolicy(), False, (FP32_TOLERANCE, None)),
    ],
    ids=["integers", "rounded floats", "4 bits", "beside halves", "halves", "floats"],
)
def test_a_file_may_differ_as_far_as_its_arithmetic_may(
    two_layers: tuple[Quantized, QuantPolicy],
    policy: QuantPolicy,
    exact: bool,
    expected: tuple[float, float | None],
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten()).eval()
    floats = FloatNetwork(network, resolution=8, image=torch.rand(1, 3, 8, 8))
    candidate = Candidate(Arch(()), Path("model.onnx"), floats, policy, two_layers[0])

    assert candidate.tolerances(exact=exact) == expected
