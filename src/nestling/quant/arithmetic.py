"""What ONNX Runtime's integer operators compute, to the last bit, in floats that hold whole numbers.

A tensor is held in steps: its integers less its zero point, so that zero is 0 and padding needs no care.
The rules were found by giving the runtime's CPU provider (1.31, x86 with AVX512-VNNI) every byte, or every
pair of them, at scales that make many ties. Scales, their products and quotients are float32, taken from left
to right:

- convolutions and products of matrices: the exact sum of integers and bias becomes a float, times
  `read * weight / written`; that is rounded half to even, then the zero point added. Where the result
  is floats, it is the sum times `read * weight`;
- sums: `a * (scale a / written) + (b * (scale b / written) + rest)` of integers with their zero points, in
  two fused multiply-adds. `rest` is what all zero points come to, so it is rounded with the numbers;
- products: `a * b`, times `scale a * scale b / written`, plus the zero point, and only then rounded: with an
  odd zero point a tie falls to the other side than in a convolution;
- means over a whole map: the sum times `read / (written * count)`, rounded, then the zero point added;
- means over windows: of floats, divided by the scale, plus the zero point, and only then rounded;
- everything else: floats (convolutions in the runtime's order, see `nestling.quant.accumulating`), divided by
  the scale, rounded, then the zero point added.

The runtime's sums on CPUs without fused multiply-adds round twice, which was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nestling.models.operators import Operator, compute
from nestling.quant.ranges import Range, rows
from nestling.quant.regions import WEIGHT_AXES

Rule = Callable[..., Tensor]
"""Takes the tensors that an operator reads, in steps, and changes none; gives what it writes, in steps, or in
floats where that has no range."""

EXACT = 2**24
"""Sums of whole numbers that stay within it are exact in float32, whatever their order."""


def integer_rule(operator: Operator, ranges: Mapping[str, Range], written: Range | None) -> Rule | None:
    """How the runtime computes `operator` on integers; None where it computes it in floats.

    Args:
        operator: with its constants in floats.
        ranges: by name, of what it reads and of its constants.
        written: of what it writes; None where it gives floats, which layers without a kernel can do.
    """
    read = [ranges[name] for name in operator.inputs if name in ranges]
    tensors = [*read, written] if written is not None else read
    if len(read) < len(operator.inputs) or any(found.axis is not None for found in tensors):
        return None
    if len({found.stored for found in tensors}) > 1:  # no kernel mixes signed and unsigned bytes
        return None
    if operator.weight is not None:
        constants = _constants(operator, ranges)
        if constants is None or (written is None and operator.kind == "Conv"):
            return None
        return _layer(operator, *constants, read[0], written)
    if operator.kind == "MatMul":
        return _matrix_product(read[0], read[1], written)
    if written is None:
        return None
    if operator.kind == "Add":
        return _sum(read[0], read[1], written)
    if operator.kind == "Mul":
        return _product(read[0], read[1], written)
    if operator.kind == "HardSigmoid" and written.limits in ((0, 255), (-128, 127)):
        return _gate(operator, read[0], written)
    if operator.kind == "GlobalAveragePool":
        return _global_mean(read[0], written)
    if operator.kind == "AveragePool":
        return _window_mean(operator, read[0], written)
    return None


def _constants(operator: Operator, ranges: Mapping[str, Range]) -> tuple[Range, Range | None] | None:
    """The ranges of weight and bias of a layer on integers; None of any other operator."""
    weight, bias = ranges.get(f"{operator.name}.weight"), ranges.get(f"{operator.name}.bias")
    if operator.kind not in WEIGHT_AXES or weight is None or weight.block is not None:
        return None
    return (weight, bias) if (operator.bias is None) == (bias is None) else None


def _layer(operator: Operator, weight: Range, bias: Range | None, read: Range, written: Range | None) -> Rule:
    constant = operator.constant()
    sums = exact_sums(
        replace(
            operator,
            weight=weight.steps(constant),
            bias=None if operator.bias is None or bias is None else bias.integers(operator.bias),
        ),
        read,
    )
    factor = read.scale * weight.scale
    if written is not None:
        factor = factor / written.scale
    factor = factor.to(constant.device)
    if weight.axis is not None and operator.kind == "Conv":
        factor = factor.reshape(-1, *(1 for _ in constant.shape[2:]))
    return lambda steps: _requantized(sums(steps).mul_(factor), written)


def exact_sums(operator: Operator, read: Range) -> Rule:
    """What a layer with whole numbers for weight and bias makes of steps: sums, each rounded once to float32.

    Where they may leave the whole numbers that float32 holds, they are made in parts, and added in float64.

    Args:
        operator: a Conv, Gemm or MatMul; its bias, if any, is float64.
        read: of the steps.
    """
    bias = operator.bias
    largest = 0.0 if bias is None else float(bias.abs().max())
    if _reach(operator, read) + largest <= EXACT:
        whole = replace(operator, bias=None if bias is None else bias.float())
        return lambda steps: compute(whole, steps)
    grouped = operator.kind == "Conv" and operator.integer("group") > 1
    parts = [replace(operator, bias=None)] if grouped else _parts(operator, read)
    if bias is not None and operator.kind == "Conv":
        bias = bias.reshape(-1, *(1 for _ in operator.constant().shape[2:]))
    axis = 1 if operator.kind == "Conv" else -1
    doubles = [replace(part, weight=part.constant().double()) for part in parts] if grouped else parts

    def apply(steps: Tensor) -> Tensor:
        pieces = [steps.double()] if grouped else steps.tensor_split(len(parts), axis)
        total = torch.zeros((), dtype=torch.float64, device=steps.device) if bias is None else bias
        for part, piece in zip(doubles, pieces, strict=True):
            total = total + compute(part, piece).double()
        return total.float()

    return apply


def _parts(operator: Operator, read: Range) -> list[Operator]:
    """`operator` without its bias, cut along what it sums over until each part's sums are exact."""
    axis, weight = _summed_axis(operator), operator.constant()
    count = 2
    while True:
        pieces = weight.tensor_split(min(count, weight.shape[axis]), axis)
        parts = [replace(operator, weight=piece, bias=None) for piece in pieces]
        if count >= weight.shape[axis] or all(_reach(part, read) <= EXACT for part in parts):
            return parts
        count *= 2


def _summed_axis(operator: Operator) -> int:
    """The axis of the weight along which products are summed."""
    return 1 - WEIGHT_AXES[operator.kind]


def _reach(operator: Operator, read: Range) -> float:
    """As far from zero as a sum of any of a channel's products may be, or more if that is within `EXACT`."""
    low, high = read.limits
    down, up = int(read.zero_point) - low, high - int(read.zero_point)
    weight = rows(operator.constant(), WEIGHT_AXES[operator.kind])
    bound = 128.0 * weight.shape[1] * max(up, down)
    if bound > EXACT:
        bound = float(weight.abs().sum(1).max()) * max(up, down)
    if bound <= EXACT:
        return bound
    plus, minus = weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1).neg()
    return float(torch.maximum(up * plus + down * minus, down * plus + up * minus).max())


def _matrix_product(left: Range, right: Range, written: Range | None) -> Rule:
    factor = left.scale * right.scale
    if written is not None:
        factor = factor / written.scale
    most = _farthest(left) * _farthest(right)

    def apply(a: Tensor, b: Tensor) -> Tensor:
        exact = a.shape[-1] * most <= EXACT
        sums = a @ b if exact else (a.double() @ b.double()).float()
        return _requantized(sums.mul_(float(factor)), written)

    return apply


def _sum(left: Range, right: Range, written: Range) -> Rule:
    a_ratio, b_ratio = _ratio(left.scale, written), _ratio(right.scale, written)
    a_zero, b_zero, zero = int(left.zero_point), int(right.zero_point), int(written.zero_point)
    rest = torch.tensor(_float32(zero - _fused(a_ratio, a_zero, _float32(b_ratio * b_zero))))

    def apply(a: Tensor, b: Tensor) -> Tensor:
        a = a + a_zero if a_zero else a
        b = b + b_zero if b_zero else b
        # PyTorch's sum with a factor is a fused multiply-add.
        return _cut_off(torch.add(torch.add(rest, b, alpha=b_ratio), a, alpha=a_ratio).round_(), written)

    return apply


def _gate(operator: Operator, read: Range, written: Range) -> Rule:
    """`alpha * x + beta` as the file has it: a sum with a constant, see `nestling.quant.gates.sum_gates`."""
    alpha, beta = np.float32(operator.number("alpha")), np.float32(operator.number("beta"))
    most = 255 if read.stored == "uint8" else 127
    steep = replace(read, scale=torch.tensor(np.float32(read.scale) * alpha))
    constant = Range(
        torch.tensor(beta / np.float32(most)), torch.tensor(0, dtype=torch.int32), read.dtype, None
    )
    added = torch.tensor(float(most))
    summed = _sum(steep, constant, written)
    return lambda steps: summed(steps, added)


def _product(left: Range, right: Range, written: Range) -> Rule:
    factor = float(left.scale * right.scale / written.scale)
    zero = int(written.zero_point)

    def apply(a: Tensor, b: Tensor) -> Tensor:
        return _cut_off((a * b).mul_(factor).add_(zero).round_(), written)

    return apply


def _global_mean(read: Range, written: Range) -> Rule:
    def apply(steps: Tensor) -> Tensor:
        count = steps.shape[2] * steps.shape[3]
        exact = count * _farthest(read) <= EXACT
        sums = steps.sum((2, 3), keepdim=True, dtype=torch.float32 if exact else torch.float64).float()
        return _requantized(sums.mul_(float(read.scale / (written.scale * count))), written)

    return apply


def _window_mean(operator: Operator, read: Range, written: Range) -> Rule:
    scale, zero = float(written.scale), int(written.zero_point)

    def apply(steps: Tensor) -> Tensor:
        means = compute(operator, read.numbers(steps))
        return _cut_off(means.div_(scale).add_(zero).round_(), written)

    return apply


def _requantized(numbers: Tensor, written: Range | None) -> Tensor:
    """`numbers`, in steps of `written` but not whole yet, rounded; as they are where they stay floats."""
    if written is None:
        return numbers
    low, high = written.limits
    zero = int(written.zero_point)
    return numbers.round_().clamp_(low - zero, high - zero)


def _cut_off(integers: Tensor, written: Range) -> Tensor:
    """`integers`, with the zero point in them, as steps; changed in place."""
    return integers.clamp_(*written.limits).sub_(int(written.zero_point))


def _farthest(found: Range) -> int:
    """The most steps from zero."""
    low, high = found.limits
    return max(high - int(found.zero_point), int(found.zero_point) - low)


def _ratio(scale: Tensor, written: Range) -> float:
    return float(scale / written.scale)


def _float32(number: float) -> float:
    return float(np.float32(number))


def _fused(a: float, b: float, c: float) -> float:
    """`a * b + c`, rounded once to float32; float64 holds the product of two float32."""
    return _float32(a * b + c)
