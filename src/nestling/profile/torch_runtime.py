"""PyTorch, for the worker: an ONNX file in floats, run node by node on a GPU or on the CPU.

Its source is sent along with `hello`, so it imports none of ours; it needs `torch` and `onnx` where the
worker runs. On a GPU the whole file is captured as a CUDA graph and replayed, unless the address says
`graph=0`; times are those of CUDA events, so what copies images to the GPU costs is not in them. The CUDA
part was written without a GPU at hand, and never ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

SETTINGS = 1
"""Of how PyTorch is told to compute, in `ForeignRuntime`: what was measured otherwise is measured anew.

Before there was a number, convolutions in 32-bit floats were left to TF32.
"""
PROFILED_SECONDS = 2.0
"""No further run is profiled after so long."""
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""By an address's `dtype`. With `tf32` a GPU from Ampere on rounds what it multiplies, and nothing else."""
UNFORESEEN = (TypeError, LookupError, AttributeError, AssertionError)
"""What an operator raises that is given operands or attributes which it does not take."""
WARM_UP = 3
"""Eager runs before a CUDA graph is captured, as PyTorch asks for."""
CLASSIFIED_BY_INPUT = 13
"""The opset from which Softmax has one axis, and lists of axes are inputs."""


@dataclass(frozen=True)
class Input:
    """An input of a model; open sizes are None."""

    name: str
    dtype: str
    shape: Sequence[int | None]


@dataclass(frozen=True)
class Step:
    """A node of the file, ready to be computed."""

    name: str
    op: str
    reads: Sequence[str]
    writes: Sequence[str]
    attributes: Mapping[str, Any]
    constants: Mapping[int, NDArray[Any]]
    """The operands that are constants, by their place."""

    @property
    def label(self) -> str:
        """The node's name, or where it has none that of its first output."""
        return self.name or next(iter(self.writes), "")

    def attribute(self, name: str, default: Any) -> Any:
        """The attribute, or what it is when it is left out."""
        return self.attributes.get(name, default)

    def numbers(self, place: int, name: str) -> list[int] | None:
        """Whole numbers that are an operand in newer opsets and an attribute in older ones."""
        if place in self.constants:
            return [int(number) for number in self.constants[place].ravel()]
        return list(self.attributes[name]) if name in self.attributes else None

    def scalar(self, place: int, name: str) -> float | None:
        """The same of one number."""
        if place in self.constants:
            return float(self.constants[place])
        return self.attributes.get(name)


Compute = Callable[..., Any]
"""(step, operands) -> the first output, or a list of all."""


def _windows(step: Step, dimensions: int) -> tuple[list[int], list[int], list[int]]:
    pads = list(step.attribute("pads", [0] * 2 * dimensions))
    if step.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotImplementedError("auto_pad")
    strides = list(step.attribute("strides", [1] * dimensions))
    return strides, list(step.attribute("dilations", [1] * dimensions)), pads


def _padded(tensor: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, list[int]]:
    """The tensor, and the padding left to do: where both ends differ it is done here."""
    half = len(pads) // 2
    if list(pads[:half]) == list(pads[half:]):
        return tensor, list(pads[:half])
    around = [pads[side * half + axis] for axis in reversed(range(half)) for side in (0, 1)]
    return F.pad(tensor, around, value=value), [0] * half


def _conv(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, pads = _windows(step, weight.dim() - 2)
    x, left = _padded(x, pads, 0.0)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    maps: Tensor = convolve(x, weight, bias, strides, left, dilations, step.attribute("group", 1))
    return maps


def _gemm(step: Step, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = step.attribute("alpha", 1.0), step.attribute("beta", 1.0)
    a = a.transpose(0, 1) if step.attribute("transA", 0) else a
    b = b if step.attribute("transB", 0) else b.transpose(0, 1)
    if alpha == beta == 1.0 and (c is None or c.dim() == 1):
        return F.linear(a, b, c)  # one kernel
    product: Tensor = alpha * F.linear(a, b)
    return product if c is None else product.add(c, alpha=beta)


def _average_pool(step: Step, x: Tensor) -> Tensor:
    size = list(step.attributes["kernel_shape"])
    strides, _, pads = _windows(step, len(size))
    counted = bool(step.attribute("count_include_pad", 0))
    half = len(pads) // 2
    if pads[:half] != pads[half:] and not counted:
        raise NotImplementedError("pads that differ and are not counted")
    x, left = _padded(x, pads, 0.0)
    return F.avg_pool2d(x, size, strides, left, bool(step.attribute("ceil_mode", 0)), counted)


def _max_pool(step: Step, x: Tensor) -> Tensor:
    size = list(step.attributes["kernel_shape"])
    strides, dilations, pads = _windows(step, len(size))
    x, left = _padded(x, pads, float("-inf"))
    pooled: Tensor = F.max_pool2d(x, size, strides, left, dilations, bool(step.attribute("ceil_mode", 0)))
    return pooled


def _clip(step: Step, x: Tensor, *_: object) -> Tensor:
    return x.clamp(step.scalar(1, "min"), step.scalar(2, "max"))


def _reshape(step: Step, x: Tensor, *_: object) -> Tensor:
    wanted = step.numbers(1, "shape")
    if wanted is None:
        raise NotImplementedError("a shape that is computed")
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)])


def _squeeze(step: Step, x: Tensor, *_: object) -> Tensor:
    axes = step.numbers(1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(step: Step, x: Tensor, *_: object) -> Tensor:
    axes = step.numbers(1, "axes") or []
    dimensions = x.dim() + len(axes)
    for axis in sorted(axis % dimensions for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(step: Step, x: Tensor, *_: object) -> Tensor:
    starts, ends = step.numbers(1, "starts"), step.numbers(2, "ends")
    if starts is None or ends is None:
        raise NotImplementedError("places that are computed")
    axes = step.numbers(3, "axes") or list(range(len(starts)))
    strides = step.numbers(4, "steps") or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(strides):
        raise ValueError(f"a slice of {len(starts)} starts, {len(ends)} ends and {len(axes)} axes")
    cut = [slice(None)] * x.dim()
    for start, end, axis, stride in zip(starts, ends, axes, strides):  # noqa: B905 boards have Python 3.9
        if stride < 0:
            raise NotImplementedError("a slice that runs backwards")
        cut[axis] = slice(start, end, stride)
    return x[tuple(cut)]


def _gather(step: Step, x: Tensor, indices: Tensor) -> Tensor:
    axis = step.attribute("axis", 0) % x.dim()
    index = torch.where(indices < 0, indices + x.shape[axis], indices)
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _split(step: Step, x: Tensor, *_: object) -> list[Tensor]:
    axis, count = step.attribute("axis", 0), len(step.writes)
    sizes = step.numbers(1, "split") or [-(-x.shape[axis] // count)] * count
    return list(torch.split(x, sizes if sum(sizes) == x.shape[axis] else sizes[0], axis))


def _pad(step: Step, x: Tensor, *_: object) -> Tensor:
    pads = step.numbers(1, "pads") or []
    mode = step.attribute("mode", b"constant").decode()
    if 3 in step.constants:
        raise NotImplementedError("chosen axes")
    half = len(pads) // 2
    around = [pads[side * half + axis] for axis in reversed(range(half)) for side in (0, 1)]
    while len(around) > 2 and mode != "constant" and around[-2:] == [0, 0]:
        around = around[:-2]  # PyTorch mirrors the last axes only
    name = {"edge": "replicate"}.get(mode, mode)
    return F.pad(x, around, name, step.scalar(2, "value") or 0.0 if mode == "constant" else None)


def _expand(step: Step, x: Tensor, *_: object) -> Tensor:
    wanted = step.numbers(1, "shape")
    if wanted is None:
        raise NotImplementedError("a shape that is computed")
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(wanted)))


def _layer_norm(step: Step, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = step.attribute("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], scale, bias, step.attribute("epsilon", 1e-5))


def _batch_norm(step: Step, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, eps=step.attribute("epsilon", 1e-5))


def _softmax(step: Step, x: Tensor) -> Tensor:
    return x.softmax(step.attribute("axis", -1))


def _reduced(function: Callable[..., Tensor]) -> Compute:
    def apply(step: Step, x: Tensor, *_: object) -> Tensor:
        axes = step.numbers(1, "axes") or list(range(x.dim()))
        return function(x, axes, keepdim=bool(step.attribute("keepdims", 1)))

    return apply


def _plain(function: Callable[..., Tensor]) -> Compute:
    return lambda step, *operands: function(*operands)  # noqa: ARG005 the signature of the table


OPERATORS: dict[str, Compute] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda step, *x: torch.cat(x, step.attributes["axis"]),
    "Conv": _conv,
    "Div": _plain(torch.div),
    "Dropout": lambda step, x, *_: x,  # noqa: ARG005
    "Elu": lambda step, x: F.elu(x, step.attribute("alpha", 1.0)),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": lambda step, x: x.reshape(x.shape[: step.attribute("axis", 1)].numel(), -1),
    "Gather": _gather,
    "Gelu": lambda step, x: F.gelu(x, approximate=step.attribute("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)),
    "HardSigmoid": lambda step, x: (x * step.attribute("alpha", 0.2) + step.attribute("beta", 0.5)).clamp(
        0, 1
    ),
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": lambda step, x, scale, bias: F.instance_norm(
        x, weight=scale, bias=bias, eps=step.attribute("epsilon", 1e-5)
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda step, x: F.leaky_relu(x, step.attribute("alpha", 0.01)),
    "Log": _plain(torch.log),
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Pad": _pad,
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _plain(F.softplus),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Tile": lambda step, x, *_: x.repeat(step.numbers(1, "repeats")),
    "Transpose": lambda step, x: x.permute(step.attribute("perm", tuple(reversed(range(x.dim()))))),
    "Unsqueeze": _unsqueeze,
}
"""What PyTorch makes of each of ONNX's operators; of those with several outputs a list."""


class Session:
    """A file whose weights lie on the device."""

    def __init__(self, model: bytes, *, device: torch.device, dtype: torch.dtype, graph: bool) -> None:
        self.device, self.dtype, self.graph = device, dtype, graph
        proto = onnx.load_model_from_string(model)
        # the runtime's conversion, where a file is older than what the table knows
        opset = {one.domain or "ai.onnx": one.version for one in proto.opset_import}.get("ai.onnx")
        if opset is None:
            raise NotImplementedError("it names no opset of ONNX's own operators; 13 or later is known")
        if opset < CLASSIFIED_BY_INPUT:
            raise NotImplementedError(f"opset {opset}; 13 or later is known")
        self.weights: dict[str, Tensor] = {}
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.steps = []
        for node in proto.graph.node:
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                arrays[node.output[0]] = numpy_helper.to_array(attributes["value"])
                continue
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
                raise NotImplementedError(f"operator {node.domain or 'ONNX'}:{node.op_type}")
            constants = {place: arrays[name] for place, name in enumerate(node.input) if name in arrays}
            step = Step(node.name, node.op_type, list(node.input), list(node.output), attributes, constants)
            self.steps.append(step)
        self.weights = {name: self._on_device(array) for name, array in arrays.items()}
        self.inputs = [
            Input(
                value.name,
                str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                [one.dim_value or None for one in value.type.tensor_type.shape.dim],
            )
            for value in proto.graph.input
            if value.name not in arrays
        ]
        self.outputs = [value.name for value in proto.graph.output]
        self.nodes: list[dict[str, Any]] | None = [
            {
                "name": step.label,
                "op": step.op,
                "reads": list(step.reads),
                "writes": list(step.writes),
                "precision": str(dtype).removeprefix("torch."),
            }
            for step in self.steps
        ]

    def run(self, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs for `feed`, in 32-bit floats."""
        with torch.inference_mode():
            outputs = self.compute(self.moved(feed))
        return [output.float().cpu().numpy() for output in outputs]

    def bound(self, feed: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """Computes the outputs for `feed`, which is on the device from now on, whenever it is called."""
        inputs = self.moved(feed)

        def eager() -> object:
            with torch.inference_mode():
                return self.compute(inputs)

        if self.device.type != "cuda" or not self.graph:
            return eager
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = eager()  # the outputs live as long as the graph writes them

        def replay() -> object:
            captured.replay()
            return kept

        return replay

    def moved(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The inputs on the device."""
        return {name: self._on_device(array) for name, array in feed.items()}

    def compute(
        self, inputs: Mapping[str, Tensor], *, between: Callable[[], object] = lambda: None
    ) -> list[Tensor]:
        """The outputs; `between` is called before every step and after the last."""
        values: dict[str, Any] = {"": None, **self.weights, **inputs}
        between()
        for step in self.steps:
            try:
                found = OPERATORS[step.op](step, *(values[name] for name in step.reads))
            except UNFORESEEN as error:
                raise ValueError(
                    f"node {step.label!r} ({step.op}): {type(error).__name__}: {error}"
                ) from error
            outputs = found if isinstance(found, list) else [found]
            values.update(zip(step.writes, outputs))  # noqa: B905 boards have Python 3.9
            between()
        return [values[name] for name in self.outputs]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array))
        tensor = tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


class ForeignRuntime:
    """PyTorch on `options["target"]`: `cuda` or `cpu`."""

    def __init__(self, threads: int, options: Mapping[str, Any], *, refusal: type[Exception]) -> None:
        self._refusal = refusal
        target = options["target"]
        if target == "cuda" and not torch.cuda.is_available():
            raise refusal(
                f"torch:cuda needs a GPU, and a PyTorch for it; torch {torch.__version__} finds none here"
            )
        # SETTINGS names what follows in fingerprints: raise it with every change of how a file is run.
        torch.set_num_threads(threads)
        asked = options.get("dtype", "f32")
        self.device, self.dtype = torch.device(target), DTYPES[asked]
        # left to itself cuDNN rounds the factors in convolutions to 10 bits, where the GPU can
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = asked == "tf32"
        self.graph = options.get("graph", "1") == "1"
        self.name = f"torch {torch.__version__} (settings {SETTINGS})"
        if target == "cuda":
            self.name += f", CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"

    def facts(self) -> dict[str, Any]:
        """PyTorch runs floats here, of which no sums are cut."""
        return {"int8_saturates": False}

    def open(self, model: bytes, *, with_nodes: bool) -> Session:
        """The file's nodes as PyTorch's functions, its weights on the device."""
        del with_nodes  # they are there anyhow
        try:
            return Session(model, device=self.device, dtype=self.dtype, graph=self.graph)
        except NotImplementedError as error:
            raise self._refusal(f"torch:{self.device.type} does not run this file: {error}") from None

    def profile(
        self, model: bytes, feed: Callable[[Session], Mapping[str, NDArray[Any]]], *, runs: int
    ) -> list[dict[str, Any]]:
        """The nodes of one run, each called by itself, with the median of its microseconds over `runs`."""
        session = self.open(model, with_nodes=True)
        inputs = session.moved(feed(session))
        taken: list[list[float]] = []
        end = time.monotonic() + PROFILED_SECONDS
        with torch.inference_mode():
            session.compute(inputs)
            while len(taken) < runs and (not taken or time.monotonic() < end):
                taken.append(self._spans(session, inputs))
        medians = np.median(taken, axis=0)
        kind = str(self.dtype).removeprefix("torch.")
        return [
            {
                "name": step.label,
                "op": step.op,
                "provider": str(self.device),
                "reads": [kind],
                "writes": [kind],
                "microseconds": float(medians[number]),
            }
            for number, step in enumerate(session.steps)
        ]

    def _spans(self, session: Session, inputs: Mapping[str, Tensor]) -> list[float]:
        """The microseconds of each step of one run."""
        if self.device.type != "cuda":
            ticks: list[float] = []
            session.compute(inputs, between=lambda: ticks.append(time.perf_counter() * 1e6))
            return np.diff(ticks).tolist()
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[-1].record()

        session.compute(inputs, between=mark)
        torch.cuda.synchronize()
        return [events[i].elapsed_time(events[i + 1]) * 1e3 for i in range(len(events) - 1)]

    def timer(self) -> Callable[[Callable[[], object]], int] | None:
        """On a GPU: what runs a call between two CUDA events and gives the nanoseconds between them."""
        if self.device.type != "cuda":
            return None
        begun, ended = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

        def timed(call: Callable[[], object]) -> int:
            begun.record()
            call()
            ended.record()
            ended.synchronize()
            return max(int(begun.elapsed_time(ended) * 1e6), 1)

        return timed

    def elsewhere(self, kernels: Sequence[Mapping[str, Any]]) -> list[str]:
        """Nothing: all runs on the device."""
        del kernels
        return []

    def spoilt(self, error: Exception) -> bool:
        """Whether CUDA has failed: after an assert or a wild address it answers all that is asked with that.

        A failure may be told late, of what another call began, so the GPU is asked too. Running out of memory
        is none.
        """
        if self.device.type != "cuda":
            return False
        if "CUDA error" in str(error):
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False
