"""The range of every quantized tensor: observed once on images, read by PyTorch and ONNX alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant.policy import Format, QuantPolicy

Bounds = tuple[float, float]
Method = Literal["minmax", "moving"]


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Which numbers a tensor's integers stand for: `scale * (integer - zero_point)`.

    Attributes:
        scale: float32; a scalar, or (channels,).
        zero_point: int32; shaped as `scale`.
        dtype: `int8`, `uint8` or `int32`.
        axis: the axis of channels; None for one scale for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor
    dtype: str
    axis: int | None

    def integers(self, tensor: Tensor) -> Tensor:
        """The integers nearest to `tensor`, as floats: half to even, cut off at the ends of `dtype`.

        This is the arithmetic of ONNX's QuantizeLinear, operation by operation.
        """
        scale, zero_point = self._aligned(tensor)
        limits = _LIMITS[self.dtype]
        if self.dtype == "int32":  # a float32 cannot hold these
            return tensor.double().div(scale).round_().clamp_(*limits)
        return tensor.div(scale).round_().add_(zero_point).clamp_(*limits)

    def nearest(self, tensor: Tensor) -> Tensor:
        """`tensor` with every number replaced by the nearest one in this range."""
        scale, zero_point = self._aligned(tensor)
        return self.integers(tensor).sub_(zero_point).mul_(scale).to(tensor.dtype)

    def _aligned(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.scale.to(tensor.device), self.zero_point.to(tensor.device)
        if self.axis is None:
            return scale, zero_point
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return scale.reshape(shape), zero_point.reshape(shape)


_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}

# Kinds that ONNX Runtime computes on integers.
_INTEGER_KINDS = {
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "Concat",
    "Sigmoid",
    "GlobalAveragePool",
    "AveragePool",
}
# Kinds that only move numbers, so that what they write has the range of what they read.
_MOVING_KINDS = {
    "MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze", "Tile",
}  # fmt: skip
_WEIGHT_AXES = {"Conv": 0, "Gemm": 0, "MatMul": 1}


@torch.no_grad()
def observe(
    graph: Graph,
    policy: QuantPolicy,
    images: Iterable[Tensor],
    *,
    method: Method = "minmax",
    reduce_range: bool = False,
) -> Mapping[str, Range]:
    """Name -> range, for every tensor, weight and bias that `policy` quantizes; empty where that is none.

    Tensors have the names of the graph; an operator's constants are called `<operator>.weight` and
    `<operator>.bias`, as in the ONNX file. A quantized operator has ranges for what it reads and, after a
    ReLU or clip that it alone feeds, for what it writes; the network's logits stay floats. What only moves
    numbers keeps the range of what it moves.

    Args:
        graph: the network.
        policy: which layers.
        images: batches (N, 3, R, R) on the device of the graph's weights; they set the ranges of activations.
        method: `minmax` spans all that was seen; `moving` follows each batch's extremes by a tenth, which
            one odd image widens less.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI: their products of unsigned and signed bytes
            are added in 16 bits that overflow, and the runtime silently computes something else.

    Raises:
        ValueError: no images, or activations that are not finite.
    """
    integer = [operator for operator in graph.operators if _is_integer(operator, policy)]
    formats = _activation_formats(graph, integer, policy)
    if not formats:
        return {}
    sources = _sources(graph, formats)
    bounds = _extremes(graph, set(sources.values()), images, method=METHODS[method])
    ranges = {name: _activation_range(*bounds[source], formats[source]) for name, source in sources.items()}
    for operator in integer:
        format = policy.precision(operator.layer).weight
        if operator.weight is not None and format is not None:
            ranges |= _constant_ranges(
                operator, format, ranges[operator.inputs[0]], reduce_range=reduce_range
            )
    return ranges


def _widest(old: Bounds, new: Bounds) -> Bounds:
    return min(old[0], new[0]), max(old[1], new[1])


def _followed(old: Bounds, new: Bounds) -> Bounds:
    return 0.9 * old[0] + 0.1 * new[0], 0.9 * old[1] + 0.1 * new[1]


METHODS: Mapping[str, Callable[[Bounds, Bounds], Bounds]] = {"minmax": _widest, "moving": _followed}
"""How the extremes seen so far and those of one more batch make new ones."""


def _is_integer(operator: Operator, policy: QuantPolicy) -> bool:
    if operator.kind not in _INTEGER_KINDS or policy.precision(operator.layer).activation is None:
        return False
    # A sum or product with a constant stays in float: the runtime has no integer kernel that gains from it.
    return operator.weight is None or operator.kind in _WEIGHT_AXES


def _activation_formats(graph: Graph, integer: list[Operator], policy: QuantPolicy) -> dict[str, Format]:
    """Tensor -> format, for every tensor that an integer operator reads or writes."""
    readers = graph.readers()
    formats: dict[str, Format] = {}
    for operator in integer:
        format = policy.precision(operator.layer).activation
        if format is None:
            continue
        written = operator
        while (only := _only_reader(readers, graph, written)) is not None and _is_absorbed(only, by=written):
            written = only
        # The runtime gives the product of two matrices as floats and adds a constant to those. Softmax
        # should read floats too: in attention, ONNX Runtime 1.31's QLinearSoftmax was off by the whole range.
        float_sum = written is not operator and written.kind == "Add"
        float_softmax = only is not None and only.kind == "Softmax"
        outputs = () if float_sum or float_softmax or written.name == graph.output else (written.name,)
        for name in (*operator.inputs, *outputs):
            formats[name] = format
    return {name: formats[name] for name in graph.shapes if name in formats}


def _only_reader(readers: Mapping[str, list[Operator]], graph: Graph, operator: Operator) -> Operator | None:
    found = readers[operator.name]
    return found[0] if len(found) == 1 and operator.name != graph.output else None


def _is_absorbed(operator: Operator, *, by: Operator) -> bool:
    """Whether the runtime computes `operator` as part of the one before it, `by`."""
    rectifies = operator.kind == "Relu" or (operator.kind == "Clip" and operator.number("min") == 0.0)
    return rectifies and by.kind in ("Conv", "Gemm", "MatMul", "Add", "Mul")


def _sources(graph: Graph, formats: Mapping[str, Format]) -> dict[str, str]:
    """Tensor -> the tensor whose numbers set its range: itself, or what it was moved from.

    Where numbers are moved in several steps from one quantized tensor to another, it holds the steps between.
    """
    movers = {operator.name: operator for operator in graph.operators if operator.kind in _MOVING_KINDS}
    sources = {name: name for name in formats}
    for name in formats:
        steps = [name]
        while steps[-1] in movers:
            steps.append(movers[steps[-1]].inputs[0])
            if steps[-1] in formats:
                sources |= dict.fromkeys(steps[:-1], sources[steps[-1]])
                break
    return sources


def _extremes(
    graph: Graph, names: set[str], images: Iterable[Tensor], *, method: Callable[[Bounds, Bounds], Bounds]
) -> dict[str, Bounds]:
    seen: dict[str, Bounds] = {}

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in names:
            low, high = (float(extreme) for extreme in tensor.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(
                    f"tensor {name} is not finite on the calibration images; was training complete?"
                )
            seen[name] = method(seen[name], (low, high)) if name in seen else (low, high)
        return tensor

    for batch in images:
        graph.run(batch, after=look)
    if not seen:
        raise ValueError("no calibration images; quantization needs at least one batch")
    return seen


def _activation_range(low: float, high: float, format: Format) -> Range:
    # Zero must be exact: padding is made of it, and a ReLU ends on it.
    low, high = min(low, 0.0), max(high, 0.0)
    steps = format.high - format.low
    scale = torch.tensor((high - low) / steps if high > low else 1.0, dtype=torch.float32)
    zero_point = min(max(format.low + round(-low / float(scale)), format.low), format.high)
    return Range(scale, torch.tensor(zero_point, dtype=torch.int32), format.dtype, None)


def _constant_ranges(
    operator: Operator, format: Format, images: Range, *, reduce_range: bool
) -> dict[str, Range]:
    """The ranges of an operator's weight, and of its bias, whose scale is the product of the other two."""
    weight, axis = operator.constant(), _WEIGHT_AXES[operator.kind]
    largest = weight.abs().amax([other for other in range(weight.ndim) if other != axis]).float().cpu()
    levels = format.high // 2 if reduce_range else format.high
    scale = largest / levels
    if operator.bias is not None:
        # A channel with next to no weights would have a bias beyond 32 bits.
        scale = torch.maximum(scale, operator.bias.abs().float().cpu() / (images.scale * 2.0**30))
    scale = torch.where(scale > 0, scale, torch.ones(()))
    zeros = torch.zeros(scale.shape, dtype=torch.int32)
    ranges = {f"{operator.name}.weight": Range(scale, zeros, format.dtype, axis)}
    if operator.bias is not None:
        ranges[f"{operator.name}.bias"] = Range(scale * images.scale, zeros, "int32", 0)
    return ranges
