"""The worker: the program that loads and times models, beside the search or on a board.

One file that needs only Python, NumPy and onnxruntime: run it as a file or pass its source to `python -c`.
It reads requests from stdin and answers each on stdout, as frames: the lengths of a JSON object and of a blob
(two big-endian 64-bit numbers), the object, the blob. The verbs are the methods that `Worker.verbs` lists.

Every request carries `limit_seconds`: a worker that is still busy two seconds past it ends itself, so that a
hung runtime does not outlive a search that was killed or a line that was cut.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import os
import platform
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

LENGTHS = struct.Struct(">QQ")
LONGEST_JSON = 64 << 20
LONGEST_BLOB = 8 << 30
GRACE_SECONDS = 2.0

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""The execution provider of each runtime that an address may name."""
PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
"""What pip installs for it."""
INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
INPUT_TYPES |= {f"tensor({kind})": kind for kind in ("uint8", "int8", "int32", "int64", "bool")}

WARM_UP_LEAST, WARM_UP_MOST = 3, 50
"""Pairs of calls before timing begins."""
PRIMING_CALLS, PRIMING_SECONDS = 8, 0.010
"""Untimed calls ahead of a timed one: at most so many, none begun after so long."""
LEAST_PAIRS, TRUSTED_PAIRS, MOST_PAIRS = 10, 30, 2000
"""Pairs timed whatever the budget; before a tight interval is believed; at most."""


class RefusalError(Exception):
    """A request that cannot be carried out; the text is the answer."""


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


def interleave(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    *,
    seconds: float,
    tolerance: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> tuple[list[int], list[int]]:
    """Nanoseconds of `candidate` and of `reference`, called in turn; the i-th of each are neighbours in time.

    Which of the two goes first alternates. Ahead of each timed call the same model runs a few times untimed:
    without that the other model's leavings in the caches made a 0.26 ms network look 2.6 times slower and a
    1.8 ms one 1.2 times slower than it is by itself. Ends when half the 95 % interval of the median ratio is
    within `tolerance` of it, or when `seconds` have passed since the warm-up.
    """
    _warm_up(candidate, reference, seconds=seconds / 4, clock=clock)
    times: tuple[list[int], list[int]] = ([], [])
    turns = ((candidate, times[0]), (reference, times[1]))
    end = clock() + int(seconds * 1e9)
    check = TRUSTED_PAIRS
    while len(times[0]) < MOST_PAIRS:
        for call, taken in turns:
            _prime(call, clock)
            begun = clock()
            call()
            taken.append(clock() - begun)
        turns = (turns[1], turns[0])
        count = len(times[0])
        if count >= LEAST_PAIRS and clock() >= end:
            break
        if count >= check:
            low, middle, high = median_interval(np.array(times[0]) / np.array(times[1]))
            if high - low <= 2 * tolerance * middle:
                break
            # Looking seldom keeps the chance small that a lucky moment ends the run.
            check = count + max(count // 5, 1)
    return times


def _warm_up(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    *,
    seconds: float,
    clock: Callable[[], int],
) -> None:
    """Calls both until neither has become over 2 % faster in three pairs, or `seconds` have passed."""
    end, best, patience = clock() + int(seconds * 1e9), [float("inf")] * 2, WARM_UP_LEAST
    for _ in range(WARM_UP_MOST):
        patience -= 1
        for index, call in enumerate((candidate, reference)):
            begun = clock()
            call()
            taken = clock() - begun
            if taken < 0.98 * best[index]:
                best[index], patience = taken, WARM_UP_LEAST
        if patience <= 0 or clock() >= end:
            return


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
_REPEATED = {("node", 1), ("node", 2)}
"""Fields of which every value is wanted: what a node reads and writes."""


def messages(model: bytes) -> Iterator[tuple[str, dict[int, Any]]]:
    """Every message of `model` that may hold a node or a tensor: its kind, and the last value of each field.

    Of what a node reads and writes, a list of all values.

    Raises:
        RefusalError: `model` is not protobuf.
    """
    waiting = [("model", memoryview(model))]
    while waiting:
        kind, content = waiting.pop()
        held: dict[int, Any] = {}
        inside = _MESSAGES[kind]
        for number, value in _fields(content):
            if (kind, number) in _REPEATED:
                held.setdefault(number, []).append(value)
            else:
                held[number] = value
            if number in inside and isinstance(value, memoryview):
                waiting.append((inside[number], value))
        yield kind, held


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        wire = key & 7
        value: int | memoryview
        if wire == 0:
            value, position = _varint(content, position)
        elif wire in (1, 2, 5):
            if wire == 2:
                length, position = _varint(content, position)
            else:
                length = 8 if wire == 1 else 4
            value = content[position : position + length]
            if len(value) < length:
                raise RefusalError("not an ONNX model: it ends inside a field")
            position += length
        else:
            raise RefusalError(f"not an ONNX model: wire type {wire}")
        yield key >> 3, value


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            raise RefusalError("not an ONNX model: it ends inside a number")
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise RefusalError("not an ONNX model: a number without an end")


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
        if kind == "tensor" and (13 in held or held.get(14) == 1):
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

    One hardware thread of a core is taken before its sibling is.

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
    before = _busy()
    time.sleep(0.1)
    after = _busy()
    busy = {core: after.get(core, 0) - before.get(core, 0) for core in allowed}
    order = sorted(allowed, key=lambda core: (_sibling_rank(core), busy[core], -core))
    cores = sorted(order[:threads])
    os.sched_setaffinity(0, cores)
    return cores


def _sibling_rank(core: int) -> int:
    listing = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    first = "".join(_lines(listing)).replace("-", ",").split(",")[0].strip()
    return 0 if first in ("", str(core)) else 1


def _busy() -> dict[int, int]:
    """Ticks that each core has spent at work."""
    ticks = {}
    for line in _lines(Path("/proc/stat")):
        name, *spent = line.split()
        if name.startswith("cpu") and name != "cpu":
            numbers = [int(word) for word in spent]
            ticks[int(name[3:])] = sum(numbers[:8]) - sum(numbers[3:5])
    return ticks


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


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


# The runtime. `main` imports onnxruntime after putting stdout out of native code's reach; nothing imports it
# where this file only lends its frames and statistics.

Session = Any
"""onnxruntime.InferenceSession, which carries no types."""


@dataclass(frozen=True)
class Loaded:
    """A session and an input for it, ready to be called."""

    session: Session
    feed: Mapping[str, NDArray[Any]]

    def run(self) -> object:
        """The outputs."""
        return self.session.run(None, self.feed)


@dataclass
class Opened:
    """A session, kept for whatever is asked next of the same model: opening one costs most of what is asked.

    `first_seconds` is None until it has been called; `nodes` is None where nobody asked for them.
    """

    key: str
    session: Session
    load_seconds: float
    first_seconds: float | None = None
    nodes: list[dict[str, Any]] | None = None


class Worker:
    """What the worker has been told and given: a runtime, models, arrays. Each verb is a method."""

    def __init__(self) -> None:
        self.runtime, self.threads = "cpu", 1
        self.models: dict[str, Loaded] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.last: Opened | None = None
        self.verbs: dict[str, Callable[[Mapping[str, Any], bytearray], tuple[dict[str, Any], bytes]]] = {
            "hello": self.hello,
            "load": self.load,
            "time": self.time,
            "hold": self.hold,
            "predict": self.predict,
            "optimized": self.optimized,
            "kernels": self.kernels,
            "drop": self.drop,
            "bye": self.bye,
        }

    def hello(self, request: Mapping[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        """Settles `runtime`, `threads` and `memory_mb`; answers what this machine is."""
        import onnxruntime

        self.runtime, self.threads = request["runtime"], request["threads"]
        provider, present = PROVIDERS[self.runtime], onnxruntime.get_available_providers()
        if provider not in present:
            raise RefusalError(
                f"ort:{self.runtime} needs {provider}, but onnxruntime {onnxruntime.__version__} here has "
                f"only {', '.join(present)}; pip install {PACKAGES[self.runtime]}"
            )
        if request.get("memory_mb"):
            limit_memory(request["memory_mb"])
        cores = pin(self.threads)
        probe = self._session(SATURATION_PROBE)
        product = probe.run(None, {"x": np.full((1, 4, 2, 2), 255, np.uint8)})[0]
        return {
            "cpu": cpu_model(),
            "instructions": cpu_instructions(),
            "cores": os.cpu_count(),
            "pinned": cores,
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "providers": present,
            "int8_saturates": bool((product != SATURATION_EXACT).any()),
        }, b""

    def load(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Keeps the model in `blob` as `model`; answers how long loading and the first call took."""
        opened = self._opened(bytes(blob))
        self.models[request["model"]] = self._called(opened)
        return {"load_seconds": opened.load_seconds, "first_seconds": opened.first_seconds}, b""

    def time(self, request: Mapping[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        """Times `model` and `reference` in turn; the blob is int64 nanoseconds, the model's come first."""
        candidate, reference = self._model(request["model"]), self._model(request["reference"])
        gc.collect()
        gc.disable()
        try:
            times = interleave(
                candidate.run,
                reference.run,
                seconds=request["seconds"],
                tolerance=request["tolerance"],
            )
        finally:
            gc.enable()
        return {"count": len(times[0])}, np.array(times, dtype="<i8").tobytes()

    def hold(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Keeps the array in `blob` under the name `array`."""
        values = np.frombuffer(blob, dtype=request["dtype"]).reshape(request["shape"])
        self.arrays[request["array"]] = values
        return {}, b""

    def predict(self, request: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Runs the model in `blob` over the held `array` (N, ...); the blob is its first output, float32."""
        opened = self._opened(bytes(blob))
        session, loaded = opened.session, self._called(opened)
        if len(loaded.feed) != 1:
            raise RefusalError(f"a model with {len(loaded.feed)} inputs cannot be run over images alone")
        [(name, example)] = loaded.feed.items()
        images = self.arrays[request["array"]]
        if example.shape[1:] != images.shape[1:]:
            raise RefusalError(f"input {name!r} takes {example.shape[1:]}, the images are {images.shape[1:]}")
        fixed = isinstance(session.get_inputs()[0].shape[0], int)
        size = len(example) if fixed else 32
        logits = []
        for start in range(0, len(images), size):
            batch = images[start : start + size].astype(example.dtype, copy=False)
            if fixed and len(batch) < size:
                padded = np.zeros((size, *batch.shape[1:]), example.dtype)
                padded[: len(batch)] = batch
                logits.append(session.run(None, {name: padded})[0][: len(batch)])
            else:
                logits.append(session.run(None, {name: batch})[0])
        answer = np.concatenate(logits).astype("<f4")
        return {"shape": answer.shape}, answer.tobytes()

    def optimized(self, _: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Answers the nodes that are left of the model in `blob` after the runtime's optimizations."""
        return {"nodes": self._opened(bytes(blob), with_nodes=True).nodes}, b""

    def kernels(self, _: Mapping[str, Any], blob: bytearray) -> tuple[dict[str, Any], bytes]:
        """Runs the model in `blob` once; answers the kernels that ran and the types that they read."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(bytes(blob), profiled=Path(folder) / "profile")
            self._ready(session).run()
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = []
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                said = event["args"]
                reads, writes = (
                    [kind for tensor in said[f"{side}_type_shape"] for kind in tensor]
                    for side in ("input", "output")
                )
                kernel = {"name": event["name"].removesuffix("_kernel_time"), "op": said["op_name"]}
                kernels.append({**kernel, "provider": said["provider"], "reads": reads, "writes": writes})
        return {"kernels": kernels}, b""

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

    def _opened(self, model: bytes, *, with_nodes: bool = False) -> Opened:
        """The session of `model`: the last one opened, where it is the same model's."""
        key = hashlib.sha256(model).hexdigest()
        last = self.last
        if last is not None and last.key == key and not (with_nodes and last.nodes is None):
            return last
        self.last = last = None  # or there would be three models in memory
        if not with_nodes:
            begun = time.perf_counter()
            session = self._session(model)
            self.last = Opened(key, session, time.perf_counter() - begun)
            return self.last
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            begun = time.perf_counter()
            session = self._session(model, optimized=path)
            load_seconds = time.perf_counter() - begun
            nodes = optimized_nodes(path.read_bytes())
        self.last = Opened(key, session, load_seconds, nodes=nodes)
        return self.last

    def _called(self, opened: Opened) -> Loaded:
        """The session with an input, called at least once."""
        loaded = self._ready(opened.session)
        if opened.first_seconds is None:
            begun = time.perf_counter()
            loaded.run()
            opened.first_seconds = time.perf_counter() - begun
        return loaded

    def _session(
        self, model: bytes, *, optimized: Path | None = None, profiled: Path | None = None
    ) -> Session:
        import onnxruntime

        refuse_external_data(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        # By default the runtime quantizes layers that the policy left in float, next to quantized ones.
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "WeightBiasQuantization"
        )
        # Otherwise the threads of the model that has just run keep spinning on the other model's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.runtime != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if profiled is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profiled)
        provider = PROVIDERS[self.runtime]
        session: Session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if session.get_providers()[0] != provider:
            raise RefusalError(f"asked for {provider}, but the session runs on {session.get_providers()[0]}")
        return session

    def _ready(self, session: Session) -> Loaded:
        rng = np.random.default_rng(0)
        feed = {}
        for value in session.get_inputs():
            if value.type not in INPUT_TYPES:
                raise RefusalError(
                    f"input {value.name!r} is a {value.type}; {', '.join(INPUT_TYPES)} can be fed"
                )
            if any(not isinstance(size, int) for size in value.shape[1:]):
                raise RefusalError(
                    f"input {value.name!r} has shape {value.shape}; only its first size may be open"
                )
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            feed[value.name] = rng.standard_normal(shape).astype(INPUT_TYPES[value.type])
        return Loaded(session, feed)


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


def main() -> None:
    """Serves requests until the other side says bye or goes away."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    # What native code prints must not land between frames, nor may it eat a request.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # Since 1.29 the runtime writes down what is run and tells its maker, unless forbidden before it loads.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    # The runtime's exceptions share no ancestor of their own, and their list grows from version to version.
    expected: tuple[type[Exception], ...] = (RefusalError, RuntimeError, ValueError, MemoryError, OSError)
    for kind in vars(native).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            expected += (kind,)
    worker = Worker()
    while (received := _receive(requests)) is not None:
        request, blob = received
        _alarm(request["limit_seconds"] + GRACE_SECONDS)
        try:
            answer, content = worker.verbs[request["verb"]](request, blob)
        except expected as error:
            kind = "" if isinstance(error, RefusalError) else f"{type(error).__name__}: "
            answer, content = {"refused": f"{kind}{error}"}, b""
        _alarm(0)
        answers.write(pack(answer, len(content)))
        answers.write(content)
        answers.flush()
        if request["verb"] == "bye":
            return


if __name__ == "__main__":
    main()
