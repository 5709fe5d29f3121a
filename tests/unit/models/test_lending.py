from __future__ import annotations

import math

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from nestling.models.layouts import Blocks, Grid, Kept, Layout, Part, Uncuttable
from nestling.models.lending import LendingError, cut, lend, lend_buffers, plan_cuts


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


def test_a_table_that_is_no_weight_is_not_lent() -> None:
    large, small = WithTable(6), WithTable(4)
    for network in (large, small):
        network.register_buffer("table", network.table, persistent=False)
    assert "table" not in lend_buffers(dict(large.named_buffers()), small)


def test_a_table_of_indices_is_lent_whole_or_not_at_all() -> None:
    large = WithTable(6)
    buffers = dict(large.named_buffers())
    assert lend_buffers(buffers, WithTable(6))["table"] is large.table
    with pytest.raises(LendingError, match=r"table: this buffer would change from \(6,\) to \(4,\)"):
        lend_buffers(buffers, WithTable(4))


FUSED = "attention.weight"


def planned(
    large: tuple[int, ...], small: tuple[int, ...], *, parts: tuple[Part, Part], axis: int = 0
) -> Tensor:
    """What is lent of an arange of shape `large`, one axis of which is laid out as `parts` say."""
    tensor = torch.arange(float(math.prod(large))).reshape(large)
    tensors = ({FUSED: tensor}, {FUSED: torch.empty(small)})
    cuts = plan_cuts(*tensors, layouts=({(FUSED, axis): parts[0]}, {(FUSED, axis): parts[1]}))
    return lend(*tensors, cuts=cuts)[FUSED]


def test_fused_queries_keys_and_values_are_each_cut_head_by_head() -> None:
    lent = planned((3 * 4 * 8, 5), (3 * 2 * 6, 3), parts=(Blocks((3, 4, 8)), Blocks((3, 2, 6))))
    whole = torch.arange(3.0 * 4 * 8 * 5).reshape(3, 4, 8, 5)
    assert torch.equal(lent, whole[:, :2, :6, :3].reshape(3 * 2 * 6, 3))


def test_blocks_that_keep_their_leading_part_whole_are_lent_as_a_view() -> None:
    tensor = torch.zeros(8, 2)
    layouts: tuple[Layout, Layout] = ({(FUSED, 0): Blocks((4, 2))}, {(FUSED, 0): Blocks((3, 2))})
    assert plan_cuts({FUSED: tensor}, {FUSED: torch.empty(6, 2)}, layouts=layouts) == {}


def test_positions_are_interpolated_as_timm_does_it_and_prefix_tokens_stay() -> None:
    table = torch.randn(1, 2 + 4 * 4, 6)
    layouts: tuple[Layout, Layout] = ({(FUSED, 1): Grid(2, 4, 4)}, {(FUSED, 1): Grid(2, 3, 2)})
    small = {FUSED: torch.empty(1, 2 + 6, 6)}
    lent = lend({FUSED: table}, small, cuts=plan_cuts({FUSED: table}, small, layouts=layouts))[FUSED]
    expected = resample_abs_pos_embed(table, [3, 2], old_size=[4, 4], num_prefix_tokens=2)
    assert torch.allclose(lent, expected, atol=1e-6)
    assert torch.equal(lent[:, :2], table[:, :2])


def test_interpolated_positions_may_be_narrower_too() -> None:
    table = torch.randn(1, 1 + 9, 6)
    layouts: tuple[Layout, Layout] = ({(FUSED, 1): Grid(1, 3, 3)}, {(FUSED, 1): Grid(1, 2, 2)})
    small = {FUSED: torch.empty(1, 5, 4)}
    lent = lend({FUSED: table}, small, cuts=plan_cuts({FUSED: table}, small, layouts=layouts))[FUSED]
    expected = resample_abs_pos_embed(table, [2, 2], old_size=[3, 3], num_prefix_tokens=1)[..., :4]
    assert torch.allclose(lent, expected, atol=1e-6)


def test_a_borrower_may_keep_any_positions() -> None:
    lent = planned((5, 2), (2, 2), parts=(Kept(tuple(range(5))), Kept((1, 4))))
    assert lent.tolist() == [[2, 3], [8, 9]]


def test_gradients_reach_the_positions_that_were_lent() -> None:
    weight = torch.zeros(6, requires_grad=True)
    small = {FUSED: torch.empty(2)}
    cuts = plan_cuts(
        {FUSED: weight}, small, layouts=({(FUSED, 0): Blocks((2, 3))}, {(FUSED, 0): Blocks((2, 1))})
    )
    torch.autograd.backward(lend({FUSED: weight}, small, cuts=cuts)[FUSED].sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("parts", "small", "message"),
    [
        ((Uncuttable("windows"), Uncuttable("windows")), (4,), f"{FUSED} would be cut from 6 to 4: windows"),
        ((Blocks((2, 3)), Blocks((3, 1))), (3,), r"blocks of \(3, 1\) do not fit.*\(2, 3\)"),
        ((Blocks((2, 3)), Grid(0, 2, 2)), (4,), "cannot be cut to Grid"),
        ((Kept(()), Kept((1, 6))), (2,), "2 positions of an axis of 6 are kept for one of 2"),
        ((Kept(()), Kept((1, 2))), (3,), "2 positions of an axis of 6 are kept for one of 3"),
    ],
)
def test_an_axis_whose_parts_do_not_fit_is_refused_with_the_reason(
    parts: tuple[Part, Part], small: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LendingError, match=message):
        planned((6,), small, parts=parts)


def test_an_axis_that_cannot_be_cut_is_lent_whole() -> None:
    parts = (Uncuttable("windows"), Uncuttable("windows"))
    assert torch.equal(planned((6,), (6,), parts=parts), torch.arange(6.0))


@pytest.mark.parametrize("side", [1, 3])
def test_kernels_of_kept_positions_lie_as_those_of_leading_ones(side: int) -> None:
    kernel = torch.randn(6, 4, side, side).clone(memory_format=torch.channels_last)
    small = {FUSED: torch.empty(2, 4, side, side)}
    layouts: tuple[Layout, Layout] = ({}, {(FUSED, 0): Kept((1, 4))})
    lent = lend({FUSED: kernel}, small, cuts=plan_cuts({FUSED: kernel}, small, layouts=layouts))[FUSED]
    assert lent.stride() == kernel[:2].stride()
    assert torch.equal(lent, kernel[[1, 4]])
