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
    pads = operator.integers("pads")
    rank = len(pads) // 2
    padding = pads[:rank]
    if padding != pads[rank:]:
        images, padding = F.pad(images, _torch_order(pads)), (0,) * rank
    return _CONVOLUTIONS[rank](
        images,
        operator.constant(),
        operator.bias,
        operator.integers("strides"),
        padding,
        operator.integers("dilations"),
        operator.integer("group"),
    )


def _conv_transpose(operator: Operator, images: Tensor) -> Tensor:
    pads = operator.integers("pads")
    rank = len(pads) // 2
    return _TRANSPOSED_CONVOLUTIONS[rank](
        images,
        operator.constant(),
        operator.bias,
        operator.integers("strides"),
        pads[:rank],
        operator.integers("output_padding"),
        operator.integer("group"),
        operator.integers("dilations"),
    )


def _torch_order(pads: tuple[int, ...]) -> list[int]:
    """ONNX's pads, all before and then all after, as PyTorch wants them: last axis first."""
    half = len(pads) // 2
    return [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]


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


def _hard_sigmoid(operator: Operator, tensor: Tensor) -> Tensor:
    beta = tensor.new_tensor(operator.number("beta"))
    return torch.add(beta, tensor, alpha=operator.number("alpha")).clamp_(0, 1)


def _max_pool(operator: Operator, images: Tensor) -> Tensor:
    kernel = operator.integers("kernel_shape")
    pool = F.max_pool1d if len(kernel) == 1 else F.max_pool2d
    return pool(
        images,
        kernel,
        operator.integers("strides"),
        operator.integers("pads")[: len(kernel)],
        ceil_mode=bool(operator.integer("ceil_mode")),
    )


def _average_pool(operator: Operator, images: Tensor) -> Tensor:
    kernel = operator.integers("kernel_shape")
    pool = F.avg_pool1d if len(kernel) == 1 else F.avg_pool2d
    return pool(
        images,
        kernel,
        operator.integers("strides"),
        operator.integers("pads")[: len(kernel)],
        ceil_mode=bool(operator.integer("ceil_mode")),
        count_include_pad=bool(operator.integer("count_include_pad")),
    )


def _pad(operator: Operator, tensor: Tensor) -> Tensor:
    sides = _torch_order(operator.integers("pads"))
    mode = operator.attributes.get("mode", "constant")
    if mode == "constant":
        return F.pad(tensor, sides, value=operator.number("value") if "value" in operator.attributes else 0.0)
    # PyTorch mirrors and repeats along the axes after the second only.
    return F.pad(tensor, sides[: 2 * (tensor.ndim - 2)], mode=_PADDING[str(mode)])


def _resize(operator: Operator, images: Tensor) -> Tensor:
    mode = "nearest" if operator.attributes["mode"] == "nearest" else "bilinear"
    return F.interpolate(images, operator.integers("sizes"), mode=mode)


def _instance_norm(operator: Operator, tensor: Tensor) -> Tensor:
    normal = F.layer_norm(tensor, tensor.shape[2:], eps=operator.number("epsilon"))
    shape = (-1, *(1 for _ in tensor.shape[2:]))
    bias = torch.zeros(()) if operator.bias is None else operator.bias.reshape(shape)
    return normal * operator.constant().reshape(shape) + bias


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Callable[..., Tensor]:
    def apply(operator: Operator, tensor: Tensor) -> Tensor:
        return function(tensor, operator.integers("axes"), bool(operator.integer("keepdims")))

    return apply


def _layer_norm(operator: Operator, tensor: Tensor) -> Tensor:
    shape = tensor.shape[operator.integer("axis") :]
    return F.layer_norm(tensor, shape, operator.weight, operator.bias, operator.number("epsilon"))


def _slice(operator: Operator, tensor: Tensor) -> Tensor:
    (start,), (end,), (axis,) = (operator.integers(key) for key in ("starts", "ends", "axes"))
    (step,) = operator.integers("steps") if "steps" in operator.attributes else (1,)
    return tensor[(*[slice(None)] * axis, slice(start, end, step))]


def _gather(operator: Operator, tensor: Tensor) -> Tensor:
    axis, indices = operator.integer("axis"), operator.attributes["indices"]
    if isinstance(indices, tuple):
        return tensor.index_select(axis, torch.tensor(indices, device=tensor.device))
    return tensor.select(axis, operator.integer("indices"))


def _unsqueeze(operator: Operator, tensor: Tensor) -> Tensor:
    for axis in operator.integers("axes"):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _concat(operator: Operator, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, operator.integer("axis"))


def _expand(operator: Operator, like: Tensor) -> Tensor:
    constant = operator.constant()
    return constant.expand(like.shape[0], *constant.shape[1:])


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
_PADDING = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}

CAST_TO = {"float32": 1, "float16": 10, "bfloat16": 16}
"""ONNX's number of each type that a Cast may give."""
_CAST = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}

COMPUTE: dict[str, Callable[..., Tensor]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Pow": _binary(torch.pow),
    "Abs": _unary(torch.abs),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _hard_sigmoid,
    "Clip": lambda operator, tensor: tensor.clamp(operator.number("min"), operator.number("max")),
    "LeakyRelu": lambda operator, tensor: F.leaky_relu(tensor, operator.number("alpha")),
    "PRelu": lambda operator, tensor: F.prelu(tensor, operator.constant().flatten()),
    "Softplus": _unary(F.softplus),
    "Elu": lambda operator, tensor: F.elu(tensor, operator.number("alpha")),
    "Gelu": lambda operator, tensor: F.gelu(tensor, approximate=str(operator.attributes["approximate"])),
    "Softmax": lambda operator, tensor: tensor.softmax(operator.integer("axis")),
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "GlobalAveragePool": lambda _, images: images.mean((2, 3), keepdim=True),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceL2": _reduce(lambda tensor, axes, keep: torch.linalg.vector_norm(tensor, 2, axes, keep)),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Flatten": lambda _, tensor: tensor.flatten(1),
    "Reshape": lambda operator, tensor: tensor.reshape(operator.integers("shape")),
    "Transpose": lambda operator, tensor: tensor.permute(operator.integers("perm")),
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda operator, tensor: tensor.squeeze(operator.integers("axes")),
    "Tile": lambda operator, tensor: tensor.repeat(operator.integers("repeats")),
    "Resize": _resize,
    "Expand": _expand,
    "Cast": lambda operator, tensor: tensor.to(_CAST[operator.integer("to")]),
}
"""How PyTorch computes each kind: the kinds that a graph may hold."""
