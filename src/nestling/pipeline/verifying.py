"""A candidate's file, as the device's runtime computes it, against PyTorch and against its policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestling.export import ExportMismatch, verify
from nestling.models.graph import Graph
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import Simulated, simulated
from nestling.profile import Device, DeviceError
from nestling.quant import Quantized, QuantPolicy, Range
from nestling.quant.fake import vanish
from nestling.quant.regions import WEIGHT_AXES, absorbing
from nestling.search import EvaluationFailed

if TYPE_CHECKING:
    from nestling.pipeline.candidate import Candidate

EXACT_INSTRUCTIONS = "avx512_vnni"
"""With these, integers of ONNX Runtime's CPU provider are the simulation's to the last bit."""


def verify_candidate(bench: Workbench, candidate: Candidate) -> float:
    """The largest difference of a logit between the candidate's file and PyTorch, as a part of their scale.

    The device opens and runs the file while PyTorch computes the same here.

    Raises:
        EvaluationFailed: the file computes something else, or in other precisions; it is removed.
        DeviceError: there is no such device.
        DevicesGoneError: the device cannot be used any more.
    """
    images = torch.from_numpy(bench.checked_images.array(candidate.resolution))
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


def check_precisions(device: Device, path: Path, quantized: Quantized, policy: QuantPolicy) -> None:
    """Refuses a file of which the runtime computes other layers on integers than the policy says.

    ONNX Runtime may quantize a layer that was left in float, or leave one in float that was quantized; only
    the graph that it has optimized tells. Layers in precisions for research may be computed either way, and
    so may those on integers with a ReLU6 that write fewer than 8 bits for such a layer, which end before the
    ReLU6 does: of those nothing but the result counts. So it is with all of a file where the runtime does
    not tell what it made of it, as one that compiles what it runs.

    Raises:
        ExportMismatch: the layers are listed.
        DeviceError: the runtime refuses the file.
    """
    graph, ranges = quantized.graph, quantized.ranges
    # products with vectors too: their constants are floats, and no runtime may make integers of them
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
    nodes = device.optimized_ops(path)
    if nodes is None:
        return
    on_integers = {node.name for node in nodes if node.on_integers}
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
