"""An arch becomes a file: materialized, recalibrated, quantized, written, checked; scored, timed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.data import EvalImages
from nestling.export import ExportMismatch, Unwritable, constant_bytes, verify
from nestling.models.cost import Cost
from nestling.models.graph import Graph, Untraceable
from nestling.pipeline.floats import FloatNetwork
from nestling.pipeline.policies import is_precision, quant_policy
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import Simulated, simulated, write_file, write_officially
from nestling.profile import Device, DeviceError, Measurement
from nestling.profile.turns import turn
from nestling.profile.worker import SLOWED
from nestling.quant import Quantized, QuantPolicy, Range, Recipe, Unquantizable, quantize, weight_bits
from nestling.quant.fake import vanish
from nestling.quant.regions import WEIGHT_AXES, absorbing
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
ROUNDED_TOLERANCE, ROUNDED_TYPICAL = 0.15, 0.004
"""The same, and the median difference, for a quantized file against its simulation, where computed floats
become integers, or the device's integers were never compared with the simulation's."""
COARSE_TOLERANCE, COARSE_TYPICAL = 0.5, 0.02
"""The same, where activations have fewer than 8 bits."""
EXACT_INSTRUCTIONS = "avx512_vnni"
"""With these, integers of ONNX Runtime's CPU provider are the simulation's to the last bit."""
PAUSES = (0.0, 3.0)
"""Seconds before an unstable measurement is taken again, and again: what made it so may have passed."""
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
    image = torch.from_numpy(checked_images(bench).array(resolution)[:1])
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


def verify_candidate(bench: Workbench, candidate: Candidate) -> float:
    """The largest difference of a logit between the candidate's file and PyTorch, as a part of their scale.

    The device opens and runs the file while PyTorch computes the same here.

    Raises:
        EvaluationFailed: the file computes something else, or in other precisions; it is removed.
        DeviceError: there is no such device.
        DevicesGoneError: the device cannot be used any more.
    """
    images = torch.from_numpy(checked_images(bench).array(candidate.resolution))
    device = bench.device  # where there is none, that is not the candidate's failure
    try:
        with ThreadPoolExecutor(1) as beside, _a_core_left():
            answer = beside.submit(_answer, device, candidate, images.numpy())
            expected = _expected(candidate, images)
            exact = not expected.rounds_floats and _computes_exactly(device)
            tolerance, typical = candidate.tolerances(exact=exact)
            _ = candidate.cost  # counted while the device is at work
            verified = verify(
                candidate.path,
                images,
                expected=expected.logits,
                run=lambda *_: answer.result(),
                tolerance=tolerance,
                typical=typical,
            )
    except (DeviceError, ExportMismatch) as error:
        candidate.path.unlink(missing_ok=True)
        raise EvaluationFailed(str(error)) from error
    return verified.worst_error


@contextmanager
def _a_core_left() -> Iterator[None]:
    """PyTorch computes with one thread less, where it has several.

    Its threads wait for each other at every operator: with one for each core, and a core taken by the
    device's worker, each of a thousand operators would wait for the scheduler.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _answer(device: Device, candidate: Candidate, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the device makes of `images`, once the file is known to keep to its policy.

    Raises:
        DeviceError, ExportMismatch: see `check_precisions`.
    """
    if candidate.is_quantized and candidate.quantized is not None:  # first: its session serves what follows
        check_precisions(device, candidate.path, candidate.quantized, candidate.policy)
    return device.predict(candidate.path, images)


@torch.no_grad()
def _expected(candidate: Candidate, images: Tensor) -> Simulated:
    if candidate.is_quantized and candidate.quantized is not None:
        return simulated(candidate.quantized, images)
    return Simulated(candidate.network(images), rounds_floats=False)


def _computes_exactly(device: Device) -> bool:
    """Whether the device's integers are those that the simulation was made after."""
    fingerprint = device.fingerprint
    return "ort:cpu" in fingerprint.device and EXACT_INSTRUCTIONS in fingerprint.instructions


def checked_images(bench: Workbench) -> EvalImages:
    """The search images by which files are compared with PyTorch."""
    return bench.data.search.take(min(CHECKED_IMAGES, len(bench.data.search)))


def check_precisions(device: Device, path: Path, quantized: Quantized, policy: QuantPolicy) -> None:
    """Refuses a file of which the runtime computes other layers on integers than the policy says.

    ONNX Runtime may quantize a layer that was left in float, or leave one in float that was quantized; only
    the graph that it has optimized tells. Layers in precisions for research may be computed either way, and
    so may those on integers with a ReLU6 that write fewer than 8 bits for such a layer, which end before the
    ReLU6 does: of those nothing but the result counts.

    Raises:
        ExportMismatch: the layers are listed.
        DeviceError: the runtime refuses the file.
    """
    graph, ranges = quantized.graph, quantized.ranges
    weighted = {
        operator.name: operator.layer
        for operator in graph.operators
        if operator.kind in WEIGHT_AXES
        and operator.weight is not None
        and not policy.precision(operator.layer).simulated
    }
    wanted = {
        name
        for name, layer in weighted.items()
        if f"{name}.weight" in ranges and policy.precision(layer).activation is not None
    }
    either = wanted & _ending_early(graph, ranges)
    wanted -= either
    on_integers = {node.name for node in device.optimized_ops(path) if node.on_integers}
    found = on_integers & weighted.keys() - either
    if found != wanted:
        told = [f"{weighted[name]} is computed in float" for name in sorted(wanted - found)]
        told += [f"{weighted[name]} is computed on integers" for name in sorted(found - wanted)]
        raise ExportMismatch(f"the runtime does not keep to the policy: {'; '.join(told)}")


def _ending_early(graph: Graph, ranges: Mapping[str, Range]) -> set[str]:
    """The operators whose rectifiers stay, as the few integers that they write end before these do."""
    readers, found = graph.readers(), set()
    for operator in graph.operators:
        _, *rectifiers = chain = absorbing(readers, graph, operator)
        written = ranges.get(chain[-1].name)
        narrow = written is not None and written.dtype != written.stored
        if narrow and not vanish(tuple(rectifiers), written):
            found.add(operator.name)
    return found


def file_metadata(bench: Workbench, arch: Arch) -> dict[str, str]:
    """What a file says of itself: its arch, its input, its classes."""
    return {
        "nestling.arch": arch.to_json(),
        "nestling.arch_key": arch.key,
        "nestling.classes": json.dumps(list(bench.data.classes)),
        **bench.data.search.preprocessing(bench.resolution(arch)),
    }


def score(
    device: Device, path: Path, images: EvalImages, *, resolution: int, part_of: int | None = None
) -> Accuracy:
    """The accuracy of the file at `path`, run by the device's runtime.

    Args:
        device: where.
        path: the file.
        images: what it is scored on.
        resolution: of its images, in pixels.
        part_of: how many images there are, where these are some of them.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
        DevicesGoneError: the device cannot be used any more.
    """
    correct = 0
    held = (part_of or len(images)) * 12 * resolution**2 <= HELD_BYTES
    try:
        for number, batch in enumerate(images.at(resolution, batch_size=SCORED_BATCH)):
            key = f"{images.key}@{resolution}/{number}" if held else None
            logits = device.predict(path, batch.images.numpy(), key=key)
            correct += int((logits.argmax(axis=1) == batch.labels.numpy()).sum())
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error
    return Accuracy(correct, len(images))


def measure(
    device: Device,
    path: Path,
    *,
    pauses: Sequence[float] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> Measurement:
    """The latency of the file at `path`; an unstable measurement is taken again, later each time.

    One that is unstable as others slow the device all the time is not: timing has waited for them already. A
    search goes on meanwhile, times the members of its front once more when it ends, and flags the others.
    Where all are unstable, the one from when the device was least slowed, as others change the ratio, and of
    those from when it was not the one whose ratio has the narrowest interval: it is still flagged. Of the
    processes of this machine one at a time measures on it; who shares a pool's leases, on each board.

    Args:
        device: where.
        path: the file.
        pauses: seconds before each further measurement.
        sleep: waits for so many seconds.

    Raises:
        EvaluationFailed: the runtime crashed, hung or refused the file.
        DevicesGoneError: the device cannot be used any more.
    """
    try:
        taken = [_measured(device, path)]
        for pause in pauses:
            if not taken[-1].unstable or taken[-1].slowness > SLOWED:
                break
            sleep(pause)
            taken.append(_measured(device, path))
    except DeviceError as error:
        raise EvaluationFailed(str(error)) from error
    return taken[-1] if not taken[-1].unstable else min(taken, key=_doubt)


def _measured(device: Device, path: Path) -> Measurement:
    with turn(device.name, tell=None):  # workers of a search wait for each other all the time
        return device.measure(path)


def _doubt(measurement: Measurement) -> tuple[float, float]:
    """How much slower the device was than at its best, where that matters, and how wide the interval is."""
    low, high = measurement.ratio_interval
    slowed = measurement.slowness
    return (slowed if slowed > SLOWED else 1.0, (high - low) / measurement.ratio)


def latency_metrics(measurement: Measurement, *, reference_ms: float) -> dict[str, float]:
    """Latency as a search weighs it.

    It is the ratio to the device's reference model times that model's milliseconds, one figure for the run:
    ratios repeat better than plain medians, and a front needs latencies that can be compared. The record of
    the search tells which of them were unstable to the last: `latency_unstable` is 1 for those; and what the
    reference model takes on the device at its best, as far as that was known then.
    """
    return {
        "latency_ms": measurement.ratio * reference_ms,
        "latency_ratio": measurement.ratio,
        "latency_unstable": float(measurement.unstable),
        "reference_ms": measurement.reference_ms,
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
        if operator.weight is None or operator.kind not in WEIGHT_AXES or precision.weight is None:
            continue
        if precision.simulated:
            channels = operator.weight.shape[WEIGHT_AXES[operator.kind]]
            per_channel = operator.weight.numel() // channels
            bits = precision.weight.size_bits(channels=channels, per_channel=per_channel)
            held = sum(stored.get(f"{operator.name}.weight{part}", 0) for part in _PARTS)
            found += held - math.ceil(bits / 8)
    return found
