"""Activations of floats as ONNX Runtime's CPU provider computes them, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nestling.models.operators import Operator

FARTHEST = 18.0
"""The sigmoid of what is farther from zero is taken to be that of this."""
_ODD = (
    4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03,
    2.48287947061529e-01,
)  # fmt: skip
_EVEN = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03,
    1.16817656904453e-01, 9.93151921023180e-01,
)  # fmt: skip


def logistic(tensor: Tensor) -> Tensor:
    """The sigmoids of `tensor`, of float32 numbers: quotients of polynomials.

    Two thirds of PyTorch's own differ in the last bit. The polynomials' steps are fused multiply-adds, which
    PyTorch's are where a CPU has them.
    """
    numbers = tensor.clamp(-FARTHEST, FARTHEST)
    squares = numbers * numbers
    odd = _polynomial(_ODD, squares).mul_(numbers)
    return odd.div_(_polynomial(_EVEN, squares)).add_(0.5).clamp_(0, 1)


def _polynomial(coefficients: tuple[float, ...], numbers: Tensor) -> Tensor:
    """Of `numbers`, its highest coefficient first."""
    first, second, *others = coefficients
    total = torch.add(numbers.new_tensor(second), numbers, alpha=first)
    for coefficient in others:
        total = torch.addcmul(numbers.new_tensor(coefficient), total, numbers)
    return total


def _hard_sigmoid(tensor: Tensor, *, alpha: float, beta: float) -> Tensor:
    """With a product that is rounded before the sum; PyTorch's sum with a factor rounds once."""
    return (tensor * torch.tensor(alpha, dtype=tensor.dtype)).add_(beta).clamp_(0, 1)


ACTIVATIONS: Mapping[str, Callable[[Operator, Tensor], Tensor]] = {
    "Sigmoid": lambda _, tensor: logistic(tensor),
    "HardSigmoid": lambda operator, tensor: _hard_sigmoid(
        tensor, alpha=operator.number("alpha"), beta=operator.number("beta")
    ),
    "HardSwish": lambda _, tensor: tensor * _hard_sigmoid(tensor, alpha=1 / 6, beta=0.5),
}
"""Kind -> what the operator makes of float32 numbers."""
