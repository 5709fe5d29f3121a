"""Sums, products, powers, matrix products and reductions in operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.models.operators import Attribute
from nestling.models.tracing.recorder import UNWRITTEN, Recorder, Translation, like

Axes = int | Sequence[int] | None


def binary(kind: str) -> Translation:
    """What records an operator of this kind with two operands, one of which may be a constant."""

    def translate(to: Recorder, left: Tensor | float, right: Tensor | float) -> str:
        names = [to.name(left), to.name(right)]
        if names[0] and names[1]:
            return to.emit(kind, [names[0], names[1]])
        (constant, traced), name = ((right, left), names[0]) if names[0] else ((left, right), names[1])
        if not isinstance(traced, Tensor) or name is None:
            raise to.untraceable(f"{kind} of two constants")
        value = like(traced, constant)
        if names[0] is None and kind == "Sub":
            kept, name = "Add", to.emit("Mul", [name], weight=like(traced, -1))
        elif names[0] is None and kind == "Div":
            kept, name = "Mul", to.emit("Reciprocal", [name])
        elif kind == "Sub":
            kept, value = "Add", -value
        elif kind == "Div":
            kept, value = "Mul", 1 / value
        else:
            kept = kind
        return to.emit(kept, [name], weight=value)

    return translate


subtract, divide = binary("Sub"), binary("Div")


def reverse(translation: Translation) -> Translation:
    """`translation` with its two operands exchanged, as in `Tensor.__rsub__`."""
    return lambda to, input, other: translation(to, other, input)


def negative(to: Recorder, input: Tensor) -> str:
    """Mul by -1."""
    return to.emit("Mul", [to.read(input)], weight=like(input, -1))


def power(to: Recorder, input: Tensor, exponent: float | Tensor = 2) -> str:
    """Mul for a square, Sqrt and Reciprocal for roots, otherwise Pow by a constant."""
    name = to.read(input)
    if to.name(exponent):
        raise to.untraceable("a power that depends on the images")
    if isinstance(exponent, Tensor) or exponent not in (2, 0.5, -0.5, -1):
        return to.emit("Pow", [name], weight=like(input, exponent))
    if exponent == 2:
        return to.emit("Mul", [name, name])
    if abs(exponent) == 0.5:
        name = to.emit("Sqrt", [name])
    return name if exponent > 0 else to.emit("Reciprocal", [name])


def root(to: Recorder, input: Tensor) -> str:
    """Sqrt and Reciprocal."""
    return power(to, input, -0.5)


def addcmul(to: Recorder, input: Tensor, first: Tensor, second: Tensor, *, value: float = 1) -> str:
    """Mul of the last two and Add of the first."""
    if to.name(first) or to.name(second):
        product = binary("Mul")(to, first, second)
        if value != 1:
            product = to.emit("Mul", [str(product)], weight=like(input, value))
        name = to.name(input)
        return to.emit("Add", [str(product), name]) if name else to.emit("Add", [str(product)], weight=input)
    return to.emit("Add", [to.read(input)], weight=value * first * second)


def choose(to: Recorder, condition: Tensor, chosen: Tensor | float, other: Tensor | float) -> str:
    """Mul by ones and zeros, and Add: one value where a constant condition holds, another elsewhere."""
    traced = next((tensor for tensor in (chosen, other) if to.name(tensor)), None)
    if not isinstance(traced, Tensor) or to.name(condition):
        raise to.untraceable("a choice that depends on the images")
    total: str | None = None
    # What is traced comes first, so that a constant without end is added, never multiplied by zero.
    for value, mask in sorted(
        ((chosen, condition), (other, ~condition)), key=lambda pair: to.name(pair[0]) is None
    ):
        name = to.name(value)
        if name:
            kept = to.emit("Mul", [name], weight=like(traced, mask))
            total = to.emit("Add", [total, kept]) if total else kept
        elif total:
            constant = torch.where(mask, like(traced, value), like(traced, 0))
            total = to.emit("Add", [total], weight=constant)
    return str(total)


def masked_fill(to: Recorder, input: Tensor, mask: Tensor, value: Tensor | float) -> str:
    """Mul and Add: a value where a constant mask holds."""
    return choose(to, mask, value, input)


def matmul(to: Recorder, left: Tensor, right: Tensor) -> str:
    """MatMul; a constant on the left is transposed to the right."""
    if to.name(right) is None:
        return to.emit("MatMul", [to.read(left)], weight=right)
    if to.name(left) is not None:
        return to.emit("MatMul", [to.read(left), to.read(right)])
    if right.ndim < 2 or not 2 <= left.ndim <= right.ndim:
        raise to.untraceable(f"a constant {tuple(left.shape)} times a tensor {tuple(right.shape)}")
    perm = (*range(right.ndim - 2), right.ndim - 1, right.ndim - 2)
    turned = to.emit("Transpose", [to.read(right)], attributes={"perm": perm})
    product = to.emit("MatMul", [turned], weight=left.mT)
    return to.emit("Transpose", [product], attributes={"perm": perm})


def einsum(to: Recorder, equation: str, *operands: Tensor) -> str:
    """MatMul between Transposes: for two tensors, without repeated or elided axes.

    Letters of both and of the result are axes of many products, and so are those of one side after its first,
    which the other side meets with a size of one: no axes are merged, so images may be anywhere.
    """
    tensors = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    terms, _, result = equation.replace(" ", "").partition("->")
    sides = terms.split(",")
    if len(sides) != 2 or not result or any(len(set(side)) < len(side) or "." in side for side in sides):
        raise to.untraceable(f"einsum {equation!r}")
    left, right = sides
    summed = [letter for letter in left if letter not in result]
    rows = [letter for letter in result if letter not in right]
    columns = [letter for letter in result if letter not in left]
    if (
        len(summed) != 1
        or summed[0] not in right
        or set(right) - set(columns) - set(left)
        or not (rows or columns)
    ):
        raise to.untraceable(f"einsum {equation!r}")
    row, column = rows[-1:], columns[-1:]
    outer = [letter for letter in result if letter not in (*row, *column)]
    names: list[str | None] = []
    values: list[Tensor] = []
    for tensor, side, last in (
        (tensors[0], left, [*(row or ["1"]), *summed]),
        (tensors[1], right, [*summed, *(column or ["1"])]),
    ):
        wanted = [*outer, *last]
        perm = [side.index(letter) for letter in wanted if letter in side]
        missing = tuple(axis for axis, letter in enumerate(wanted) if letter not in side)
        name = to.name(tensor)
        if name and perm != sorted(perm):
            name = to.emit("Transpose", [name], attributes={"perm": tuple(perm)})
        if name and missing:
            name = to.emit("Unsqueeze", [name], attributes={"axes": missing})
        value = tensor.permute(perm)
        for axis in missing:
            value = value.unsqueeze(axis)
        names.append(name)
        values.append(value)
    swapped = names[0] is None
    if swapped:  # a constant stands on the right: the product of the transposes
        names, values = names[::-1], [value.mT for value in values[::-1]]
        turn = (*range(values[0].ndim - 2), values[0].ndim - 1, values[0].ndim - 2)
        names[0] = to.emit("Transpose", [str(names[0])], attributes={"perm": turn})
    inputs = [name for name in names if name]
    product = to.emit("MatMul", inputs, weight=values[1] if len(inputs) == 1 else None)
    given = [*outer, *(row or ["1"]), *(column or ["1"])]
    if swapped:
        given[-2:] = given[:-3:-1]
    alone = tuple(axis for axis, letter in enumerate(given) if letter == "1")
    if alone:
        product = to.emit("Squeeze", [product], attributes={"axes": alone})
    given = [letter for letter in given if letter != "1"]
    perm = [given.index(letter) for letter in result]
    return (
        product if perm == sorted(perm) else to.emit("Transpose", [product], attributes={"perm": tuple(perm)})
    )


def mean(to: Recorder, input: Tensor, dim: Axes = None, keepdim: bool = False, *, dtype: None = None) -> str:
    """GlobalAveragePool (and Flatten) for the mean over a map, otherwise ReduceMean."""
    if input.ndim == 4 and dtype is None and _axes(input, dim) == (2, 3):
        pooled = to.emit("GlobalAveragePool", [to.read(input)])
        return pooled if keepdim else to.emit("Flatten", [pooled], attributes={"axis": 1})
    return str(reduction("ReduceMean")(to, input, dim, keepdim, dtype=dtype))


def reduction(kind: str) -> Translation:
    """What records an operator of this kind over some axes, or over all but the first."""

    def translate(
        to: Recorder,
        input: Tensor,
        dim: Axes = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> str:
        if dtype not in (None, input.dtype):
            raise to.untraceable(f"{kind} in {dtype}")
        attributes: dict[str, Attribute] = {"axes": _axes(input, dim), "keepdims": int(keepdim)}
        return to.emit(kind, [to.read(input)], attributes=attributes)

    return translate


def extreme(to: Recorder, input: Tensor, dim: int, keepdim: bool = False) -> tuple[str, str]:
    """ReduceMax; where the maximum lies stays unknown."""
    return str(reduction("ReduceMax")(to, input, dim, keepdim)), UNWRITTEN


def norm(
    to: Recorder,
    input: Tensor,
    p: float | str | None = 2,
    dim: Axes = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: None = None,  # noqa: ARG001 torch's signature
) -> str:
    """ReduceL2."""
    if p not in (2, None, "fro"):
        raise to.untraceable(f"the norm {p}")
    return str(reduction("ReduceL2")(to, input, dim, keepdim, dtype=dtype))


def normalize(
    to: Recorder,
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,  # noqa: ARG001 torch's signature
) -> str:
    """Div by ReduceL2, which is at least `eps`."""
    length = norm(to, input, p, dim, keepdim=True)
    limits: dict[str, Attribute] = {"min": float(eps), "max": torch.finfo(torch.float32).max}
    return to.emit("Div", [to.read(input), to.emit("Clip", [length], attributes=limits)])


def variance(
    to: Recorder,
    input: Tensor,
    dim: Axes = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
) -> str:
    """ReduceMean of the squares of what is left when ReduceMean is taken away."""
    axes = _axes(input, dim)
    numbers = math.prod(input.shape[axis] for axis in axes)
    lost = int(unbiased) if correction is None else correction
    middle = to.emit("ReduceMean", [to.read(input)], attributes={"axes": axes, "keepdims": 1})
    rest = to.emit("Sub", [to.read(input), middle])
    square = to.emit("Mul", [rest, rest])
    spread = to.emit("ReduceMean", [square], attributes={"axes": axes, "keepdims": int(keepdim)})
    return to.emit("Mul", [spread], weight=like(input, numbers / (numbers - lost))) if lost else spread


def deviation(to: Recorder, input: Tensor, *args: object, **kwargs: object) -> str:
    """Sqrt of the variance."""
    return to.emit("Sqrt", [variance(to, input, *args, **kwargs)])  # type: ignore[arg-type]


def _axes(input: Tensor, dim: Axes) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(input.ndim))
    return tuple(sorted(axis % input.ndim for axis in ((dim,) if isinstance(dim, int) else dim)))
