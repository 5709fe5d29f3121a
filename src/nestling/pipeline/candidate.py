"""An arch becomes a file: materialized, recalibrated, quantized, written, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.export import Unwritable, constant_bytes
from nestling.models.cost import Cost
from nestling.models.graph import Graph, Untraceable
from nestling.pipeline.floats import FloatNetwork
from nestling.pipeline.policies import is_precision, quant_policy
from nestling.pipeline.verifying import verify_candidate
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import write_file, write_officially
from nestling.quant import Quantized, QuantPolicy, Recipe, Unquantizable, quantize, weight_bits
from nestling.quant.regions import WEIGHT_AXES, is_layer
from nestling.search import EvaluationFailed
from nestling.space import Arch
from nestling.train.evaluate import Accuracy, recalibrate

FP32_TOLERANCE = 1e-4
"""Largest difference to PyTorch of a float file's logits, as a fraction of their scale."""
HALF_TOLERANCE = 5e-3
"""The same, with layers in 16-bit floats."""
ROUNDED_TOLERANCE, ROUNDED_TYPICAL = 0.15, 0.004
"""The same, and the median difference, for a quantized file against its simulation, where computed floats
become integers, or the device's integers were never compared with the simulation's."""
COARSE_TOLERANCE, COARSE_TYPICAL = 0.5, 0.02
"""The same, where activations have fewer than 8 bits."""
BYTES_PER_MB = 1_000_000
_PARTS = ("", ".quantized", ".scale", ".zero_point")
"""What the file appends to the name of a weight for each of the constants that it makes of it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An arch as a file that was compared with PyTorch on real images.

    Attributes:
        arch: which network.
        path: the file.
        floats: the network in floats.
        policy: which layer computes in which precision.
        quantized: what the file holds; None where PyTorch's own exporter wrote it, in floats.
        worst_error: the largest difference of a logit between file and PyTorch, as a part of their scale.
    """

    arch: Arch
    path: Path
    floats: FloatNetwork
    policy: QuantPolicy
    quantized: Quantized | None
    worst_error: float = 0.0

    @property
    def network(self) -> nn.Module:
        """The plain network, in floats; not to be changed."""
        return self.floats.network

    @property
    def graph(self) -> Graph | None:
        """Of `network`; None where it cannot be traced."""
        traced = self.floats.traced
        return traced if isinstance(traced, Graph) else None

    @property
    def cost(self) -> Cost:
        """Of `network`."""
        return self.floats.cost

    @property
    def resolution(self) -> int:
        """Of its images, in pixels."""
        return self.floats.resolution

    @property
    def writer(self) -> str:
        """What wrote the file: `nestling`, or `torch.onnx.export` where the network cannot be traced."""
        return "torch.onnx.export" if self.quantized is None else "nestling"

    @property
    def peak_bytes(self) -> int:
        """The most bytes that activations take at once, quantized ones a byte each, halves two."""
        if self.quantized is None:
            return self.cost.peak_bytes
        graph = self.quantized.graph
        halves = (name for name in graph.shapes if name.endswith((".float16", ".bfloat16")))
        widths = dict.fromkeys(halves, 2) | dict.fromkeys(self.quantized.ranges, 1)
        return graph.peak_bytes(bytes_per_number=widths)

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is in another precision than 32-bit floats."""
        found = self.quantized
        return found is not None and (bool(found.ranges) or found.graph is not self.graph)

    def tolerances(self, *, exact: bool) -> tuple[float, float | None]:
        """How far a logit may be off, and the median of them, as parts of their scale: see `check_logits`.

        Args:
            exact: whether all integers must be the simulation's to the last bit.
        """
        operators = () if self.graph is None else self.graph.operators
        used = {self.policy.precision(operator.layer) for operator in operators}
        formats = [precision.activation for precision in used if precision.activation is not None]
        halves = any(precision.floats != "float32" for precision in used)
        if any(format.bits < 8 for format in formats):
            return COARSE_TOLERANCE, COARSE_TYPICAL
        if formats and (halves or not exact):
            return ROUNDED_TOLERANCE, ROUNDED_TYPICAL
        return (HALF_TOLERANCE if halves else FP32_TOLERANCE), None

    @property
    def size_bytes(self) -> int:
        """Of the file; of a network in precisions for research, which no file holds in as few bits, that of a
        file that did: the weights of such layers count as their format packs them.
        """
        size = self.path.stat().st_size
        return size - _not_packed(self) if self.policy.simulated else size

    @property
    def weight_bytes(self) -> int:
        """What weights, their scales and biases need of `size_bytes`, but for bytes that are not full.

        The rest are scales of biases and activations, and the file's nodes and names.
        """
        if self.graph is None:
            return 4 * self.cost.params
        return math.ceil(weight_bits(self.graph, self.policy) / 8)


def write_candidate(
    bench: Workbench, arch: Arch, path: Path, *, network: nn.Module | None = None
) -> Candidate:
    """The candidate of `arch`, its ONNX file at `path`.

    Its weights are the supernet's, or those of `network`, a plain network of that arch, which is recalibrated
    in place. The same arch, weights and images give the same file to the last bit, also where the float
    network is one that the bench has kept. A network that cannot be traced is written by PyTorch's own
    exporter, in floats.

    Raises:
        EvaluationFailed: the file does not compute what PyTorch computes, or the runtime refuses it; or
            neither writer covers the network, or the arch asks for precisions and it cannot be traced.
    """
    floats = float_network(bench, arch) if network is None else recalibrated(bench, arch, network)
    path.parent.mkdir(parents=True, exist_ok=True)
    dynamic, metadata = bench.config.export.dynamic_batch, file_metadata(bench, arch)
    graph = floats.traced
    try:
        if isinstance(graph, Untraceable):
            _refuse_precisions(bench, arch, graph)
            write_officially(
                floats.network,
                path,
                resolution=floats.resolution,
                dynamic_batch=dynamic,
                metadata=metadata,
            )
            candidate = Candidate(arch, path, floats, QuantPolicy(), None)
        else:
            policy = quant_policy(bench.family, arch, graph, keep=bench.config.quant.keep)
            quantized = quantize(
                graph,
                policy,
                _Calibration(bench, floats.resolution),
                recipe=Recipe(**bench.config.quant.model_dump(exclude={"keep"})),
                reduce_range=bench.device.fingerprint.int8_saturates,
                kept=floats.statistics,
            )
            floats.statistics = quantized.statistics
            write_file(quantized, path, dynamic_batch=dynamic, metadata=metadata)
            candidate = Candidate(arch, path, floats, policy, quantized)
    except (Unquantizable, Unwritable) as error:
        raise EvaluationFailed(str(error)) from error
    return replace(candidate, worst_error=verify_candidate(bench, candidate))


@dataclass(frozen=True, slots=True)
class _Calibration:
    """The images for ranges, resized anew each time they are read: not at all where statistics are known."""

    bench: Workbench
    resolution: int

    def __iter__(self) -> Iterator[Tensor]:
        return self.bench.calibration_images(self.resolution)


def float_network(bench: Workbench, arch: Arch) -> FloatNetwork:
    """The float network of `arch`, its weights those of the run's supernet, recalibrated; the last are kept.

    Raises:
        RunError: training is not finished.
    """
    return bench.floats.get(arch, lambda: recalibrated(bench, arch, bench.supernet.materialize(arch)))


def recalibrated(bench: Workbench, arch: Arch, network: nn.Module) -> FloatNetwork:
    """`network`, a plain network of `arch`, recalibrated in place and moved to the CPU."""
    resolution = bench.resolution(arch)
    recalibrate(network, bench.recalibration_images(resolution))
    image = torch.from_numpy(bench.checked_images.array(resolution)[:1])
    return FloatNetwork(network.cpu(), resolution=resolution, image=image)


def _refuse_precisions(bench: Workbench, arch: Arch, why: Untraceable) -> None:
    """Refuses precisions of a network that is not written operator by operator.

    Raises:
        EvaluationFailed: a choice, or `quant.keep`, asks for one; operation and layer are named.
    """
    chosen = {name: arch[name] for name in arch if is_precision(name)}
    kept = {f"quant.keep for {name}": value for name, value in bench.config.quant.keep.items()}
    asked = next(((name, value) for name, value in (chosen | kept).items() if value != "fp32"), None)
    if asked is not None:
        raise EvaluationFailed(
            f"{asked[0]} is {asked[1]!r}, but {why}: such a network is written by torch.onnx.export, and "
            "only in fp32"
        )


def file_metadata(bench: Workbench, arch: Arch) -> dict[str, str]:
    """What a file says of itself: its arch, its input, its classes."""
    return {
        "nestling.arch": arch.to_json(),
        "nestling.arch_key": arch.key,
        "nestling.classes": json.dumps(list(bench.data.classes)),
        **bench.data.search.preprocessing(bench.resolution(arch)),
    }


def candidate_metrics(candidate: Candidate, accuracy: Accuracy) -> dict[str, float]:
    """The other metrics that a search weighs: exact ones, and accuracy."""
    return {"top1": accuracy.top1, **cost_metrics(candidate)}


def cost_metrics(candidate: Candidate) -> dict[str, float]:
    """The metrics that a search weighs and that are exact."""
    return {
        "size_mb": candidate.size_bytes / BYTES_PER_MB,
        "mmacs": candidate.cost.macs / 1e6,
        "peak_mb": candidate.peak_bytes / BYTES_PER_MB,
    }


def _not_packed(candidate: Candidate) -> int:
    """The bytes that the file has too many, as it holds weights of research precisions in wider numbers."""
    stored, found = constant_bytes(candidate.path), 0
    for operator in () if candidate.graph is None else candidate.graph.operators:
        precision = candidate.policy.precision(operator.layer)
        if precision.weight is None or not is_layer(operator):
            continue
        if precision.simulated:
            weight = operator.constant()
            channels = weight.shape[WEIGHT_AXES[operator.kind]]
            per_channel = weight.numel() // channels
            bits = precision.weight.size_bits(channels=channels, per_channel=per_channel)
            held = sum(stored.get(f"{operator.name}.weight{part}", 0) for part in _PARTS)
            found += held - math.ceil(bits / 8)
    return found
