"""The one table of tracing: PyTorch function -> how it is written down in operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.models.tracing import arrays, layers
from nestling.models.tracing.recorder import Translation

_PROPERTIES: tuple[Any, ...] = (
    Tensor.shape,
    Tensor.ndim,
    Tensor.dtype,
    Tensor.device,
    Tensor.requires_grad,
    Tensor.is_cuda,
)

# Questions about a tensor whose answers are plain numbers: nothing to record.
QUERIES: set[Any] = {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    *(attribute.__get__ for attribute in _PROPERTIES),
}

TRANSLATIONS: dict[Any, Translation] = {
    F.conv2d: layers.conv2d,
    F.linear: layers.linear,
    F.batch_norm: layers.batch_norm,
    F.layer_norm: layers.layer_norm,
    F.scaled_dot_product_attention: layers.attention,
    F.hardtanh: layers.clip,
    F.relu6: lambda to, input, inplace=False: layers.clip(to, input, 0.0, 6.0),  # noqa: ARG005
    F.silu: layers.silu,
    F.gelu: layers.gelu,
    F.leaky_relu: layers.leaky_relu,
    F.elu: layers.elu,
    F.hardswish: layers.unary("HardSwish"),
    F.hardsigmoid: layers.unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    F.adaptive_avg_pool2d: layers.adaptive_average,
    F.avg_pool2d: layers.average_pool,
    F.max_pool2d: layers.max_pool,
    F.pad: arrays.pad,
    F.dropout: layers.dropout,
    torch.cat: arrays.cat,
    Tensor.__getitem__: arrays.getitem,
    Tensor.__rsub__: arrays.rsub,
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), layers.unary("Relu")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_), layers.unary("Sigmoid")),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh, Tensor.tanh_), layers.unary("Tanh")),
    **dict.fromkeys((torch.clamp, Tensor.clamp, Tensor.clamp_), layers.clamp),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), layers.softmax),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_), arrays.binary("Add")),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_), arrays.binary("Sub")),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_), arrays.binary("Mul")),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.div_), arrays.binary("Div")),
    **dict.fromkeys((torch.matmul, Tensor.matmul), arrays.matmul),
    **dict.fromkeys((torch.mean, Tensor.mean), arrays.mean),
    **dict.fromkeys((torch.flatten, Tensor.flatten), arrays.flatten),
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), arrays.reshape),
    **dict.fromkeys((torch.permute, Tensor.permute), arrays.permute),
    **dict.fromkeys((torch.transpose, Tensor.transpose), arrays.transpose),
    **dict.fromkeys((torch.unbind, Tensor.unbind), arrays.unbind),
    **dict.fromkeys((torch.chunk, Tensor.chunk), arrays.chunk),
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), arrays.identity),
}
"""PyTorch function -> what records it, called with the function's own arguments. Extend it here."""
