"""The worker: the program that loads and times models, beside the search or on a board.

One file that needs only Python, NumPy and a runtime: run it as a file or pass its source to `python -c`.
It reads requests from stdin and answers each on stdout, as frames: the lengths of a JSON object and of a blob
(two big-endian 64-bit numbers), the object, the blob. The verbs are the methods that `Worker.verbs` lists.

ONNX Runtime is built in. The source of a module for any other runtime comes with `hello`, as its blob.

Every request carries `limit_seconds`: a worker that is still busy two seconds past it ends itself, so that a
hung runtime does not outlive a search that was killed or a line that was cut.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

LENGTHS = struct.Struct(">QQ")
LONGEST_JSON = 64 << 20
LONGEST_BLOB = 8 << 30
GRACE_SECONDS = 2.0
TICKS = os.sysconf("SC_CLK_TCK") if sys.platform != "win32" else 100
"""A second of a core, as the system counts its work."""

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "dml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "cann": "CANNExecutionProvider",
    "acl": "ACLExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "azure": "AzureExecutionProvider",
}
"""The execution provider of ONNX Runtime that an address names after `ort:`."""
PACKAGES = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-ep-openvino",
    "qnn": "onnxruntime-qnn",
    "dml": "onnxruntime-directml",
    "azure": "onnxruntime",
}
"""What pip installs for it. The others come with builds for their system, or are built from source."""
HELPERS = {PROVIDERS[target]: [PROVIDERS["cuda"]] for target in ("tensorrt", "nvtensorrtrtx")}
"""What runs the nodes that a provider cannot, ahead of the CPU, where anything else may."""
PLUGINS = {"openvino": "onnxruntime_ep_openvino"}
"""Modules that bring a provider to a runtime that was built without it: they say where its library is."""
INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
INPUT_TYPES |= {f"tensor({kind})": kind for kind in ("uint8", "int8", "int32", "int64", "bool")}
FED = (*INPUT_TYPES.values(), "int16", "uint16", "uint32", "uint64")
"""NumPy's types that inputs are made up in."""

PROFILED_RUNS, PROFILED_SECONDS = 50, 2.0
"""The most runs over which nodes are timed, and the time after which no further one begins."""

WARM_UP_LEAST, WARM_UP_MOST = 3, 50
"""Pairs of calls before timing begins."""
PRIMING_CALLS, PRIMING_SECONDS = 8, 0.010
"""Untimed calls ahead of a timed one: at most so many, none begun after so long."""
UNPRIMED_SECONDS = 0.100
"""None at all ahead of a call that took longer the last time: what it finds in the caches is little to it."""
LEAST_PAIRS, TRUSTED_PAIRS, MOST_PAIRS = 10, 30, 2000
"""Pairs timed whatever the budget; before a tight interval is believed; at most."""
INTERRUPTED = 0.02
"""A call that was kept waiting for more than this part of its time was interrupted."""
SLOWED = 1.15
"""A device whose reference model takes more than so many times its best time is slowed by others.

On two threads of a core, one of them kept busy, it took 1.5 times as long, and other networks 1.25 to 1.5.
"""
PATIENCE = 3
"""How many times the budget timing may last, in search of moments in which the device is not slowed."""


class RefusalError(Exception):
    """A request that cannot be carried out; the text is the answer."""


class UntoldError(RefusalError):
    """A runtime does not tell what became of a model, which it may run all the same."""


# Statistics: here, not in measurement.py, because the worker stops by the very interval that is reported.


@cache
def interval_ranks(count: int) -> tuple[int, int]:
    """Zero-based ranks of the order statistics that hold the median of `count` samples with 95 % confidence.

    Distribution-free: the number of samples below the median is binomial. The whole range where `count` < 6.
    """
    term, below, rank = 1, 0, 0
    while rank <= count // 2:
        below += term
        if below * 40 > 2**count:
            break
        term = term * (count - rank) // (rank + 1)
        rank += 1
    low = max(rank - 1, 0)
    return low, count - 1 - low


def median_interval(samples: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """(low, median, high): the median of `samples` inside the 95 % interval of their population's median."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    low, high = interval_ranks(len(ordered))
    return float(ordered[low]), float(np.median(ordered)), float(ordered[high])


# Timing.


@dataclass
class Timed:
    """Nanoseconds of a candidate and of a reference; the i-th of each are neighbours in time."""

    candidate: list[int]
    reference: list[int]
    left_out: int = 0
    """Pairs that were interrupted, and are not among them."""
    interrupted: int = 0
    """Pairs among them that were interrupted, kept because too few were not."""
    slowed: int = 0
    """Pairs, not interrupted, from when others slowed the device, and that are not among them."""
    gauged: float = 0.0
    """The median nanoseconds, while these were timed, of what tells whether the device is slowed."""


@dataclass
class Pair:
    """A call of each, and what was seen around them."""

    candidate: int
    reference: int
    gauged: int
    interrupted: bool
    slowed: bool
    """Whether the device was slowed just before it or just after it."""


def interleave(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    *,
    seconds: float,
    tolerance: float,
    limit_seconds: float = float("inf"),
    gauge: Callable[[], object] | None = None,
    best: float = float("inf"),
    clock: Callable[[], int] = time.perf_counter_ns,
    timer: Callable[[Callable[[], object]], int] | None = None,
    waited: Callable[[], int] = lambda: 0,
) -> Timed:
    """The times of `candidate` and of `reference`, called in turn.

    Which of the two goes first alternates. Ahead of each timed call the same model runs a few times untimed:
    without that the other model's leavings in the caches made a 0.26 ms network look 2.6 times slower and a
    1.8 ms one 1.2 times slower than it is by itself. A pair of which one call was interrupted by other
    programs says nothing of the models and is left out. Ends when half the 95 % interval of the median ratio
    is within `tolerance` of it, or when `seconds` have passed since the warm-up and there are ten pairs; with
    fewer once half of `limit_seconds` is gone.

    Others who work on the same processor slow some networks more than others, for milliseconds or minutes. So
    where the `best` time of a gauge is known, pairs count from when the gauge took about that, just before
    the pair and just after it, in calls that are in no ratio: choosing by those that are would raise it. For
    such moments timing goes on, up to `PATIENCE` times `seconds`, and looks at the gauge alone while it is
    slow; without a pause, as idle processors lower their clocks. Where they stay too few, all pairs count.

    Args:
        candidate, reference: what is timed.
        seconds: the longest that timing may take on a device that is not slowed.
        tolerance: a part of the ratio.
        limit_seconds: after which the answer would come too late.
        gauge: what tells whether the device is slowed; the reference itself where it is None.
        best: the nanoseconds of the gauge on this device at its best.
        clock: nanoseconds.
        timer: runs a call and gives its nanoseconds; by `clock` where it is None.
        waited: nanoseconds that this process was ready to run and was not let run, counted from any moment.
    """
    if timer is None:

        def timer(call: Callable[[], object]) -> int:
            begun = clock()
            call()
            return clock() - begun

    def look() -> int:
        _prime(reference if gauge is None else gauge, clock)
        return timer(reference if gauge is None else gauge)

    half_time = clock() + limit_seconds * 5e8
    last = _warm_up(candidate, reference, seconds=seconds / 4, clock=clock)
    begun, pairs = clock(), list[Pair]()
    gauging = best < float("inf")
    usable, fast, check, first = 0, 0, TRUSTED_PAIRS, 0
    slow = gauging and look() > SLOWED * best
    while len(pairs) < MOST_PAIRS:
        if len(pairs) >= TRUSTED_PAIRS:
            while slow and clock() < min(begun + PATIENCE * seconds * 1e9, half_time):
                slow = look() > SLOWED * best
        times, interrupted = [0, 0], False
        for turn in (first, 1 - first):
            call = (candidate, reference)[turn]
            if last[turn] <= UNPRIMED_SECONDS * 1e9:
                _prime(call, clock)
            before = waited()
            last[turn] = times[turn] = timer(call)
            interrupted |= waited() - before > INTERRUPTED * times[turn]
        first = 1 - first
        gauged = look() if gauging else times[1]
        slow, slow_before = gauged > SLOWED * best, slow
        slowed = slow or slow_before
        pairs.append(Pair(times[0], times[1], gauged, interrupted, slowed))
        fast += not slowed
        usable += not (slowed or interrupted)
        # on a device that others slow, the budget is for the moments in which they do not
        patient = 1 if fast >= min(TRUSTED_PAIRS, len(pairs) / 2) else PATIENCE
        now = clock()
        if now >= half_time or (len(pairs) >= LEAST_PAIRS and now >= begun + patient * seconds * 1e9):
            break
        if usable >= check and not (interrupted or slowed):
            good = [pair for pair in pairs if not (pair.interrupted or pair.slowed)]
            low, middle, high = median_interval([pair.candidate / pair.reference for pair in good])
            if high - low <= 2 * tolerance * middle:
                break
            # Looking seldom keeps the chance small that a lucky moment ends the run.
            check = usable + max(usable // 5, 1)
    return _chosen(pairs)


def _chosen(pairs: Sequence[Pair]) -> Timed:
    """Those of the pairs that say most of the models: not slowed, or not interrupted, or all of them."""
    clean = [pair for pair in pairs if not pair.interrupted]
    quiet = [pair for pair in clean if not pair.slowed]
    chosen = quiet if len(quiet) >= LEAST_PAIRS else clean if len(clean) >= LEAST_PAIRS else pairs
    return Timed(
        [pair.candidate for pair in chosen],
        [pair.reference for pair in chosen],
        left_out=0 if chosen is pairs else len(pairs) - len(clean),
        interrupted=len(pairs) - len(clean) if chosen is pairs else 0,
        slowed=len(clean) - len(quiet) if chosen is quiet else 0,
        gauged=float(np.median([pair.gauged for pair in chosen])),
    )


def _warm_up(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    *,
    seconds: float,
    clock: Callable[[], int],
) -> list[int]:
    """Calls both until neither has become over 2 % faster in three pairs, or `seconds` have passed.

    Returns:
        The nanoseconds of the last call of each.
    """
    last = [0, 0]
    end, best, patience = clock() + int(seconds * 1e9), [float("inf")] * 2, WARM_UP_LEAST
    for _ in range(WARM_UP_MOST):
        patience -= 1
        for index, call in enumerate((candidate, reference)):
            begun = clock()
            call()
            taken = last[index] = clock() - begun
            if taken < 0.98 * best[index]:
                best[index], patience = taken, WARM_UP_LEAST
        if patience <= 0 or clock() >= end:
            break
    return last


def _prime(call: Callable[[], object], clock: Callable[[], int]) -> None:
    end = clock() + int(PRIMING_SECONDS * 1e9)
    for _ in range(PRIMING_CALLS):
        call()
        if clock() >= end:
            return


# Protobuf, read far enough to see a model's nodes and tensors without the `onnx` package.

_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""Field number -> kind of message, for the messages of onnx.proto that may hold a node or a tensor."""
_REPEATED = {("node", 1), ("node", 2), ("tensor", 14)}
"""Fields of which every value is wanted: what a node reads and writes, and where a tensor lies.

Of the last, protobuf takes the last value that it knows, and knows fewer than may be written.
"""
_STRINGS = {("node", 1), ("node", 2), ("node", 3), ("node", 4), ("node", 7), ("tensor", 8)}
"""Fields that are read as text. Written as a number, such a one would be taken for a count of bytes."""
_LONGEST_KEY, _LONGEST_NUMBER = 5, 10
"""Bytes of the longest key of a field (or length of one), and of the longest number, that protobuf takes."""


def messages(model: bytes) -> Iterator[tuple[str, dict[int, Any]]]:
    """Every message of `model` that may hold a node or a tensor: its kind, and the last value of each field.

    Of what a node reads and writes and of where a tensor lies, a list of all values.

    Raises:
        RefusalError: `model` is not protobuf, or is such that protobuf might read something else in it: a
            message or a text in another form than that of bytes, which protobuf would pass over.
    """
    waiting = [("model", memoryview(model))]
    while waiting:
        kind, content = waiting.pop()
        held: dict[int, Any] = {}
        inside = _MESSAGES[kind]
        for number, wire, value in _fields(content):
            if wire != 2 and (number in inside or (kind, number) in _STRINGS):
                raise RefusalError(
                    f"not an ONNX model: field {number} of a {kind} has wire type {wire}, not 2"
                )
            if (kind, number) in _REPEATED:
                held.setdefault(number, []).append(value)
            else:
                held[number] = value
            if number in inside:
                waiting.append((inside[number], value))
        yield kind, held


def _fields(content: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field: a number for wire type 0, bytes for the others."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position, longest=_LONGEST_KEY)
        number, wire = key >> 3, key & 7
        # protobuf cuts a longer key to 32 bits: another field than this one, with the same bytes
        if not 0 < number < 1 << 29:
            raise RefusalError(f"not an ONNX model: field {number}")
        value: int | memoryview
        if wire == 0:
            value, position = _varint(content, position, longest=_LONGEST_NUMBER)
        elif wire in (1, 2, 5):
            if wire == 2:
                length, position = _varint(content, position, longest=_LONGEST_KEY)
            else:
                length = 8 if wire == 1 else 4
            value = content[position : position + length]
            if len(value) < length:
                raise RefusalError("not an ONNX model: it ends inside a field")
            position += length
        else:
            raise RefusalError(f"not an ONNX model: wire type {wire}")
        yield number, wire, value


def _varint(content: memoryview, position: int, *, longest: int) -> tuple[int, int]:
    if position < len(content) and content[position] < 0x80:  # nearly all: a model has ten thousand
        return content[position], position + 1
    number = 0
    for shift in range(0, 7 * longest, 7):
        if position >= len(content):
            raise RefusalError("not an ONNX model: it ends inside a number")
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise RefusalError(f"not an ONNX model: a number of more than {longest} bytes")


def optimized_nodes(model: bytes) -> list[dict[str, Any]]:
    """Name, operator, reads and writes of every node of `model`, in order, those of subgraphs last."""
    nodes = []
    for kind, held in messages(model):
        if kind == "node":
            name, operator, domain = (bytes(held.get(n, b"")).decode() for n in (3, 4, 7))
            reads, writes = ([bytes(tensor).decode() for tensor in held.get(n, ())] for n in (1, 2))
            operator = f"{domain}.{operator}" if domain else operator
            nodes.append({"name": name, "op": operator, "reads": reads, "writes": writes})
    return nodes[::-1]


def refuse_external_data(model: bytes) -> None:
    """Refuses a model whose tensors lie in other files: reading those would leave what was handed over.

    Raises:
        RefusalError: a tensor is stored elsewhere, or `model` is not protobuf.
    """
    for kind, held in messages(model):
        if kind == "tensor" and (13 in held or any(where != 0 for where in held.get(14, ()))):
            name = bytes(held.get(8, b"")).decode(errors="replace")
            raise RefusalError(
                f"tensor {name!r} is stored outside the file; save the model with its weights inside"
            )


# The machine.


def cpu_model() -> str:
    """What the processor calls itself."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def machine(*, root: Path = Path("/")) -> str:
    """Twelve hexadecimal digits that stay the same on this machine, and differ on others of its kind."""
    try:
        name = (root / "etc/machine-id").read_text().strip()
    except OSError:
        name = ""
    return hashlib.sha256(f"{name} {platform.node()}".encode()).hexdigest()[:12]


def cpu_instructions() -> list[str]:
    """The vector and 8-bit instruction sets that matter to a network's speed, where the system names them."""
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return [word for word in wanted if word in present]
    return []


def pin(threads: int) -> list[int]:
    """The cores that this process is kept to from now on, the idlest `threads`; none where the system cannot.

    The fastest kind of core is taken before slower ones, so that each worker of a machine has the same; one
    hardware thread of a core before its sibling is.

    Raises:
        RefusalError: fewer cores than threads.
    """
    if sys.platform != "linux":
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise RefusalError(
            f"threads={threads}, but this process may use {len(allowed)} cores; ask for at most those"
        )
    before = _ticks()
    time.sleep(0.1)
    after = _ticks()
    busy = {core: after.get(core, (0, 0))[0] - before.get(core, (0, 0))[0] for core in allowed}
    kinds = core_kinds()
    order = sorted(allowed, key=lambda core: (kinds.get(core, 0), _sibling_rank(core), busy[core], -core))
    cores = sorted(order[:threads])
    os.sched_setaffinity(0, cores)
    return cores


CORE_KINDS_APART = 0.9
"""A core is of a slower kind if it has less than this part of what the fastest of the kind before it has."""


def core_kinds(*, root: Path = Path("/")) -> dict[int, int]:
    """The kind of each core, 0 the fastest: big and little ones, where the machine tells of such."""
    cpus = root / "sys/devices/system/cpu"
    speeds: dict[int, float] = {}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        if not speeds:
            found = {int(path.name[3:]): _numbers(path / name) for path in cpus.glob("cpu[0-9]*")}
            speeds = {core: numbers[0] for core, numbers in found.items() if numbers}
    kinds: dict[int, int] = {}
    kind, fastest = 0, 0.0
    for core, speed in sorted(speeds.items(), key=lambda one: -one[1]):
        if not kinds:
            fastest = speed
        elif speed < CORE_KINDS_APART * fastest:
            kind, fastest = kind + 1, speed
        kinds[core] = kind
    return kinds


def cores_used(cores: Sequence[int], *, root: Path = Path("/")) -> str:
    """Which kinds of core these are, such as `, cores of kind 1 of 2`; nothing where all are of one kind."""
    kinds = core_kinds(root=root)
    count = len(set(kinds.values()))
    used = sorted({kinds[core] + 1 for core in cores if core in kinds})
    return f", cores of kind {' and '.join(map(str, used))} of {count}" if count > 1 and used else ""


def _sibling_rank(core: int) -> int:
    listing = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    first = "".join(_lines(listing)).replace("-", ",").split(",")[0].strip()
    return 0 if first in ("", str(core)) else 1


def _ticks(root: Path = Path("/")) -> dict[int, tuple[int, int]]:
    """Ticks that each core has spent at work, and those of them that the hypervisor kept."""
    ticks = {}
    for line in _lines(root / "proc/stat"):
        name, *spent = line.split()
        if name.startswith("cpu") and name != "cpu":
            numbers = [int(word) for word in spent]
            ticks[int(name[3:])] = (sum(numbers[:8]) - sum(numbers[3:5]), sum(numbers[7:8]))
    return ticks


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def readings(cores: Sequence[int], *, root: Path = Path("/")) -> dict[str, float]:
    """What the machine tells of itself now, as far as it does; `cores` are this process's own.

    Counters: `at`, seconds; `waited`, seconds that this process was ready to run and did not; `switches`,
    times that it was made to leave a core; `stolen`, seconds that the hypervisor kept the cores; `others`,
    seconds that the machine's other cores worked; `throttled`, times that the processor slowed itself down;
    `curbed`, times that a control group of this process had used up its share of the processor.
    States: `load`; `celsius`, the hottest sensor; `mhz`, the slowest of the cores.
    """
    told = {"at": time.monotonic()}
    if sys.platform != "win32":
        import resource

        told["switches"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
        told["load"] = os.getloadavg()[0]
    waits = [_numbers(path, 1) for path in root.glob("proc/self/task/*/schedstat")]
    if any(waits):
        told["waited"] = sum(sum(found) for found in waits) / 1e9
    ticks = _ticks(root)
    if ticks:
        told["stolen"] = sum(ticks[core][1] for core in cores if core in ticks) / TICKS
        told["others"] = sum(busy for core, (busy, _) in ticks.items() if core not in cores) / TICKS
    cpus = root / "sys/devices/system/cpu"
    counts = (path for core in cores for path in cpus.glob(f"cpu{core}/thermal_throttle/*_count"))
    slowed = [_numbers(path) for path in counts]
    if any(slowed):
        told["throttled"] = sum(sum(found) for found in slowed)
    held_back = curbed(root=root)
    if held_back is not None:
        told["curbed"] = held_back
    sensors = ("sys/class/thermal/thermal_zone*/temp", "sys/class/hwmon/*/temp*_input")
    heats = [number for pattern in sensors for path in root.glob(pattern) for number in _numbers(path)]
    if heats:
        told["celsius"] = max(heats) / 1e3
    speeds = [n for core in cores for n in _numbers(cpus / f"cpu{core}/cpufreq/scaling_cur_freq")]
    if speeds:
        told["mhz"] = min(speeds) / 1e3
    return told


def curbed(*, root: Path = Path("/")) -> float | None:
    """How often control groups of this process were made to wait for their share; None where none tells."""
    found: list[float] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder != top and top not in folder.parents:
                break
            told = (one.split() for one in _lines(folder / "cpu.stat"))
            found += [float(words[1]) for words in told if words[:1] == ["nr_throttled"]]
    return sum(found) if found else None


class Waits:
    """How long this process's threads were ready to run and were not let run; no time where nobody tells.

    The threads are those that it has when the block begins.
    """

    def __init__(self, folder: Path = Path("/proc/self/task")) -> None:
        self._folder = folder
        self._files: list[int] = []

    def __enter__(self) -> Waits:
        for path in self._folder.glob("*/schedstat"):
            with contextlib.suppress(OSError):
                self._files.append(os.open(path, os.O_RDONLY))
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.pop())

    def nanoseconds(self) -> int:
        """Of all threads together, counted from their beginnings."""
        whole = 0
        for file in self._files:
            with contextlib.suppress(OSError):  # a thread that has ended
                whole += int(os.pread(file, 96, 0).split()[1])
        return whole


def between(before: Mapping[str, float], after: Mapping[str, float], *, cores: int) -> dict[str, float]:
    """What happened between two readings: `waited` and `stolen` as shares of the time of `cores` cores.

    `others` is the number of other cores that were at work, on average.
    """
    seconds = max(after["at"] - before["at"], 1e-9)
    told = {name: after[name] for name in ("load", "celsius", "mhz") if name in after}
    told |= {f"{name}_before": before[name] for name in ("celsius", "mhz") if name in before}
    for name, whole in (("waited", max(cores, 1)), ("stolen", max(cores, 1)), ("others", 1)):
        if name in before and name in after:
            told[name] = max(after[name] - before[name], 0.0) / seconds / whole
    for name in ("switches", "throttled", "curbed"):
        if name in before and name in after:
            told[name] = after[name] - before[name]
    return told


MOST_WATTS, UPDATE_JOULES = 1000.0, 10.0
"""No counter grows faster, but for what one update of it may hold: one that did was set back."""


def nvidia() -> Any:
    """NVIDIA's management library (package `nvidia-ml-py`), ready; None where it or a driver is missing."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def joules(*, root: Path = Path("/"), nvml: Any = None) -> dict[str, tuple[float, float]]:
    """The machine's counters of energy by name, and the joules after which each begins anew: 0 for never.

    They are those of processor packages and their memory, of sensors of boards, and with `nvml` of GPUs. A
    zone within a package's, other than memory, is part of that one's figure and left out; so are `psys`, of
    which packages are a part, and `intel-rapl-mmio`, the same packages once more.
    """
    told: dict[str, tuple[float, float]] = {}
    for number in range(0 if nvml is None else nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError):  # before Volta they do not count
            gpu = nvml.nvmlDeviceGetHandleByIndex(number)
            millijoules = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            told[f"gpu {number}"] = millijoules / 1e3, 0.0
    for folder in root.glob("sys/class/powercap/*:*"):
        name = "".join(_lines(folder / "name")).strip()
        nested = folder.name.count(":") > 1 and name != "dram"
        if nested or name.startswith("psys") or folder.name.startswith("intel-rapl-mmio"):
            continue
        count, most = _numbers(folder / "energy_uj"), _numbers(folder / "max_energy_range_uj")
        if count:
            told[f"{name} {folder.name}"] = count[0] / 1e6, sum(most) / 1e6
    for folder in root.glob("sys/class/hwmon/hwmon*"):
        counts = [_numbers(path) for path in folder.glob("energy*_input")]
        if any(counts):
            name = "".join(_lines(folder / "name")).strip()
            told[f"{name} {folder.name}"] = sum(sum(found) for found in counts) / 1e6, 0.0
    return told


def used_joules(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]], *, seconds: float
) -> dict[str, float]:
    """What each counter grew by in `seconds`, also where it began anew once.

    Those that vanished, were set back, or may have begun anew more than once tell nothing.
    """
    used, most = {}, MOST_WATTS * seconds
    for name, (was, range_joules) in before.items():
        if name not in after or (range_joules and most >= range_joules):
            continue
        grown = after[name][0] - was
        grown += range_joules if grown < 0 else 0.0
        if 0 <= grown <= most + UPDATE_JOULES:
            used[name] = grown
    return used


def forget_peak(*, folder: Path = Path("/proc/self")) -> int | None:
    """Bytes of memory that this process has, of which its peak begins anew; None where that cannot be."""
    try:
        (folder / "clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS", folder=folder)


def _memory(name: str, *, folder: Path = Path("/proc/self")) -> int:
    lines = (line.partition(":") for line in _lines(folder / "status"))
    return next((int(value.split()[0]) << 10 for field, _, value in lines if field == name), 0)


def _numbers(path: Path, position: int = 0) -> list[float]:
    """The number at that place of a file, or none where there is no such file or number."""
    try:
        return [float("".join(_lines(path)).split()[position])]
    except (IndexError, ValueError):
        return []


def volunteer(*, folder: Path = Path("/proc/self")) -> None:
    """Has the system end this process, and not the search beside it, where the machine's memory runs out."""
    with contextlib.suppress(OSError):
        (folder / "oom_score_adj").write_text("1000")


def limit_memory(megabytes: int) -> None:
    """Lets this process have `megabytes` MB of address space; beyond that allocations fail."""
    if sys.platform == "win32":
        raise RefusalError("memory_mb cannot be enforced on Windows; leave it out")
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


# A QLinearConv, 1x1, 4 channels to 1: activations 255 and weights 127, so that two products add up to 64,770,
# more than 16 bits hold. The scale maps the exact sum to 200. A test makes the same model with `onnx`.
SATURATION_PROBE = base64.b64decode(
    "CAg62QEKQAoBeAoDb25lCgR6ZXJvCgZ3ZWlnaHQKA29uZQoGbWlkZGxlCgVzY2FsZQoEemVybxIBeSILUUxpbmVhckNvbnYSBXBy"
    "b2JlKg0QAUIDb25lSgQAAIA/KgsQAkIEemVyb0oBACoYCAEIBAgBCAEQA0IGd2VpZ2h0SgR/f39/Kg0QA0IGbWlkZGxlSgEAKg8Q"
    "AUIFc2NhbGVKBM3sIURaGwoBeBIWChQIAhIQCgIIAQoCCAQKAggCCgIIAmIbCgF5EhYKFAgCEhAKAggBCgIIAQoCCAIKAggCQgQK"
    "ABAN"
)
SATURATION_EXACT = 200


# The runtimes. `main` imports onnxruntime after putting stdout out of native code's reach; nothing imports it
# where this file only lends its frames and statistics.

Feed = Mapping[str, NDArray[Any]]
"""The inputs of one call by name."""


@dataclass(frozen=True)
class Input:
    """An input of a model; `shape` has numbers for fixed sizes, and a name or None for open ones."""

    name: str
    dtype: str
    shape: Sequence[int | str | None]


class Session(Protocol):
    """A model that a runtime has made ready."""

    inputs: Sequence[Input]
    nodes: list[dict[str, Any]] | None
    """What the runtime has made of the model; None where nobody asked for it."""

    def run(self, feed: Feed) -> list[NDArray[Any]]:
        """The outputs for `feed`."""

    def bound(self, feed: Feed) -> Callable[[], object]:
        """Computes the outputs for `feed` whenever it is called, and nothing else: this is what is timed."""


class Runtime(Protocol):
    """What runs models: the seam between the worker and any runtime.

    A module for one holds a class `ForeignRuntime` of this kind, made with `threads`, the address's `options`
    and the exception to raise for `refusal`.
    """

    name: str
    """With its version."""

    def facts(self) -> dict[str, Any]:
        """What it says of itself beyond its name; `int8_saturates` for one."""

    def open(self, model: bytes, *, with_nodes: bool) -> Session:
        """The model, ready to run; with the nodes that are left after the runtime's optimizations.

        Raises:
            UntoldError: it does not tell them.
        """

    def profile(self, model: bytes, feed: Callable[[Session], Feed], *, runs: int) -> list[dict[str, Any]]:
        """The kernels of one run, in order, with the microseconds of each: the median of `runs`."""

    def timer(self) -> Callable[[Callable[[], object]], int] | None:
        """What runs a call and gives its nanoseconds; None where the processor's clock does."""

    def elsewhere(self, kernels: Sequence[Mapping[str, Any]]) -> list[str]:
        """Of `kernels`, the names of those that ran on something else than the address asks for."""

    def spoilt(self, error: Exception) -> bool:
        """Whether it can run nothing any more after `error`, as a GPU's context; this process then ends."""


@dataclass
class OrtSession:
    """A session of ONNX Runtime."""

    native: Any
    inputs: Sequence[Input]
    nodes: list[dict[str, Any]] | None = None

    def run(self, feed: Feed) -> list[NDArray[Any]]:
        """The outputs for `feed`."""
        outputs: list[NDArray[Any]] = self.native.run(None, feed)
        return outputs

    def bound(self, feed: Feed) -> Callable[[], object]:
        """Computes the outputs for `feed` whenever it is called."""
        run = self.native.run
        return lambda: run(None, feed)


SETTINGS = 2
"""Of the options of ONNX Runtime's sessions: what was measured with others is measured anew."""


COMPILED = "Unable to serialize model as it contains compiled nodes"
"""What ONNX Runtime says where an optimized graph is asked for that a provider has compiled."""


class OrtRuntime:
    """ONNX Runtime with one execution provider, `target`; the CPU helps out where it may."""

    def __init__(self, target: str, threads: int, *, allow_fallback: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            needed = PACKAGES.get(target, "onnxruntime")
            raise RefusalError(f"ort:{target} needs the package {needed}; pip install {needed}") from None

        self.threads, self.allow_fallback = threads, allow_fallback
        self.name = f"onnxruntime {onnxruntime.__version__} (settings {SETTINGS})"
        self.provider = PROVIDERS[target]
        self.present: list[str] = onnxruntime.get_available_providers()
        self.plugged: list[Any] = []
        self.compiles = False
        """Whether it was found that the provider compiles what it runs, and cannot write it down."""
        if self.provider in self.present:
            return
        self.plugged = self._plug_in(target)
        if not self.plugged:
            package = PACKAGES.get(target)
            install = f"pip install {package}" if package else "install a build of onnxruntime that has it"
            raise RefusalError(
                f"ort:{target} needs {self.provider}, but {self.name} here has only "
                f"{', '.join(self.present)}; {install}"
            )

    def _plug_in(self, target: str) -> list[Any]:
        """The devices of the provider's plug-in, where one is installed; the CPU's before others."""
        import onnxruntime

        library = plugin_library(target)
        if library is None:
            return []
        onnxruntime.register_execution_provider_library(self.provider, str(library))
        found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == self.provider]
        self.name += f", {PLUGINS[target]} {importlib.metadata.version(PLUGINS[target])}"
        of_cpu = [device for device in found if "CPU" in str(device.device.type)]
        return of_cpu[:1] or found[:1]

    def facts(self) -> dict[str, Any]:
        """The providers present, and whether the CPU's sums of 8-bit products are cut to 16 bits."""
        probe = self._native(SATURATION_PROBE, on_cpu=True)
        product = probe.run(None, {"x": np.full((1, 4, 2, 2), 255, np.uint8)})[0]
        return {"providers": self.present, "int8_saturates": bool((product != SATURATION_EXACT).any())}

    def open(self, model: bytes, *, with_nodes: bool) -> OrtSession:
        """The session of `model`.

        Raises:
            UntoldError: the provider compiles parts of models, which no ONNX file can hold.
        """
        if not with_nodes:
            return self._session(self._native(model))
        if self.compiles:
            raise UntoldError(f"{self.provider} compiles its parts of models")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            try:
                session = self._session(self._native(model, optimized=path))
            except Exception as error:  # the runtime's share no ancestor
                if COMPILED not in str(error):
                    raise
                self.compiles = True  # for minutes, maybe: it is not asked again
                raise UntoldError(f"{self.provider} compiles its parts of models") from None
            session.nodes = optimized_nodes(path.read_bytes())
        return session

    def profile(self, model: bytes, feed: Callable[[Session], Feed], *, runs: int) -> list[dict[str, Any]]:
        """The kernels of one run, as the runtime's own profile tells them."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(self._native(model, profiled=Path(folder) / "profile"))
            done = repeat(session.bound(feed(session)), runs)
            events = json.loads(Path(session.native.end_profiling()).read_text())
        return kernels_of(events, runs=done)

    def timer(self) -> None:
        """The processor's clock: a call returns when its outputs are there."""

    def elsewhere(self, kernels: Sequence[Mapping[str, Any]]) -> list[str]:
        """The kernels that another provider ran."""
        return [kernel["name"] for kernel in kernels if kernel["provider"] != self.provider]

    def spoilt(self, error: Exception) -> bool:
        """Whether CUDA has failed: mostly all that is asked of it later has the same answer.

        cuBLAS or cuDNN may be the first to tell it. They also tell of mistakes of their own, after which the
        context is well; that costs a worker and no more.
        """
        return re.search("(CUDA|CUBLAS|CUDNN) failure", str(error)) is not None

    def _session(self, native: Any) -> OrtSession:
        inputs = []
        for value in native.get_inputs():
            if value.type not in INPUT_TYPES:
                raise RefusalError(
                    f"input {value.name!r} is a {value.type}; {', '.join(INPUT_TYPES)} can be fed"
                )
            inputs.append(Input(value.name, INPUT_TYPES[value.type], value.shape))
        return OrtSession(native, inputs)

    def _native(
        self,
        model: bytes,
        *,
        optimized: Path | None = None,
        profiled: Path | None = None,
        on_cpu: bool = False,
    ) -> Any:
        """An InferenceSession, which carries no types."""
        import onnxruntime

        # SETTINGS names these options in fingerprints: raise it with every change of how a model is run.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        # Otherwise bytes that only look like ONNX's may be taken for the runtime's own format, unread by us.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        # By default the runtime quantizes layers that the policy left in float, next to quantized ones.
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "WeightBiasQuantization"
        )
        # Left off, on x86 it makes floats of signed tensors that several nodes read, as residual ones are.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        # Otherwise the threads of the model that has just run keep spinning on the other model's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if profiled is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profiled)
        cpu = PROVIDERS["cpu"]
        if on_cpu or self.provider == cpu:
            return onnxruntime.InferenceSession(model, options, providers=[cpu])
        # Without the second the runtime would let the CPU run what the provider cannot, and say nothing.
        helpers = [name for name in HELPERS.get(self.provider, ()) if name in self.present]
        providers = [self.provider, *helpers, cpu] if self.allow_fallback else [self.provider]
        if not self.allow_fallback:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            if self.plugged:
                options.add_provider_for_devices(self.plugged, self._plugged_options())
                session = onnxruntime.InferenceSession(model, options)
            else:
                session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:
            if "fallback to CPU EP has been explicitly disabled" not in str(error):
                raise
            raise RefusalError(
                f"{self.provider} cannot run every node of the model; with allow_fallback=1 in the address "
                "the CPU runs the others, and their share is told"
            ) from None
        if session.get_providers()[0] != self.provider:
            raise RefusalError(
                f"asked for {self.provider}, but the session runs on {session.get_providers()[0]}"
            )
        return session

    def _plugged_options(self) -> dict[str, str]:
        """Options of a plug-in without which it would take all cores, and round floats where it may."""
        if self.provider != PROVIDERS["openvino"]:
            return {}
        config = {"CPU": {"INFERENCE_NUM_THREADS": str(self.threads), "INFERENCE_PRECISION_HINT": "f32"}}
        return {"load_config": json.dumps(config)}


def kernels_of(events: Sequence[Mapping[str, Any]], *, runs: int) -> list[dict[str, Any]]:
    """The kernels of one run, out of the events that ONNX Runtime's profile tells of `runs`."""
    taken: dict[tuple[str, str], list[int]] = {}
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            said, name = event.get("args", {}), event["name"].removesuffix("_kernel_time")
            key = (name, said.get("node_index", ""))
            taken.setdefault(key, []).append(event["dur"])
            if key not in kernels:
                reads, writes = (
                    [kind for tensor in said.get(f"{side}_type_shape", ()) for kind in tensor]
                    for side in ("input", "output")
                )
                ran = {"name": name, "op": said.get("op_name", ""), "provider": said.get("provider", "")}
                kernels[key] = {**ran, "reads": reads, "writes": writes}
    # a node of a loop's body is there several times in each run
    return [
        {**kernel, "microseconds": float(np.median(taken[key])) * len(taken[key]) / runs}
        for key, kernel in kernels.items()
    ]


def plugin_library(target: str) -> Path | None:
    """The library of the plug-in that brings the provider `target`, where one is installed."""
    spec = importlib.util.find_spec(PLUGINS[target]) if target in PLUGINS else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    names = (f"libonnxruntime_providers_{target}_plugin.so", f"onnxruntime_providers_{target}_plugin.dll")
    return next((folder / name for name in names if (folder / name).exists()), None)


def foreign_runtime(
    source: bytes, name: str, threads: int, options: Mapping[str, Any], *, refusal: type[Exception]
) -> Runtime:
    """The runtime that the module `source` describes; its classes find themselves in `sys.modules`."""
    module = types.ModuleType(f"nestling_{name}_runtime")
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, f"<{module.__name__}>", "exec"), vars(module))
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise RefusalError(f"{name} needs the package {package}; pip install {package}") from None
    made: Runtime = module.ForeignRuntime(threads, options, refusal=refusal)
    return made


def repeat(call: Callable[[], object], runs: int) -> int:
    """How many times `call` ran: `runs`, or fewer where they would take longer than PROFILED_SECONDS."""
    end = time.monotonic() + PROFILED_SECONDS
    for done in range(1, runs + 1):
        call()
        if time.monotonic() >= end:
            return done
    return runs


def made_up(inputs: Sequence[Input]) -> Feed:
    """Inputs of these shapes, open first sizes taken as 1: always the same numbers.

    Floats are standard normal, bytes spread over 0 to 255, whole numbers 0 or 1 (which most tables have).

    Raises:
        RefusalError: a size that is not the first is open, or the type is none that can be made up.
    """
    rng = np.random.default_rng(0)
    feed: dict[str, NDArray[Any]] = {}
    for given in inputs:
        if any(not isinstance(size, int) for size in given.shape[1:]):
            raise RefusalError(
                f"input {given.name!r} has shape {list(given.shape)}; only its first size may be open: fix "
                "the others, as `python -m onnxruntime.tools.make_dynamic_shape_fixed` does"
            )
        shape = [size if isinstance(size, int) else 1 for size in given.shape]
        if given.dtype not in FED:
            raise RefusalError(f"input {given.name!r} is a {given.dtype}; {', '.join(FED)} can be fed")
        dtype = np.dtype(given.dtype)
        if dtype.kind == "f":
            feed[given.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feed[given.name] = rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    return feed


@dataclass
class Opened:
    """A session, kept for whatever is asked next of the same model: opening one costs most of what is asked.

    `first_seconds` is None until it has been called.
    """

    key: str
    session: Session
    load_seconds: float
    first_seconds: float | None = None
    resident: int | None = None
    """Bytes of memory that the process had before, as long as nothing else was asked since."""
    peak_bytes: int | None = None
    """What it took in memory up to what was asked next; None as long as `resident` tells."""

    def settle_peak(self) -> None:
        """Keeps the peak as it is, ahead of what would raise it on another session's account."""
        if self.resident is not None and self.first_seconds is not None:
            self.peak_bytes = max(_memory("VmHWM") - self.resident, 0)
        self.resident = None


@dataclass(frozen=True)
class Loaded:
    """A model and an input for it, ready to be called."""

    feed: Feed
    run: Callable[[], object]
    opened: Opened


class Worker:
    """What the worker has been told and given: a runtime, models, arrays. Each verb is a method."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        self.cores: list[int] = []
        self.models: dict[str, Loaded] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.last: Opened | None = None
        self.verbs: dict[str, Callable[[Mapping[str, Any], bytearray], tuple[dict[str, Any], bytes]]] = {
            "runtimes": self.runtimes,
            "hello": self.hello,
            "load": self.load,
            "time": self.time,
            "energy": self.energy,
            "hold": self.hold,
            "predict": self.predict,
            "optimized": self.optimized,
            "kernels": self.kernels,
            "drop": self.drop,
            "bye": self.bye,
        }

    def runtimes(self, _: Mapping[str, Any], __: bytearray) -> tuple[dict[str, Any], bytes]:
        """Answers what is installed here: the runtimes with their versions, ONNX Runtime's providers."""
        present, versions = [], {}
        with contextlib.suppress(ImportError):
            import onnxruntime

            present = onnxruntime.get_available_providers()
            present += [PROVIDERS[name] for name in PLUGINS if plugin_library(name)]
            versions["onnxruntime"] = onnxruntime.__version__
        for package in ("openvino", "torch"):
            if importlib.util.find_spec(package) is not None:
                versions[package] = importlib.metadata.version(package)
        # importing torch to ask it would take longer than all else
        nvidia = Path("/dev/nvidiactl").exists()
        return {"versions": versions, "providers": present, "nvidia": nvidia}, b""

    def hello(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Settles `engine`, `runtime`, `threads`, `options` and `memory_mb`; answers what this machine is."""
        engine, target, threads = request.get("engine", "ort"), request["runtime"], request["threads"]
        options: Mapping[str, Any] = request.get("options", {})
        if request.get("memory_mb"):
            limit_memory(request["memory_mb"])
        self.cores = pin(threads)
        if engine == "ort":
            self.runtime = OrtRuntime(target, threads, allow_fallback=bool(options.get("allow_fallback")))
        else:
            described = {**options, "target": target, "instructions": cpu_instructions()}
            self.runtime = foreign_runtime(bytes(blob), engine, threads, described, refusal=RefusalError)
        return {
            "machine": machine(),
            "cpu": cpu_model() + cores_used(self.cores),
            "instructions": cpu_instructions(),
            "cores": os.cpu_count(),
            "pinned": self.cores,
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "runtime": self.runtime.name,
            **self.runtime.facts(),
        }, b""

    def load(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Keeps the model in `blob` as `model`; answers how long loading and the first call took.

        Where the CPU may help out, also the shares of kernels and of their time that it took over.
        """
        model = bytes(blob)
        opened = self._opened(model)
        loaded = self.models[request["model"]] = self._called(opened)
        answer: dict[str, Any] = {
            "load_seconds": opened.load_seconds,
            "first_seconds": opened.first_seconds,
            "inputs": [
                {"name": name, "dtype": str(array.dtype), "shape": array.shape}
                for name, array in loaded.feed.items()
            ],
        }
        if request.get("shares"):
            answer["elsewhere"] = self._elsewhere(model)
        return answer, b""

    def time(self, request: Mapping[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        """Times `model` and `reference` in turn; the blob is int64 nanoseconds, the model's come first.

        With the `best` nanoseconds of a `gauge`, in moments in which that one, a model too, takes about so
        long. Answers what the machine told of itself meanwhile, the bytes of memory that the model took, and
        what the gauge took.
        """
        candidate, reference = self._model(request["model"]), self._model(request["reference"])
        gauge = self._model(request.get("gauge", request["reference"]))
        gc.collect()
        gc.disable()
        before = readings(self.cores)
        try:
            with Waits() as waits:
                timed = interleave(
                    candidate.run,
                    reference.run,
                    seconds=request["seconds"],
                    tolerance=request["tolerance"],
                    limit_seconds=request["limit_seconds"],
                    gauge=None if gauge is reference else gauge.run,
                    best=request.get("best", float("inf")),
                    timer=self._settled().timer(),
                    waited=waits.nanoseconds,
                )
        finally:
            gc.enable()
        told = between(before, readings(self.cores), cores=len(self.cores))
        opened = candidate.opened
        if opened.resident is not None and self.last is opened:
            told["peak_bytes"] = max(_memory("VmHWM") - opened.resident, 0)
        elif opened.peak_bytes is not None:
            told["peak_bytes"] = opened.peak_bytes
        count = len(timed.candidate)
        told |= {"left_out": timed.left_out, "interrupted": timed.interrupted / count}
        told["slow_pairs"] = timed.slowed
        if count < LEAST_PAIRS:
            told["missed"] = LEAST_PAIRS - count
        times = np.array((timed.candidate, timed.reference), dtype="<i8")
        return {"count": count, "conditions": told, "gauged": timed.gauged}, times.tobytes()

    def energy(self, request: Mapping[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        """Runs `model` alone for `seconds`; answers the joules that each counter of the machine grew by."""
        run, timer = self._model(request["model"]).run, self._settled().timer()

        def call() -> None:
            # a timer waits for the end of what a call only begins
            _ = run() if timer is None else timer(run)

        call()
        nvml = nvidia()
        before, begun, calls = joules(nvml=nvml), time.monotonic(), 0
        while before and time.monotonic() < begun + request["seconds"]:
            call()
            calls += 1
        after, seconds = joules(nvml=nvml), time.monotonic() - begun
        used = used_joules(before, after, seconds=seconds)
        return {"calls": calls, "seconds": seconds, "joules": used}, b""

    def hold(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Keeps the array in `blob` under the name `array`."""
        values = np.frombuffer(blob, dtype=request["dtype"]).reshape(request["shape"])
        self.arrays[request["array"]] = values
        return {}, b""

    def predict(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Runs the model in `blob` over the held `array` (N, ...); the blob is its first output, float32."""
        opened = self._opened(bytes(blob))
        loaded, opened.resident = self._called(opened), None
        if len(loaded.feed) != 1:
            raise RefusalError(f"a model with {len(loaded.feed)} inputs cannot be run over images alone")
        [(name, example)] = loaded.feed.items()
        images = self.arrays[request["array"]]
        if example.shape[1:] != images.shape[1:]:
            raise RefusalError(f"input {name!r} takes {example.shape[1:]}, the images are {images.shape[1:]}")
        run, fixed = opened.session.run, isinstance(opened.session.inputs[0].shape[0], int)
        size = len(example) if fixed else 32
        logits = []
        for start in range(0, len(images), size):
            batch = images[start : start + size].astype(example.dtype, copy=False)
            if fixed and len(batch) < size:
                padded = np.zeros((size, *batch.shape[1:]), example.dtype)
                padded[: len(batch)] = batch
                logits.append(run({name: padded})[0][: len(batch)])
            else:
                logits.append(run({name: batch})[0])
        answer = np.concatenate(logits).astype("<f4")
        return {"shape": answer.shape}, answer.tobytes()

    def optimized(self, _: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Answers the nodes that are left of the model in `blob` after the runtime's optimizations.

        None where the runtime does not tell them.
        """
        try:
            return {"nodes": self._opened(bytes(blob), with_nodes=True).session.nodes}, b""
        except UntoldError:
            return {"nodes": None}, b""

    def kernels(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Runs the model in `blob` `runs` times; answers the kernels that ran, with types and times."""
        return {"kernels": self._profile(bytes(blob), min(request.get("runs", 1), PROFILED_RUNS))}, b""

    def drop(self, request: Mapping[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        """Forgets the named `models` and `arrays`; names not known are passed over."""
        for name in request.get("models", ()):
            self.models.pop(name, None)
        for name in request.get("arrays", ()):
            self.arrays.pop(name, None)
        return {}, b""

    def bye(self, _: Mapping[str, Any], __: bytearray) -> tuple[dict[str, Any], bytes]:
        """Answers, then the worker ends."""
        return {}, b""

    def _model(self, name: str) -> Loaded:
        if name not in self.models:
            raise RefusalError(f"no model {name!r} is loaded")
        return self.models[name]

    def _settled(self) -> Runtime:
        if self.runtime is None:
            self.runtime = OrtRuntime("cpu", 1)
        return self.runtime

    def _opened(self, model: bytes, *, with_nodes: bool = False) -> Opened:
        """The session of `model`: the last one opened, where it is the same model's."""
        key = hashlib.sha256(model).hexdigest()
        last = self.last
        if last is not None and last.key == key and not (with_nodes and last.session.nodes is None):
            return last
        self.last = last = None  # or there would be three models in memory
        refuse_external_data(model)
        resident = forget_peak()
        begun = time.perf_counter()
        session = self._settled().open(model, with_nodes=with_nodes)
        self.last = Opened(key, session, time.perf_counter() - begun, resident=resident)
        return self.last

    def _called(self, opened: Opened) -> Loaded:
        """The session with an input, called at least once."""
        feed, timer = made_up(opened.session.inputs), self._settled().timer()
        begun = time.perf_counter()
        loaded = Loaded(feed, opened.session.bound(feed), opened)
        if opened.first_seconds is None:
            # a timer waits for the end of what a call only begins
            _ = loaded.run() if timer is None else timer(loaded.run)
            opened.first_seconds = time.perf_counter() - begun
        return loaded

    def _profile(self, model: bytes, runs: int) -> list[dict[str, Any]]:
        refuse_external_data(model)
        if self.last is not None:  # another session opens now
            self.last.settle_peak()
        return self._settled().profile(model, lambda session: made_up(session.inputs), runs=runs)

    def _elsewhere(self, model: bytes) -> dict[str, float]:
        kernels = self._profile(model, 10)
        names = set(self._settled().elsewhere(kernels))
        moved = [kernel["microseconds"] for kernel in kernels if kernel["name"] in names]
        whole = sum(kernel["microseconds"] for kernel in kernels)
        return {
            "kernels": len(moved) / len(kernels) if kernels else 0.0,
            "time": sum(moved) / whole if whole else 0.0,
        }


# Frames and the loop.


def pack(message: Mapping[str, Any], blob_bytes: int) -> bytes:
    """A frame up to its blob: the lengths and the JSON object `message`."""
    text = json.dumps(message).encode()
    return LENGTHS.pack(len(text), blob_bytes) + text


def _read(stream: BinaryIO, count: int) -> bytearray | None:
    content = bytearray(count)
    view, filled = memoryview(content), 0
    while filled < count:
        got = os.readv(stream.fileno(), [view[filled : filled + (1 << 30)]])
        if got == 0:
            return None
        filled += got
    return content


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], bytearray] | None:
    """The next request and its blob; None where the other side has gone."""
    lengths = _read(stream, LENGTHS.size)
    if lengths is None:
        return None
    json_bytes, blob_bytes = LENGTHS.unpack(lengths)
    if json_bytes > LONGEST_JSON or blob_bytes > LONGEST_BLOB:
        raise SystemExit(f"a frame of {json_bytes} + {blob_bytes} bytes: the requests are out of step")
    text = _read(stream, json_bytes)
    blob = _read(stream, blob_bytes)
    return None if text is None or blob is None else (json.loads(text), blob)


def _alarm(seconds: float) -> None:
    """Has the system end this process in `seconds`, even inside native code; 0 calls it off."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def raised_at(error: Exception) -> str:
    """Where the exception was raised, such as `worker.py, line 12`: its text may say nothing of it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "nowhere"
    return f"{Path(trace.tb_frame.f_code.co_filename).name.strip('<>')}, line {trace.tb_lineno}"


def refusal(error: Exception, expected: tuple[type[Exception], ...]) -> str:
    """What is answered instead of what was asked; of an error that is not `expected`, also where it arose."""
    if isinstance(error, RefusalError):
        return str(error)
    where = "" if isinstance(error, expected) else f" ({raised_at(error)})"
    return f"{type(error).__name__}: {error}{where}"


def main() -> None:
    """Serves requests until the other side says bye or goes away, or an error has spoilt the runtime.

    The answer to that one has `ends`: this process does, and the other side needs another.
    """
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    # What native code prints must not land between frames, nor may it eat a request.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    volunteer()
    # Since 1.29 the runtime writes down what is run and tells its maker, unless forbidden before it loads.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    expected: tuple[type[Exception], ...] = (RuntimeError, ValueError, MemoryError, OSError)
    with contextlib.suppress(ImportError):  # other runtimes do without it
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        # Its exceptions share no ancestor of their own, and their list grows from version to version.
        for kind in vars(native).values():
            if isinstance(kind, type) and issubclass(kind, Exception):
                expected += (kind,)
    worker = Worker()
    while (received := _receive(requests)) is not None:
        request, blob = received
        _alarm(request["limit_seconds"] + GRACE_SECONDS)
        try:
            answer, content = worker.verbs[request["verb"]](request, blob)
        except Exception as error:  # also one that was not foreseen, as of an odd file: the process is sound
            answer, content = {"refused": refusal(error, expected)}, b""
            if worker.runtime is not None and worker.runtime.spoilt(error):
                answer["ends"] = True
        # clearing up after a spoilt runtime may hang
        _alarm(GRACE_SECONDS if "ends" in answer else 0)
        answers.write(pack(answer, len(content)))
        answers.write(content)
        answers.flush()
        if request["verb"] == "bye" or "ends" in answer:
            return


if __name__ == "__main__":
    main()
