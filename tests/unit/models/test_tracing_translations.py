from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from nestling.models.graph import Untraceable, trace
from nestling.models.tracing import TRANSLATIONS

Function = Callable[[Tensor], Tensor]


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        return self._function(images)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def maps(x: Tensor) -> Tensor:
    """(N, 3, 6, 6) -> (N, 4, 6, 6), where sign and size differ between images, channels and pixels."""
    return F.conv2d(x, random(4, 3, 1, 1))


def lines(x: Tensor) -> Tensor:
    """(N, 3, 6, 6) -> (N, 3, 36)."""
    return x.flatten(2)


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, 6, 6) -> queries, keys, values (N, 2, 9, 6)."""
    q, k, v = x.repeat(1, 3, 1, 1).reshape(x.shape[0], 3, 2, 9, 6).permute(1, 0, 2, 3, 4).unbind(0)
    return q, k * 2, v.sigmoid()


def in_place(x: Tensor) -> Tensor:
    x = maps(x)
    x.relu_().add_(1).mul_(2).sub_(3).div_(4).sigmoid_().tanh_().clamp_(-1, 1)
    torch.relu_(x)
    x.sqrt_()
    return x.masked_fill_(random(6, 6) > 0, 0.5)


def written(x: Tensor) -> Tensor:
    x = maps(x)
    x[:, :, 1:3, 2:] = x[:, :, 1:3, 2:] * 2
    x[:, 1:2] = 7.0
    x[..., :2] = torch.arange(2.0)
    return x


MASK = random(6, 6) > 0
ATTENTION = nn.MultiheadAttention(3, 3, batch_first=True).eval()
TRANSFORMER = nn.TransformerEncoderLayer(3, 3, 5, batch_first=True).eval()
ORDER = torch.tensor([3, 1, 1, 0])

SAME_EVERYWHERE: dict[str, Function] = {
    "in-place operations": in_place,
    "writing to a part": written,
    # sums, products, powers
    "a constant on the left": lambda x: (1 - x) + (2 - x) * 3 + torch.rsub(x, 4) + torch.sub(x, x.sub(1)),
    "a constant divided by a tensor": lambda x: (1 / (x.exp() + 1)) + torch.div(2, x.exp()),
    "sums by name": lambda x: torch.add(x, torch.mul(x, x)).add(2).mul(3).sub(x),
    "division by names": lambda x: torch.true_divide(torch.multiply(x, 2), x.exp()).multiply(3).div(2),
    "negation": lambda x: -x + torch.neg(x).neg(),
    "powers": lambda x: x**2 + x.abs().pow(1.5) + torch.pow(x.abs() + 1, -1) + x.square() + torch.square(x),
    "roots": lambda x: x.abs().add(1).rsqrt() + torch.rsqrt(x.exp()) + x.exp().sqrt() + torch.sqrt(x.exp()),
    "a power of each channel": lambda x: x.exp() ** torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
    "logarithms": lambda x: torch.log(torch.exp(x) + 1).exp().log() + torch.abs(x),
    "reciprocals": lambda x: x.exp().reciprocal() + torch.reciprocal(x.exp()),
    "a product added": lambda x: torch.addcmul(random(6, 6), random(6, 6), x) + x.addcmul(x, x, value=0.5),
    "a constant product added": lambda x: torch.addcmul(x, random(6, 6), random(6, 6), value=2),
    "a choice between tensors": lambda x: torch.where(MASK, x, 2 * x) + torch.where(MASK, 1.0, x),
    "a choice of negative infinity": lambda x: torch.where(MASK, x, -torch.inf).softmax(-1),
    "filling by a mask": lambda x: x.masked_fill(MASK, -torch.inf).exp() + torch.masked_fill(x, MASK, 2),
    # products of matrices
    "matrix products": lambda x: x @ random(6, 5) @ x[..., :5].mT + torch.matmul(x, x.matmul(x)),
    "a constant on the left of a matrix product": lambda x: random(5, 6) @ x + random(3, 5, 6) @ x,
    "products of lists of matrices": lambda x: torch.bmm(lines(x), lines(x).mT).bmm(lines(x)),
    "einsum as in relative positions": lambda x: torch.einsum("bhwc,hkc->bhwk", x, random(3, 5, 6)),
    "einsum over the axis before": lambda x: torch.einsum("bhwc,wkc->bhwk", x, random(6, 5, 6)),
    "einsum of five axes": lambda x: torch.einsum("byhwc,hkc->byhwk", x[:, None], random(3, 5, 6)),
    "einsum of two tensors": lambda x: torch.einsum("bnhk,bmk->bnhm", x, x[:, 0]),
    "einsum with a constant first": lambda x: torch.einsum("kd,bcdw->bwck", random(5, 6), x),
    "einsum that sums into channels": lambda x: torch.einsum("bchw,dc->bdhw", x, random(5, 3)),
    "einsum of a vector": lambda x: torch.einsum("bchw,w->bch", x, random(6)),
    # reductions
    "means": lambda x: (
        x.mean(1) + torch.mean(x, dim=(1,), keepdim=True).squeeze(1) + x.mean((2, 3), True)[:, 0]
    ),
    "sums": lambda x: x.sum(1) + torch.sum(x, dim=(-3,)) + x.sum((1, 2), keepdim=True)[:, 0],
    "largest": lambda x: x.amax(1) + torch.amax(x, (1, 2), keepdim=True)[:, 0] + x.max(1)[0],
    "largest by name": lambda x: torch.max(x, dim=-1, keepdim=True).values,
    "variances": lambda x: x.var(1) + torch.var(x, 1, unbiased=False) + x.var((1, 2), correction=0)[:, None],
    "deviations": lambda x: x.std(-1, keepdim=True) + torch.std(x, dim=(2, 3), keepdim=True),
    "norms": lambda x: x.norm(dim=1) + torch.norm(x, 2, 1) + torch.linalg.vector_norm(x, dim=1),
    "normalized": lambda x: F.normalize(x, dim=-1) + F.normalize(x, eps=0.1),
    # activations
    "activations by name": lambda x: (
        F.relu(x) + F.sigmoid(x) + F.tanh(x) + x.tanh() + torch.tanh(x) + x.relu()
    ),
    "more activations": lambda x: torch.relu(x) + torch.sigmoid(x) + x.sigmoid() + F.hardtanh(x) + F.relu6(x),
    "smooth activations": lambda x: (
        F.silu(x) + F.mish(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.elu(x)
    ),
    "hard activations": lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.leaky_relu(x, 0.2),
    "softplus": lambda x: F.softplus(30 * x) + F.softplus(x, beta=2.5),
    "prelu": lambda x: F.prelu(x, random(3)) + F.prelu(x, torch.tensor([0.3])),
    "clamp": lambda x: (
        x.clamp(-1)
        + torch.clamp(x, max=1)
        + x.clip(0, 1)
        + torch.clip(x, -0.5, 0.5)
        + x.clamp(torch.tensor(-0.1))
    ),
    "softmax": lambda x: F.softmax(x, 1) + torch.softmax(x, 2) + x.softmax(-1),
    "dropout": lambda x: F.dropout1d(F.dropout(x, training=False)[:, 0], training=False)[:, None] * x,
    "more dropout": lambda x: F.dropout2d(F.alpha_dropout(x), training=False) * 2,
    # convolutions
    "a convolution of lines": lambda x: F.conv1d(lines(x), random(5, 3, 5), random(5), 2, 2),
    "a convolution of one channel": lambda x: F.conv1d(x.mean((2, 3))[:, None], random(1, 1, 3), padding=1),
    "a convolution of volumes": lambda x: F.conv3d(
        x[:, None], random(2, 1, 1, 3, 3), random(2), padding=(0, 1, 1)
    ),
    "a dilated convolution": lambda x: F.conv2d(x, random(6, 1, 3, 3), None, 1, 2, 2, 3),
    "a convolution of the same size": lambda x: F.conv2d(x, random(4, 3, 5, 3), padding="same"),
    "a transposed convolution": lambda x: F.conv_transpose2d(x, random(3, 2, 3, 3), random(2), 2, 1, 1),
    "a grouped transposed convolution": lambda x: F.conv_transpose2d(
        x, random(3, 2, 2, 3), None, (1, 2), 0, 0, 3, 2
    ),
    "a transposed convolution of lines": lambda x: F.conv_transpose1d(lines(x), random(3, 2, 4), stride=2),
    "linear layers": lambda x: (
        F.linear(x, random(5, 6), random(5)) + F.linear(x.mean((1, 2)), random(5, 6))[:, None, None]
    ),
    "patches": lambda x: F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2),
    "patches put together": lambda x: F.fold(F.unfold(x, 3, padding=1, stride=2), 6, 3, padding=1, stride=2),
    # normalizations
    "batch normalization": lambda x: F.batch_norm(x, random(3), random(3).abs() + 1, random(3), random(3)),
    "batch normalization of rows": lambda x: F.batch_norm(x.mean((2, 3)), random(3), random(3).abs() + 1),
    "layer normalization": lambda x: (
        F.layer_norm(x, (6, 6), random(6, 6), random(6, 6)) + F.layer_norm(x, (6,))
    ),
    "group normalization": lambda x: (
        F.group_norm(maps(x), 2, random(4), random(4)) + F.group_norm(maps(x), 4)
    ),
    "one group": lambda x: F.group_norm(x, 1, random(3), random(3), 0.1),
    "group normalization of lines": lambda x: F.group_norm(lines(x), 3, random(3), random(3)),
    "instance normalization": lambda x: (
        F.instance_norm(x, weight=random(3), bias=random(3)) + F.instance_norm(x)
    ),
    "running instance normalization": lambda x: F.instance_norm(
        x, random(3), random(3).abs(), use_input_stats=False
    ),
    "root mean square normalization": lambda x: F.rms_norm(x, (6,), random(6), 1e-3) + F.rms_norm(x, (6, 6)),
    # attention
    "attention": lambda x: F.scaled_dot_product_attention(*heads(x)),
    "attention with a bias": lambda x: F.scaled_dot_product_attention(
        *heads(x), random(1, 2, 9, 9), scale=0.3
    ),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(
        *heads(x), (random(9, 9) > 0) | torch.eye(9).bool()
    ),
    "attention with a computed bias": lambda x: F.scaled_dot_product_attention(
        *heads(x), heads(x)[0] @ random(6, 9)
    ),
    "causal attention": lambda x: F.scaled_dot_product_attention(*heads(x), is_causal=True),
    "attention with learned queries": lambda x: F.scaled_dot_product_attention(
        random(1, 2, 4, 6).expand(x.shape[0], -1, -1, -1), *heads(x)[1:]
    ),
    "attention of torch's own layer": lambda x: ATTENTION(lines(x).mT, lines(x).mT, lines(x).mT)[0],
    "attention of torch's own layer with a mask": lambda x: ATTENTION(
        lines(x).mT, lines(x).mT, lines(x).mT, attn_mask=torch.ones(36, 36).triu(1).bool(), need_weights=False
    )[0],
    "torch's own transformer": lambda x: TRANSFORMER(lines(x).mT),
    # pooling and interpolation
    "average pooling": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) + F.avg_pool2d(x, 2),
    "average pooling of single pixels": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 1, (2, 3)),
    "odd average pooling": lambda x: F.avg_pool2d(x, (2, 3), (1, 2), (1, 0)),
    "largest of windows": lambda x: F.max_pool2d(x, 3, 2, 1) + F.max_pool2d(x, (2, 2), ceil_mode=True),
    "pooling of lines": lambda x: F.avg_pool1d(lines(x), 3, 2, 1) + F.max_pool1d(lines(x), 2),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_avg_pool2d(x, (2, None)),
    "adaptive pooling that overlaps": lambda x: F.adaptive_avg_pool2d(x, (4, 7)),
    "adaptive pooling of lines": lambda x: (
        F.adaptive_avg_pool1d(lines(x), 1) + F.adaptive_avg_pool1d(lines(x), 5)
    ),
    "adaptive largest": lambda x: F.adaptive_max_pool2d(x, 3) + F.adaptive_max_pool2d(x, (1, 1)),
    "adaptive largest of lines": lambda x: F.adaptive_max_pool1d(lines(x), 9),
    "nearest": lambda x: F.interpolate(x, scale_factor=2)[..., :9, :9] + F.interpolate(x, 9),
    "bilinear": lambda x: (
        F.interpolate(x, (9, 13), mode="bilinear") + F.interpolate(x, (9, 13), mode="bicubic")
    ),
    "bilinear, smaller": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "bilinear with aligned corners": lambda x: F.interpolate(x, 11, mode="bilinear", align_corners=True),
    "bilinear with an odd factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bicubic without aliases": lambda x: F.interpolate(x, (4, 5), mode="bicubic", antialias=True),
    "areas": lambda x: F.interpolate(x, (4, 5), mode="area") + F.interpolate(x, (4, 5), mode="nearest-exact"),
    # shapes
    "reshaping": lambda x: torch.reshape(x, (x.shape[0], 9, -1)).view_as(
        lines(x)[:, :, :].reshape(-1, 9, 12)
    ),
    "reshaping as another": lambda x: x.reshape_as(lines(x)).unflatten(1, (1, 3)).flatten(1, 2),  # type: ignore[no-untyped-call]
    "reshaping with images second": lambda x: (
        x.reshape(x.shape[0], 3, 2, 18).permute(2, 0, 1, 3).reshape(2, x.shape[0] * 3, 18).unbind(0)[1]
    ),
    "reshaping with images last": lambda x: x.flatten(1).mT.reshape(4, 27, -1).mT[0] * 2,
    "flattening": lambda x: torch.flatten(torch.unflatten(x, 3, (2, 3)), 2, 3).view(x.shape[0], -1),
    "axes of size one": lambda x: (
        torch.squeeze(x.unsqueeze(0).unsqueeze(-1), -1)[0] + torch.unsqueeze(x, 2).squeeze(2)
    ),
    "transposing": lambda x: torch.permute(x, (0, 2, 3, 1)).permute(0, 3, 2, 1).transpose(1, 2) + 1,
    "swapping": lambda x: (
        torch.transpose(x, 1, 3).swapaxes(2, 3) + torch.swapaxes(x, 2, 3).mT[:, :1].mT.transpose(1, 2)
    ),
    "moving an axis": lambda x: torch.movedim(x, 1, -1).movedim(-1, 2),
    "copies": lambda x: torch.clone(x.contiguous().detach().clone()).float().to(x.dtype).type_as(x) * 2,
    "joining": lambda x: torch.cat((x, x * 2), 1) + torch.concat((x, torch.zeros_like(x)), dim=1),
    "joining constants": lambda x: torch.cat((random(1, 2, 6, 6).expand(x.shape[0], -1, -1, -1), x), 1),
    "stacking": lambda x: torch.stack((x, x * 2), dim=1).sum(1) + torch.stack([x, x * 3]).mean(0),
    "stacking constants": lambda x: torch.stack((x, x.new_zeros(x.shape), torch.ones_like(x)), -1),
    "unbinding": lambda x: torch.unbind(x, 1)[0][:, None] * x.unbind(-1)[2][..., None],
    "chunks": lambda x: torch.chunk(x, 4, -1)[1] + x.chunk(4, 2)[0].mT[..., :2],
    "splits": lambda x: (
        torch.split(x, 4, -1)[1]
        + x.split([1, 2, 3], dim=3)[1]  # type: ignore[no-untyped-call]
        + torch.tensor_split(x, 3, 3)[0]
    ),
    "splits at places": lambda x: x.tensor_split((2, 4), dim=2)[1],
    "rolling": lambda x: torch.roll(x, (-2, 1), (2, 3)) + x.roll(1, -1) + x.roll(6, 2),
    "flipping": lambda x: torch.flip(x, (2, 3)) + x.flip(1) * 2,
    "expanding": lambda x: x[:, :1].expand(-1, 3, -1, -1) * x.mean((2, 3), True).expand_as(x),
    "repeating": lambda x: x.repeat(1, 2, 1, 3),
    "repeating each": lambda x: torch.repeat_interleave(x, 2, dim=1) + x.repeat_interleave(2, 1),
    "repeating each image": lambda x: x.repeat_interleave(4, dim=0).reshape(-1, 4, 3, 6, 6),
    "pixels and channels": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), 3),
    "padding": lambda x: F.pad(x, (1, 2), value=-torch.inf).exp() + F.pad(x, (1, 2), value=2.0),
    "padding by reflection": lambda x: (
        F.pad(x, (1, 2, 3, 0), mode="reflect") + F.pad(x, (1, 2, 3, 0), mode="replicate")
    ),
    "padding in a circle": lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"),
    "padding by less than nothing": lambda x: F.pad(x, (-1, 2, 0, -2)),
    "padding before a convolution": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=3.0), random(2, 3, 3, 3)),
    # parts
    "every second": lambda x: x[:, :, ::2, 1::2] + x[..., 1::2, ::2],
    "new axes": lambda x: x[:, None, 0, ..., None] * x[:, :1, :, :, None],
    "a list of places": lambda x: x[:, [2, 0]] + x[:, torch.tensor([0, 1])],
    "a table of places": lambda x: x[:, :, torch.tensor([[0, 1], [5, 2]])],
    "a mask of places": lambda x: x[:, torch.tensor([True, False, True])],
    "places from the end": lambda x: x[..., -1] + x[:, -1, -3:-1, :].select(1, 0)[:, None],
    "selecting": lambda x: (
        torch.select(x, 1, -1) + x.select(1, 1) + torch.narrow(x, 1, 1, 1)[:, 0] + x.narrow(1, -1, 1)[:, 0]
    ),
    "selecting several": lambda x: (
        torch.index_select(x, 1, torch.tensor([2, 2])) + x.index_select(-1, ORDER)[:, :1, :, :1]
    ),
    "windows": lambda x: x.unfold(2, 4, 2).unfold(3, 3, 3),
}


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
def test_a_graph_computes_what_the_function_computes(name: str) -> None:
    function = SAME_EVERYWHERE[name]
    graph = trace(Calls(function).eval(), resolution=6)
    images = random(3, 3, 6, 6)
    torch.testing.assert_close(graph.run(images), function(images.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
def test_shapes_are_those_of_one_image(name: str) -> None:
    graph = trace(Calls(SAME_EVERYWHERE[name]).eval(), resolution=6)
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tuple(tensor.shape)
        return tensor

    graph.run(random(1, 3, 6, 6), after=note)
    assert graph.shapes == seen


def test_every_translation_is_tried() -> None:
    called: set[Any] = set()

    class Listening(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func)
            return func(*args, **(kwargs or {}))

    images = random(1, 3, 6, 6)
    with Listening():
        for function in SAME_EVERYWHERE.values():
            function(images.clone())
    assert sorted(str(resolve_name(function)) for function in TRANSLATIONS.keys() - called) == []


REFUSED: dict[str, tuple[Function, str]] = {
    "a choice by what was computed": (lambda x: torch.where(x > 0, x, 2 * x), r"gt|>"),
    "a kernel that was computed": (lambda x: F.conv2d(x, x), "kernel depends on the images"),
    "weights that were computed": (lambda x: F.linear(x, x[0, 0]), "weights depend on the images"),
    "another type of number": (lambda x: x.to(torch.float64), "float64"),
    "half of the bits": (lambda x: x.half().float(), "half"),
    "the place of a maximum": (lambda x: x.max(1).indices * 2.0, "second result"),
    "a power that was computed": (lambda x: x.abs() ** x, "power that depends"),
    "the sum of absolute values": (lambda x: x.norm(p=1, dim=1), "norm 1"),
    "repeated letters": (lambda x: torch.einsum("bcii,bcii->bci", x, x), "einsum"),
    "two lists": (lambda x: x[:, [0, 1], [2, 3]], "list together"),
    "a list and a number": (lambda x: x[:, [0, 1], 2], "list together"),
    "an operation without a translation": (lambda x: maps(x).index_fill(1, ORDER, 0), "index_fill"),
    "all axes of size one": (lambda x: x.mean((2, 3), keepdim=True).squeeze(), "squeeze.*flatten"),
    "overlapping maxima": (lambda x: F.adaptive_max_pool2d(x, 4), r"\(6, 6\) to \(4, 4\)"),
    "dilated maxima": (lambda x: F.max_pool2d(x, 2, dilation=2), "dilation"),
    "constants of one image each": (
        lambda x: torch.cat((random(2, 3, 6, 6), x.repeat(2, 1, 1, 1)), 1),
        "other values for each image",
    ),
    "a sum over images": (lambda x: x.sum(0) + x, "second image"),
    "images in the middle of one axis": (lambda x: x.transpose(0, 1).reshape(9, 12) + 1, "mixes images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(Untraceable, match=message):
        trace(Calls(function).eval(), resolution=6)


def test_an_interpolation_by_whole_factors_is_one_operator() -> None:
    graph = trace(Calls(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")).eval(), resolution=4)
    assert [operator.kind for operator in graph.operators] == ["Resize"]


def test_shapes_that_stay_as_they_are_leave_no_operator() -> None:
    def function(x: Tensor) -> Tensor:
        return x.view(x.shape).roll(6, 2).expand(-1, 3, -1, -1).flip(()).contiguous() * 2

    assert [operator.kind for operator in trace(Calls(function).eval(), resolution=6).operators] == ["Mul"]
