"""An operator of a traced network: ONNX's word for it, its weights, and how PyTorch computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Attribute = int | float | str | tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One step of a graph: reads tensors by name, writes one tensor.

    Its operands are the tensors `inputs`, then `weight`, then `bias`, in the order of the ONNX operator.

    Attributes:
        kind: the ONNX operator type, a key of `COMPUTE`.
        name: name of the tensor that it writes; unique in its graph.
        inputs: names of the tensors that it reads.
        layer: path of the module that asked for it, such as `blocks.2.0.conv_pw`; "" for the network itself.
        attributes: named as in ONNX; what ONNX wants as an input (`shape` of Reshape) is an attribute here.
        weight: the constant operand, such as the kernel of a convolution or the other side of a sum.
        bias: the second constant operand.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    layer: str
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None

    def integer(self, key: str) -> int:
        """The attribute `key`, which must be a whole number.

        Raises:
            KeyError: no such attribute.
            TypeError: it is not a whole number.
        """
        value = self.attributes[key]
        if not isinstance(value, int):
            raise TypeError(f"{self.name}: {key} must be a whole number, not {value!r}")
        return value

    def number(self, key: str) -> float:
        """The attribute `key`, which must be a number.

        Raises:
            KeyError: no such attribute.
            TypeError: it is not a number.
        """
        value = self.attributes[key]
        if not isinstance(value, int | float):
            raise TypeError(f"{self.name}: {key} must be a number, not {value!r}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """The attribute `key`, which must be a tuple of whole numbers.

        Raises:
            KeyError: no such attribute.
            TypeError: it is not such a tuple.
        """
        value = self.attributes[key]
        if not isinstance(value, tuple):
            raise TypeError(f"{self.name}: {key} must be whole numbers, not {value!r}")
        return value

    def constant(self) -> Tensor:
        """The weight.

        Raises:
            TypeError: this operator has none.
        """
        if self.weight is None:
            raise TypeError(f"{self.kind} {self.name} has no weight")
        return self.weight


def compute(operator: Operator, *inputs: Tensor) -> Tensor:
    """What `operator` makes of `inputs`, in PyTorch. The arithmetic is that of the ONNX operator.

    Raises:
        KeyError: an operator kind that `COMPUTE` does not hold.
    """
    return COMPUTE[operator.kind](operator, *inputs)


def _conv(operator: Operator, images: Tensor) -> Tensor:
    top, left, bottom, right = operator.integers("pads")
    padding = (top, left)
    if padding != (bottom, right):
        images, padding = F.pad(images, (left, right, top, bottom)), (0, 0)
    return F.conv2d(
        images,
        operator.constant(),
        operator.bias,
        operator.integers("strides"),
        padding,
        operator.integers("dilations"),
        operator.integer("group"),
    )


def _gemm(operator: Operator, rows: Tensor) -> Tensor:
    return F.linear(rows, operator.constant(), operator.bias)


def _matmul(operator: Operator, left: Tensor, *right: Tensor) -> Tensor:
    return left @ (right[0] if right else operator.constant())


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(operator: Operator, left: Tensor, *right: Tensor) -> Tensor:
        return function(left, right[0] if right else operator.constant())

    return apply


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(operator: Operator, tensor: Tensor) -> Tensor:  # noqa: ARG001 the signature of the table
        return function(tensor)

    return apply


def _max_pool(operator: Operator, images: Tensor) -> Tensor:
    top, left, bottom, right = operator.integers("pads")
    if (top, left) != (bottom, right):
        images = F.pad(images, (left, right, top, bottom), value=float("-inf"))
        top = left = 0
    return F.max_pool2d(
        images,
        operator.integers("kernel_shape"),
        operator.integers("strides"),
        (top, left),
        ceil_mode=bool(operator.integer("ceil_mode")),
    )


def _average_pool(operator: Operator, images: Tensor) -> Tensor:
    top, left, _, _ = operator.integers("pads")
    return F.avg_pool2d(
        images,
        operator.integers("kernel_shape"),
        operator.integers("strides"),
        (top, left),
        ceil_mode=bool(operator.integer("ceil_mode")),
        count_include_pad=bool(operator.integer("count_include_pad")),
    )


def _pad(operator: Operator, tensor: Tensor) -> Tensor:
    pads = operator.integers("pads")
    half = len(pads) // 2
    torch_order = [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]
    return F.pad(tensor, torch_order)


def _layer_norm(operator: Operator, tensor: Tensor) -> Tensor:
    shape = tensor.shape[operator.integer("axis") :]
    return F.layer_norm(tensor, shape, operator.weight, operator.bias, operator.number("epsilon"))


def _slice(operator: Operator, tensor: Tensor) -> Tensor:
    (start,), (end,), (axis,) = (operator.integers(key) for key in ("starts", "ends", "axes"))
    return tensor.narrow(axis, start, end - start)


def _concat(operator: Operator, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, operator.integer("axis"))


def _expand(operator: Operator, like: Tensor) -> Tensor:
    constant = operator.constant()
    return constant.expand(like.shape[0], *constant.shape[1:])


COMPUTE: dict[str, Callable[..., Tensor]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _unary(F.hardsigmoid),
    "Clip": lambda operator, tensor: tensor.clamp(operator.number("min"), operator.number("max")),
    "LeakyRelu": lambda operator, tensor: F.leaky_relu(tensor, operator.number("alpha")),
    "Elu": lambda operator, tensor: F.elu(tensor, operator.number("alpha")),
    "Gelu": lambda operator, tensor: F.gelu(tensor, approximate=str(operator.attributes["approximate"])),
    "Softmax": lambda operator, tensor: tensor.softmax(operator.integer("axis")),
    "LayerNormalization": _layer_norm,
    "GlobalAveragePool": lambda _, images: images.mean((2, 3), keepdim=True),
    "ReduceMean": lambda operator, tensor: tensor.mean(
        operator.integers("axes"), keepdim=bool(operator.integer("keepdims"))
    ),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Flatten": lambda _, tensor: tensor.flatten(1),
    "Reshape": lambda operator, tensor: tensor.reshape(operator.integers("shape")),
    "Transpose": lambda operator, tensor: tensor.permute(operator.integers("perm")),
    "Concat": _concat,
    "Slice": _slice,
    "Gather": lambda operator, tensor: tensor.select(operator.integer("axis"), operator.integer("indices")),
    "Expand": _expand,
}
"""How PyTorch computes each kind: the kinds that a graph may hold."""
