from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestling.models.convolutions import (
    POSITIONS,
    PointwiseConv2d,
    compute_by_products,
    depthwise,
    depthwise_weight_gradient,
    pointwise,
)
from nestling.models.kernels import TouchingConv2d, compute_touching_part

LAST = torch.channels_last


class Called(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes the names of the operators that run, and the shapes of what they read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []
        self.kernels: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        name = str(func.overloadpacket).removeprefix("aten.")
        self.operators.append(name)
        if name == "convolution_backward":
            self.kernels.append(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest number that is wanted."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def gradients(layer: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What `layer` gives, and the gradients of the images and the parameters for a weighted sum of it."""
    images = images.detach().requires_grad_()
    given = layer(images)
    learning = dict(layer.named_parameters())
    found = torch.autograd.grad((given * weights.to(given.dtype)).sum(), [images, *learning.values()])
    return {"given": given.detach(), **dict(zip(["images", *learning], found, strict=True))}


def check_like_double(fast: nn.Module, images: Tensor) -> None:
    """Looks whether `fast` gives the numbers, and the gradients, of the same ordinary layer in 64 bits."""
    plain = copy.deepcopy(fast)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    with torch.no_grad():
        weights = torch.randn_like(plain(images))
    wanted = gradients(plain.double(), images.double(), weights)
    for name, found in gradients(fast, images, weights).items():
        assert found.shape == wanted[name].shape, name
        assert apart(found, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8)])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_a_pointwise_layer_has_the_gradients_of_the_layer_it_was(
    size: tuple[int, int], bias: bool, layout: torch.memory_format
) -> None:
    layer = nn.Conv2d(12, 20, 1, bias=bias)
    compute_by_products(layer)
    assert isinstance(layer, PointwiseConv2d)
    check_like_double(layer, torch.randn(4, 12, *size).contiguous(memory_format=layout))


def test_a_product_reads_a_part_of_a_larger_weight_and_gives_channels_last() -> None:
    large = torch.randn(24, 16, 1, 1).contiguous(memory_format=LAST)
    images = torch.randn(2, 12, 4, 4).contiguous(memory_format=LAST)
    found = pointwise(images, large[:20, :12], None)
    assert found.is_contiguous(memory_format=LAST)
    assert apart(found, F.conv2d(images.double(), large[:20, :12].double())) < 1e-6


def test_a_product_is_only_what_gradients_and_few_positions_ask_for() -> None:
    layer = nn.Conv2d(2, 2, 1)
    compute_by_products(layer)
    few, many = torch.randn(1, 2, 64, POSITIONS // 64), torch.randn(1, 2, 65, POSITIONS // 64)

    def is_product(images: Tensor) -> bool:
        with Called() as called:
            layer(images)
        assert len({"convolution", "addmm"} & set(called.operators)) == 1
        return "addmm" in called.operators

    assert is_product(few)
    assert not is_product(many)
    with torch.no_grad():
        assert not is_product(few)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_product(few)


def test_only_full_1x1_convolutions_without_padding_or_steps_are_changed() -> None:
    kept = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1, groups=4),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Conv2d(4, 4, 1, stride=2),
            nn.Conv2d(4, 4, 1, padding=1),
            nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        ]
    )
    compute_by_products(kept)
    assert {type(layer) for layer in kept} == {nn.Conv2d}


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (4, 5), (5, 5), (6, 6), (7, 7), (3, 7), (9, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 3)])
def test_the_gradient_of_a_depthwise_kernel_is_put_together_right(
    kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    paddings = {(0, 0), tuple(side // 2 for side in kernel), tuple((side - 1) // 2 for side in kernel)}
    for padding, size in itertools.product(paddings, [(1, 1), (2, 2), (4, 4), (5, 8), (9, 3)]):
        if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
            continue
        images = torch.randn(2, 4, *size, dtype=torch.float64)
        weight = torch.randn(4, 1, *kernel, dtype=torch.float64, requires_grad=True)
        given = F.conv2d(images, weight, None, stride, padding, 1, 4)
        gradient = torch.randn_like(given)
        (wanted,) = torch.autograd.grad(given, weight, gradient)
        found = depthwise_weight_gradient(
            images, gradient, kernel=kernel, stride=stride, padding=(padding[0], padding[1])
        )
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12), (padding, size)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (5, 2), (7, 1), (7, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_depthwise_layer_has_the_gradients_of_the_layer_it_was(
    kernel: int, stride: int, bias: bool
) -> None:
    for size in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 15)):
        layer = nn.Conv2d(24, 24, kernel, stride, kernel // 2, groups=24, bias=bias)
        compute_touching_part(layer)
        assert isinstance(layer, TouchingConv2d)
        check_like_double(layer, torch.randn(3, 24, *size).contiguous(memory_format=LAST))


def test_a_wide_depthwise_kernel_is_never_computed_whole_in_a_backward_pass_of_its_weight() -> None:
    for width, size in ((5, 8), (6, 8), (7, 8), (7, 16), (3, 2)):
        images = torch.randn(2, 16, size, size).contiguous(memory_format=LAST)
        weight = torch.randn(16, 1, width, width, requires_grad=True)
        for stride in (1, 2):
            padding = (width // 2, width // 2)
            given = depthwise(images, weight, None, stride=(stride, stride), padding=padding)
            with Called() as called:
                torch.autograd.backward(given.sum())
            widths = [columns for _, columns in called.kernels]
            assert sum(widths) == width
            # a single column is as slow as a whole kernel where there are steps
            assert all(2 <= columns <= 3 for columns in widths), (width, size, stride)


def test_a_frozen_depthwise_weight_gets_no_gradient() -> None:
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.randn(8, 1, 5, 5)
    with Called() as called:
        torch.autograd.backward(depthwise(images, weight, None, stride=(1, 1), padding=(2, 2)).sum())
    assert images.grad is not None
    assert weight.grad is None
    assert called.operators.count("convolution_backward") == 1


def test_without_gradients_a_depthwise_convolution_is_the_ordinary_one_to_the_last_bit() -> None:
    images, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 5, 5)
    with torch.no_grad():
        found = depthwise(images, weight, None, stride=(1, 1), padding=(2, 2))
        assert torch.equal(found, F.conv2d(images, weight, None, 1, 2, 1, 8))
