"""What a device's runtime makes of every precision, found out by running tiny networks there."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from nestling.models.graph import Graph
from nestling.pipeline.probes import PROBES, WEIGHTED, Probe
from nestling.pipeline.writing import simulated, write_file
from nestling.profile import (
    Device,
    DeviceError,
    Kernel,
    LineLostError,
    MeasurementStore,
    WorkerLostError,
)
from nestling.profile.turns import turn
from nestling.quant import PRECISIONS, Precision, Quantized, QuantPolicy, quantize

TABLE_VERSION = 5
"""Of the probes and of what is concluded from them: a later one finds everything out anew."""
COMPARED_IMAGES = 4
LARGEST_ERROR = 0.03
"""Of a tiny network's outputs, as a fraction of the largest: a few steps of 8 bits, which ties may cost."""
TIMED_SECONDS = 0.3
TRIES = 3
"""A worker may be lost for reasons of its machine: a file that costs so many in a row is looked into."""

Status = Literal["executed", "simulated", "untold", "refused"]
T = TypeVar("T")

_NARROW = {"float32": {"int8", "uint8", "int4", "uint4"}, "float16": {"float16"}, "bfloat16": {"bfloat16"}}
"""What a kernel reads that computes in a precision, by the type of the precision's floats."""
_CONVERTING_KERNELS = {
    "QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Flatten", "ReorderInput",
    "ReorderOutput", "Reorder",
}  # fmt: skip
"""Kernels that compute nothing: they convert or move numbers."""
_CONVERTED = (".quantized", ".dequantized", ".bfloat16", ".float16")
"""What the file appends to the name of a tensor that it converts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a device makes of one kind of operator in one precision.

    Attributes:
        precision: its name.
        kind: the operator, a key of `PROBES`.
        status: `executed`: on integers or halves, or from weights of few bits; `simulated`: it runs, but
            computes in 32-bit floats, or no runtime is asked, as of precisions for research; `untold`: it
            runs, compiled by the runtime, which does not tell in what; `refused`.
        why: the kernels that ran, or the error.
        error: the largest difference from PyTorch's simulation, as a fraction of the largest output; None
            where nothing ran.
        speedup: the time of a layer of usual size in 32-bit floats, divided by its time in this precision;
            None where it was not timed.
        unstable: whether the machine was too restless for `speedup`.
        size: the bytes of that layer's file, as a fraction of those in 32-bit floats.
        lost: whether it is refused because workers were lost, not because the runtime said so.
    """

    precision: str
    kind: str
    status: Status
    why: str
    error: float | None = None
    speedup: float | None = None
    unstable: bool = False
    size: float | None = None
    lost: bool = False

    @property
    def right(self) -> bool:
        """Whether the runtime computes what the simulation computes."""
        return self.status != "refused" and (self.error is None or self.error <= LARGEST_ERROR)


def probe(
    device: Device,
    precisions: Iterable[str] = tuple(PRECISIONS),
    *,
    kinds: Collection[str] = tuple(PROBES),
    timed: bool = False,
    store: MeasurementStore | None = None,
    on_found: Callable[[Finding], None] = lambda _: None,
) -> tuple[Finding, ...]:
    """What `device` makes of every one of `precisions`, for each of `kinds` that the precision changes.

    A file on which a worker is lost is tried again. One that costs `TRIES` workers, where the same in 32-bit
    floats then costs none, is refused; that is not kept.

    Args:
        device: where the tiny networks are run.
        precisions: names; `fp32`, with which the others are compared, is passed over.
        kinds: of operators.
        timed: also time layers of usual size beside the same in 32-bit floats; up to a second each.
        store: where findings are kept; one that is there, for this device and runtime, is not made again.
        on_found: told each finding as it is made.

    Raises:
        KeyError: an unknown precision or kind.
        DeviceError: the device cannot be had, runs nothing in 32-bit floats, or the line to it was lost.
    """
    _ = device.fingerprint  # a device that is not there refuses nothing
    findings = []
    for precision in (PRECISIONS[name] for name in precisions):
        if _is_plain(precision):
            continue
        for kind in kinds:
            found = _kept(device, precision, PROBES[kind], timed=timed, store=store)
            if found is not None:
                findings.append(found)
                on_found(found)
    return tuple(findings)


def table_facts(
    device: Device, findings: Sequence[Finding], *, precisions: Sequence[str] = tuple(PRECISIONS)
) -> dict[str, Any]:
    """The table in the words of JSON: the device, what it can use for layers of any kind, every finding.

    Args:
        device: that was tried.
        findings: about it.
        precisions: names of those that were tried.
    """
    kept, dropped = usable(precisions, findings)
    return {
        "device": device.name,
        "fingerprint": asdict(device.fingerprint),
        "table_version": TABLE_VERSION,
        "usable": list(kept),
        "dropped": dropped,
        "findings": [{**asdict(found), "right": found.right} for found in findings],
    }


def usable(
    precisions: Sequence[str],
    findings: Iterable[Finding],
    *,
    kinds: Collection[str] = WEIGHTED,
    research: bool = False,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those of `precisions` that a device runs as they say, in their order; the others, with the reason.

    A precision stays where no kind of layer is refused or computed wrongly, and where it is executed for
    some kind, or may be, or else shrinks the file, as weights of few bits do.

    Args:
        precisions: names, such as a choice's values.
        findings: what was found out about the device.
        kinds: of the layers that the choice governs, keys of `PROBES`.
        research: keep the precisions that no runtime computes.
    """
    kept, dropped = [], {}
    told = list(findings)
    for name in precisions:
        here = [found for found in told if found.precision == name and found.kind in kinds]
        reason = _reason(PRECISIONS[name], here, research=research)
        if reason is None:
            kept.append(name)
        else:
            dropped[name] = reason
    return tuple(kept), dropped


def _reason(precision: Precision, findings: Sequence[Finding], *, research: bool) -> str | None:
    """Why a device cannot use `precision`, or None."""
    if precision.simulated:
        return None if research else "it is for research: no runtime computes it, so it has no latency"
    for found in findings:
        if found.status == "refused":
            return f"{found.kind} is refused ({found.why})"
        if not found.right:
            return f"{found.kind} computes something else than its simulation ({found.error:.1%} off)"
    executed = any(found.status in ("executed", "untold") for found in findings)
    if not findings or _is_plain(precision) or executed:
        return None
    if precision.weight is not None and precision.activation is None:
        return None  # its file is smaller, though it computes in floats
    return f"{', '.join(found.kind for found in findings)} would be computed in 32-bit floats here"


def _kept(
    device: Device, precision: Precision, probe: Probe, *, timed: bool, store: MeasurementStore | None
) -> Finding | None:
    """The finding from `store`, or else a new one; None where the precision does not change the operator."""
    if store is None:
        return _find(device, precision, probe, timed=timed)
    spelled = hashlib.sha256(repr(precision).encode()).hexdigest()[:12]
    name = f"precision {TABLE_VERSION} {precision.name} {spelled} {probe.kind}{' timed' if timed else ''}"
    known = store.recall(name, fingerprint=device.fingerprint)
    if known is not None:
        content = json.loads(known)
        return None if content is None else Finding(**content)
    found = _find(device, precision, probe, timed=timed)
    if found is None or not (found.unstable or found.lost):
        content = None if found is None else asdict(found)
        store.remember(name, json.dumps(content), fingerprint=device.fingerprint)
    return found


def _find(device: Device, precision: Precision, probe: Probe, *, timed: bool) -> Finding | None:
    if precision.simulated:
        return Finding(precision.name, probe.kind, "simulated", "for research: no runtime computes it")
    graph = probe.graph(timed=False)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / f"{precision.name}.onnx", Path(folder) / "fp32.onnx"
        images = probe.images(COMPARED_IMAGES, timed=False)
        try:
            quantized = _write(device, graph, precision, probe, path, timed=False)
            _write(device, graph, PRECISIONS["fp32"], probe, plain, timed=False)
            if path.read_bytes() == plain.read_bytes():
                return None
            kernels, got = _insistently(lambda: (device.kernels(path), device.predict(path, images.numpy())))
        except LineLostError:
            raise
        except WorkerLostError as error:
            device.predict(plain, images.numpy())  # where this fails as well, the device is to blame
            return Finding(precision.name, probe.kind, "refused", _losses(error, path), lost=True)
        except (DeviceError, ValueError) as error:
            return Finding(precision.name, probe.kind, "refused", _one_line(error, path))
        expected = simulated(quantized, images).logits.numpy()
        error_here = float(np.abs(got - expected).max() / np.abs(expected).max())
        status, why = _judge(kernels, graph, precision, probe)
        if status == "simulated" and device.optimized_ops(path) is None:
            status = "untold"
            why = f"compiled by {', '.join(dict.fromkeys(kernel.provider for kernel in kernels))}"
        found = Finding(precision.name, probe.kind, status, why, error=error_here)
        return _timed(device, found, precision, probe, folder=Path(folder)) if timed else found


def _timed(device: Device, found: Finding, precision: Precision, probe: Probe, *, folder: Path) -> Finding:
    """`found` with how a layer of usual size compares in time and bytes with the same in 32-bit floats."""
    graph = probe.graph(timed=True)
    path, plain = folder / "large.onnx", folder / "large_fp32.onnx"
    try:
        _write(device, graph, precision, probe, path, timed=True)
        _write(device, graph, PRECISIONS["fp32"], probe, plain, timed=True)
        with turn(device.name):
            measurement = _insistently(lambda: device.compare(path, plain, seconds=TIMED_SECONDS))
    except LineLostError:
        raise
    except WorkerLostError as error:
        with turn(device.name):
            device.compare(plain, plain, seconds=TIMED_SECONDS)
        return replace(found, status="refused", why=_losses(error, path), lost=True)
    except (DeviceError, ValueError) as error:
        return replace(found, status="refused", why=_one_line(error, path))
    return replace(
        found,
        speedup=1 / measurement.ratio,
        unstable=measurement.unstable,
        size=path.stat().st_size / plain.stat().st_size if probe.weighted else None,
    )


def _insistently(ask: Callable[[], T]) -> T:
    """What `ask` gives; asked again where a worker is lost, up to `TRIES` times.

    Raises:
        WorkerLostError: the last one was lost, too; or the line to it, which is not asked again.
        DeviceError, ValueError: as `ask` does.
    """
    for _ in range(TRIES - 1):
        try:
            return ask()
        except LineLostError:
            raise
        except WorkerLostError:
            continue
    return ask()


def _write(
    device: Device, graph: Graph, precision: Precision, probe: Probe, path: Path, *, timed: bool
) -> Quantized:
    images = probe.images(1 if timed else COMPARED_IMAGES, timed=timed)
    policy = QuantPolicy((("", precision.name),))
    saturates = device.fingerprint.int8_saturates
    quantized = quantize(graph, policy, [images], reduce_range=saturates)
    write_file(quantized, path)
    return quantized


def _judge(kernels: Sequence[Kernel], graph: Graph, precision: Precision, probe: Probe) -> tuple[Status, str]:
    """Whether the kernels that computed the probe's operator read narrow numbers; and which they were."""
    subjects = probe.subjects(graph)
    others = {operator.name for operator in graph.operators} - subjects
    computing = [kernel for kernel in kernels if not _carries(kernel)]
    # Fused, an operator bears its neighbour's name; taken apart, none.
    own = [kernel for kernel in computing if kernel.name not in others] or computing
    narrow = _NARROW[precision.floats]
    types = [next((kind for kind in kernel.reads if kind in narrow), "floats") for kernel in own]
    told = ", ".join(dict.fromkeys(f"{kernel.op} of {kind}" for kernel, kind in zip(own, types, strict=True)))
    executed = bool(own) and all(narrow & set(kernel.reads) for kernel in own)
    return "executed" if executed else "simulated", told


def _carries(kernel: Kernel) -> bool:
    """Whether it computes nothing; OpenVINO runs the file's roundings and casts as a `Subgraph` each."""
    return kernel.op in _CONVERTING_KERNELS or (kernel.op == "Subgraph" and kernel.name.endswith(_CONVERTED))


def _is_plain(precision: Precision) -> bool:
    return precision.weight is None and precision.activation is None and precision.floats == "float32"


def _losses(last: WorkerLostError, path: Path) -> str:
    return f"{TRIES} workers were lost on it; the last one: {_one_line(last, path)}"


def _one_line(error: Exception, path: Path) -> str:
    """An error's text, without the name of the file that is gone when it is read."""
    return " ".join(str(error).split()).replace(f", {path}", "")
