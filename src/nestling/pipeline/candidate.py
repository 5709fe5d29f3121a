"""An arch becomes a file: materialized, recalibrated, quantized, written, checked; scored, timed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from nestling.data import EvalImages
from nestling.export import ExportMismatch, verify
from nestling.models.cost import Cost, cost
from nestling.models.graph import Graph, trace
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import simulated_logits, write_file
from nestling.profile import Device, DeviceError, Measurement
from nestling.quant import Quantized, QuantPolicy, Recipe, quantize, weight_bits
from nestling.search import EvaluationFailed
from nestling.space import Arch
from nestling.train.evaluate import Accuracy, recalibrate

CHECKED_IMAGES = 16
SCORED_BATCH = 512
"""Images that the device's runtime is given at a time; each has the whole time limit."""
HELD_BYTES = 2**28
"""Images of one resolution that the runtime keeps, so that the next candidate finds them there."""
FP32_TOLERANCE = 1e-4
"""Largest difference to PyTorch of a float file's logits, as a fraction of their scale."""
HALF_TOLERANCE = 5e-3
"""The same, with layers in 16-bit floats."""
QUANTIZED_TOLERANCE, QUANTIZED_TYPICAL = 0.5, 0.02
"""The same, and the median difference, for a quantized file against its simulation."""
BYTES_PER_MB = 1_000_000
WEIGHTED = {"Conv", "Gemm", "MatMul"}
INTEGER_OPS = {"com.microsoft.QLinearConv", "QLinearConv", "com.microsoft.QGemm", "QLinearMatMul"}
"""ONNX Runtime's operators that compute a weighted layer on integers."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An arch as a file that was compared with PyTorch on real images.

    Attributes:
        arch: which network.
        path: the file.
        network: in floats.
        graph: of `network`.
        policy: which layer computes in which precision.
        quantized: what the file holds.
        cost: of `network`.
        resolution: of its images, in pixels.
        worst_error: the largest difference of a logit between file and PyTorch, as a part of their scale.
    """

    arch: Arch
    path: Path
    network: nn.Module
    graph: Graph
    policy: QuantPolicy
    quantized: Quantized
    cost: Cost
    resolution: int
    worst_error: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most bytes that activations take at once, quantized ones a byte each, halves two."""
        graph = self.quantized.graph
        halves = (name for name in graph.shapes if name.endswith((".float16", ".bfloat16")))
        widths = dict.fromkeys(halves, 2) | dict.fromkeys(self.quantized.ranges, 1)
        return graph.peak_bytes(bytes_per_number=widths)

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is in another precision than 32-bit floats."""
        return bool(self.quantized.ranges) or self.quantized.graph is not self.graph

    @property
    def tolerances(self) -> tuple[float, float | None]:
        """How far a logit may be off, and the median of them, as parts of their scale: see `check_logits`."""
        used = {self.policy.precision(operator.layer) for operator in self.graph.operators}
        if any(precision.activation is not None for precision in used):
            return QUANTIZED_TOLERANCE, QUANTIZED_TYPICAL
        if any(precision.floats != "float32" for precision in used):
            return HALF_TOLERANCE, None
        return FP32_TOLERANCE, None

    @property
    def weight_bytes(self) -> int:
        """What weights, biases and scales need at their precisions, also at those that no file holds."""
        return math.ceil(weight_bits(self.graph, self.policy) / 8)


def write_candidate(
    bench: Workbench, arch: Arch, path: Path, *, network: nn.Module | None = None
) -> Candidate:
    """The candidate of `arch`, its ONNX file at `path`.

    Its weights are the supernet's, or those of `network`, a plain network of that arch, which is recalibrated
    in place. The same arch, weights and images give the same file to the last bit.

    Raises:
        EvaluationFailed: the file does not compute what PyTorch computes, or the runtime refuses it.
    """
    resolution = bench.resolution(arch)
    network = bench.supernet.materialize(arch) if network is None else network
    recalibrate(network, bench.recalibration_images(resolution))
    network.cpu()
    try:
        image = torch.from_numpy(checked_images(bench).array(resolution)[:1])
        graph = trace(network, resolution=resolution, image=image)
        policy = quant_policy(bench.family, arch, graph, keep=bench.config.quant.keep)
        quantized = quantize(
            graph,
            policy,
            tuple(bench.calibration_images(resolution)),
            recipe=Recipe(**bench.config.quant.model_dump(exclude={"keep"})),
            reduce_range=bench.device.fingerprint.int8_saturates,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(
            quantized,
            path,
            dynamic_batch=bench.config.export.dynamic_batch,
            metadata=file_metadata(bench, arch),
        )
    except ValueError as error:
        raise EvaluationFailed(str(error)) from error
    counted = cost(network, resolution)
    candidate = Candidate(arch, path, network, graph, policy, quantized, counted, resolution)
    return replace(candidate, worst_error=verify_candidate(bench, candidate))


def verify_candidate(bench: Workbench, candidate: Candidate) -> float:
    """The largest difference of a logit between the candidate's file and PyTorch, as a part of their scale.

    Raises:
        EvaluationFailed: the file computes something else, or in other precisions; it is removed.
    """
    images = torch.from_numpy(checked_images(bench).array(candidate.resolution))
    quantized = candidate.is_quantized
    with torch.no_grad():
        expected = simulated_logits(candidate.quantized, images) if quantized else candidate.network(images)
    tolerance, typical = candidate.tolerances
    try:
        if quantized:  # first: its session serves what follows
            check_precisions(bench.device, candidate.path, candidate.quantized, candidate.policy)
        verified = verify(
            candidate.path,
            images,
            expected=expected,
            run=bench.device.predict,
            tolerance=tolerance,
            typical=typical,
        )
    except (DeviceError, ExportMismatch) as error:
        candidate.path.unlink(missing_ok=True)
        raise EvaluationFailed(str(error)) from error
    return verified.worst_error


def checked_images(bench: Workbench) -> EvalImages:
    """The search images by which files are compared with PyTorch."""
    return bench.data.search.take(min(CHECKED_IMAGES, len(bench.data.search)))


def check_precisions(device: Device, path: Path, quantized: Quantized, policy: QuantPolicy) -> None:
    """Refuses a file of which the runtime computes other layers on integers than the policy says.

    ONNX Runtime may quantize a layer that was left in float, or leave one in float that was quantized; only
    the graph that it has optimized tells. Layers in precisions for research may be computed either way: of
    those nothing but the result counts.

    Raises:
        ExportMismatch: the layers are listed.
        DeviceError: the runtime refuses the file.
    """
    weighted = {
        operator.name: operator.layer
        for operator in quantized.graph.operators
        if operator.kind in WEIGHTED
        and operator.weight is not None
        and not policy.precision(operator.layer).simulated
    }
    wanted = {
        name
        for name, layer in weighted.items()
        if f"{name}.weight" in quantized.ranges and policy.precision(layer).activation is not None
    }
    found = {node.name for node in device.optimized_ops(path) if node.op in INTEGER_OPS} & weighted.keys()
    if found != wanted:
        told = [f"{weighted[name]} is computed in float" for name in sorted(wanted - found)]
        told += [f"{weighted[name]} is computed on integers" for name in sorted(found - wanted)]
        raise ExportMismatch(f"the runtime does not keep to the policy: {'; '.join(told)}")


def file_metadata(bench: Workbench, arch: Arch) -> dict[str, str]:
    """What a file says of itself: its arch, its input, its classes."""
    return {
        "nestling.arch": arch.to_json(),
        "nestling.arch_key": arch.key,
        "nestling.classes": json.dumps(list(bench.data.classes)),
        **bench.data.search.preprocessing(bench.resolution(arch)),
    }


def score(device: Device, path: Path, images: EvalImages, *, resolution: int) -> Accuracy:
    """The accuracy of the file at `path`, run by the device's runtime.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
    """
    correct = 0
    held = len(images) * 12 * resolution**2 <= HELD_BYTES
    try:
        for number, batch in enumerate(images.at(resolution, batch_size=SCORED_BATCH)):
            key = f"{images.key}@{resolution}/{number}" if held else None
            logits = device.predict(path, batch.images.numpy(), key=key)
            correct += int((logits.argmax(axis=1) == batch.labels.numpy()).sum())
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error
    return Accuracy(correct, len(images))


def measure(device: Device, path: Path) -> Measurement:
    """The latency of the file at `path`; an unstable measurement is taken once more.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
    """
    try:
        measurement = device.measure(path)
        return device.measure(path) if measurement.unstable else measurement
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error


def latency_metrics(measurement: Measurement, *, reference_ms: float) -> dict[str, float]:
    """Latency as a search weighs it.

    It is the ratio to the device's reference model times that model's milliseconds, measured once:
    ratios repeat better than plain medians, and a front needs latencies that can be compared.
    """
    return {"latency_ms": measurement.ratio * reference_ms, "latency_ratio": measurement.ratio}


def candidate_metrics(candidate: Candidate, accuracy: Accuracy) -> dict[str, float]:
    """The other metrics that a search weighs: exact ones, and accuracy.

    The size is that of the file; of a network in precisions for research, which no file holds in as few bits,
    that of its weights.
    """
    size = candidate.weight_bytes if candidate.policy.simulated else candidate.path.stat().st_size
    return {
        "top1": accuracy.top1,
        "size_mb": size / BYTES_PER_MB,
        "mmacs": candidate.cost.macs / 1e6,
        "peak_mb": candidate.peak_bytes / BYTES_PER_MB,
    }
