from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.models.lending import LendingError, cut, lend, lend_buffers


class WithTable(nn.Module):
    table: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(size)
        self.register_buffer("table", torch.arange(size))


def test_a_smaller_network_gets_the_leading_channels() -> None:
    weight = torch.randn(6, 4)
    assert torch.equal(cut(weight, (3, 2), name="w"), weight[:3, :2])


def test_a_smaller_kernel_is_the_centre_of_the_large_one() -> None:
    weight = torch.randn(6, 4, 7, 5)
    assert torch.equal(cut(weight, (2, 4, 3, 5), name="w"), weight[:2, :, 2:5])
    assert torch.equal(cut(weight, (6, 4, 7, 1), name="w"), weight[..., 2:3])


def test_a_position_table_of_three_axes_is_cut_from_its_start() -> None:
    table = torch.randn(1, 9, 8)
    assert torch.equal(cut(table, (1, 9, 4), name="pos"), table[:, :, :4])


def test_a_tensor_of_the_same_shape_is_lent_as_it_is() -> None:
    weight = torch.randn(3, 3)
    assert cut(weight, (3, 3), name="w") is weight


def test_gradients_of_a_lent_part_reach_the_large_tensor_and_nothing_else_of_it() -> None:
    weight = torch.zeros(4, 2, 5, 5, requires_grad=True)
    part = cut(weight, (3, 1, 3, 3), name="w")
    assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    torch.autograd.backward(part.sum())
    expected = torch.zeros(4, 2, 5, 5)
    expected[:3, :1, 1:4, 1:4] = 1
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("shape", [(5, 4), (4,), (4, 4, 1)])
def test_a_shape_that_does_not_fit_is_refused_with_name_and_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(LendingError, match=r"fc\.weight.*\(4, 4\)") as caught:
        cut(torch.zeros(4, 4), shape, name="fc.weight")
    assert str(shape) in str(caught.value)


def test_lending_cuts_each_parameter_to_the_shape_of_its_namesake() -> None:
    large, small = nn.Linear(6, 4), nn.Linear(3, 2)
    lent = lend(dict(large.named_parameters()), dict(small.named_parameters()))
    assert torch.equal(lent["weight"], large.weight[:2, :3])
    assert torch.equal(lent["bias"], large.bias[:2])


def test_a_parameter_that_the_large_network_lacks_is_named() -> None:
    large, small = nn.Linear(6, 4, bias=False), nn.Linear(3, 2)
    with pytest.raises(LendingError, match="bias: the largest network has no such tensor"):
        lend(dict(large.named_parameters()), dict(small.named_parameters()))


def test_statistics_of_normalization_are_cut() -> None:
    large, small = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
    nn.init.uniform_(large.running_mean) if large.running_mean is not None else None
    lent = lend_buffers(dict(large.named_buffers()), small)
    assert large.running_mean is not None
    assert torch.equal(lent["running_mean"], large.running_mean[:4])
    assert lent["num_batches_tracked"] is large.num_batches_tracked


def test_a_table_of_indices_is_lent_whole_or_not_at_all() -> None:
    large = WithTable(6)
    buffers = dict(large.named_buffers())
    assert lend_buffers(buffers, WithTable(6))["table"] is large.table
    with pytest.raises(LendingError, match=r"table: this buffer would change from \(6,\) to \(4,\)"):
        lend_buffers(buffers, WithTable(4))
