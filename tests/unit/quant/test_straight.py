from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestling.quant import Range
from nestling.quant.straight import instead, nearest, nearest_by_statistics, slope_of, statistical_scale


def one(dtype: str, *, scale: float, zero_point: int = 0) -> Range:
    return Range(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), dtype, None)


def per_channel(dtype: str, *, axis: int, channels: int) -> Range:
    scale = 0.05 * (1 + torch.arange(channels, dtype=torch.float32))
    return Range(scale, torch.zeros(channels, dtype=torch.int32), dtype, axis)


def blocked() -> Range:
    generator = torch.Generator().manual_seed(2)
    scale = 0.05 + torch.rand(4, 2, generator=generator)
    zero_point = torch.randint(0, 15, (4, 2), generator=generator, dtype=torch.int32)
    return Range(scale, zero_point, "uint4", 0, 16)


@pytest.fixture
def numbers() -> Tensor:
    return torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize(
    "found",
    [
        one("uint8", scale=0.013, zero_point=77),
        one("int4", scale=0.2),
        per_channel("int8", axis=0, channels=4),
        per_channel("int2", axis=1, channels=3),
        per_channel("int32", axis=0, channels=4),
        blocked(),
    ],
)
def test_rounding_is_that_of_the_range_to_the_last_bit(found: Range, numbers: Tensor) -> None:
    expected = found.nearest(numbers)
    assert torch.equal(nearest(numbers, found, slope=1.0), expected)
    assert torch.equal(nearest_by_statistics(numbers, found, margin=0.1), expected)


def test_gradients_of_a_scale_are_those_of_lsq() -> None:
    # integers -2..1; in steps of 0.5 the numbers are at -3, -1.2, 0.4, 3
    found = Range(torch.tensor(0.5, requires_grad=True), torch.tensor(0, dtype=torch.int32), "int2", None)
    numbers = torch.tensor([-1.5, -0.6, 0.2, 1.5], requires_grad=True)
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    torch.autograd.backward((nearest(numbers, found, slope=0.5) * upstream).sum())
    assert numbers.grad is not None
    assert found.scale.grad is not None
    assert numbers.grad.tolist() == [0.0, 10.0, 100.0, 0.0]
    by_hand = 1 * -2 + 10 * (-1 + 1.2) + 100 * (0 - 0.4) + 1000 * 1
    assert float(found.scale.grad) == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_scales_of_channels_and_blocks_learn_from_their_own_numbers() -> None:
    for found, rows in ((per_channel("int4", axis=0, channels=4), 4), (blocked(), 4)):
        scale = found.scale.clone().requires_grad_()
        learning = Range(scale, found.zero_point, found.dtype, found.axis, found.block)
        weight = torch.randn(rows, 3, 7, generator=torch.Generator().manual_seed(3))
        torch.autograd.backward(nearest(weight, learning, slope=1.0)[1].sum())
        assert scale.grad is not None
        assert scale.grad[1].abs().max() > 0
        assert scale.grad[[0, 2, 3]].abs().max() == 0


def test_zero_points_count_for_where_a_range_ends() -> None:
    found = one("uint4", scale=1.0, zero_point=10)  # from -10 to 5
    numbers = torch.tensor([-11.0, -9.0, 4.0, 6.0], requires_grad=True)
    torch.autograd.backward(nearest(numbers, found, slope=1.0).sum())
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_slopes_are_those_of_the_paper() -> None:
    assert slope_of(one("int8", scale=1.0), 100) == pytest.approx(1 / math.sqrt(100 * 128))
    assert slope_of(one("uint4", scale=1.0), 50) == pytest.approx(1 / math.sqrt(50 * 15))


def test_with_statistical_scales_numbers_beyond_the_range_learn_too() -> None:
    numbers = torch.tensor([-9.0, 0.2, 9.0], requires_grad=True)
    torch.autograd.backward(nearest_by_statistics(numbers, one("int2", scale=1.0)).sum())
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [1.0, 1.0, 1.0]


def test_with_a_margin_only_undecided_numbers_learn() -> None:
    numbers = torch.tensor([0.1, 0.44, 0.46, 0.54, 0.56, -0.46, -0.44, 1.5], requires_grad=True)
    torch.autograd.backward(nearest_by_statistics(numbers, one("int4", scale=1.0), margin=0.05).sum())
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [0, 0, 1, 1, 0, 1, 0, 1]


def test_a_statistical_scale_is_twice_the_mean_magnitude_over_the_integers() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0], [0.5, 0.5]])
    found = per_channel("int2", axis=0, channels=3)
    assert statistical_scale(weight, found).tolist() == [2.0, 1.0, 0.5]
    assert float(statistical_scale(weight, one("int4", scale=1.0))) == pytest.approx(2 * 5 / 6 / 8)
    with pytest.raises(ValueError, match="not for groups"):
        statistical_scale(torch.ones(4, 21), blocked())


def test_one_tensor_can_have_the_value_of_another() -> None:
    tensor = torch.ones(3, requires_grad=True)
    result = instead(tensor, torch.tensor([5.0, 6.0, 7.0]))
    torch.autograd.backward((2 * result).sum())
    assert result.tolist() == [5.0, 6.0, 7.0]
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [2.0, 2.0, 2.0]
