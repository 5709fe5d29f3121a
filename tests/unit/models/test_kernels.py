from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestling.models.kernels import TouchingConv2d, compute_touching_part, touching


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_touching_part_computes_what_the_whole_kernel_computes(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    pad = kernel // 2
    weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64)
    for size in range(1, 11):
        image = torch.randn(1, 2, size, size, dtype=torch.float64)
        whole = F.conv2d(image, weight, stride=stride, padding=pad, groups=2)
        low, high = touching(kernel, stride=stride, padding=pad, size=size)
        part = weight[:, :, pad - low : pad + high + 1, pad - low : pad + high + 1]
        cropped = F.conv2d(image, part, stride=stride, padding=low, groups=2)
        assert cropped.shape == whole.shape, size
        assert torch.allclose(cropped, whole, rtol=1e-12, atol=1e-12), size


def test_every_tap_of_the_touching_part_meets_the_map() -> None:
    for kernel, stride, size in itertools.product((3, 5, 7), (1, 2), range(1, 9)):
        pad = kernel // 2
        low, high = touching(kernel, stride=stride, padding=pad, size=size)
        outputs = (size - 1) // stride + 1
        met = {
            tap
            for output, tap in itertools.product(range(outputs), range(-pad, pad + 1))
            if 0 <= output * stride + tap < size
        }
        assert (-low, high) == (min(met), max(met)), (kernel, stride, size)


def test_another_padding_keeps_the_whole_kernel() -> None:
    low, high = touching(7, stride=1, padding=0, size=9)
    assert (low, high) == (0, 6)
    layer, cropping = nn.Conv2d(4, 4, 5, padding=1, groups=4), nn.Conv2d(4, 4, 5, padding=1, groups=4)
    cropping.load_state_dict(layer.state_dict())
    compute_touching_part(cropping)
    image = torch.randn(2, 4, 4, 4)
    assert torch.equal(layer(image), cropping(image))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 2), (9, 9)])
@pytest.mark.parametrize("kernel", [(7, 7), (3, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_cropping_layer_equals_the_layer_it_was(
    size: tuple[int, int], kernel: tuple[int, int], stride: int
) -> None:
    torch.manual_seed(0)
    pad = (kernel[0] // 2, kernel[1] // 2)
    layer = nn.Conv2d(4, 4, kernel, stride=stride, padding=pad, groups=4).double()
    image = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    whole = layer(image)
    torch.autograd.backward(whole.square().sum())
    assert layer.weight.grad is not None
    expected, layer.weight.grad = layer.weight.grad, None
    compute_touching_part(layer)
    assert isinstance(layer, TouchingConv2d)
    cropped = layer(image)
    assert torch.allclose(cropped, whole, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(cropped.square().sum())
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_only_depthwise_convolutions_with_zero_padding_in_numbers_are_changed() -> None:
    kept = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Conv2d(4, 4, 1, groups=4),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
            nn.Conv2d(4, 4, 3, padding="same", groups=4),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
            nn.Conv2d(1, 1, 3, padding=1),
        ]
    )
    compute_touching_part(kept)
    assert not any(isinstance(layer, TouchingConv2d) for layer in kept)
