from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.models.operators import Attribute, Operator, compute
from nestling.quant.moments import as_matrix, from_matrix, output_errors, rows_read, second_moments


def convolution(channels: int, *, inputs: int, kernel: tuple[int, ...], **options: Attribute) -> Operator:
    attributes: dict[str, Attribute] = {
        "strides": (1,) * len(kernel),
        "dilations": (1,) * len(kernel),
        "pads": (0,) * 2 * len(kernel),
        "group": 1,
        **options,
    }
    return Operator("Conv", "y", ("x",), "", attributes, torch.randn(channels, inputs, *kernel))


torch.manual_seed(0)
LAYERS = {
    "convolution": (convolution(6, inputs=4, kernel=(3, 3), pads=(1, 1, 1, 1)), torch.randn(5, 4, 7, 6)),
    "strides": (convolution(6, inputs=4, kernel=(3, 2), strides=(2, 3)), torch.randn(5, 4, 9, 9)),
    "uneven padding": (convolution(6, inputs=4, kernel=(2, 4), pads=(0, 1, 1, 3)), torch.randn(5, 4, 6, 6)),
    "dilations": (convolution(6, inputs=4, kernel=(3, 3), dilations=(2, 1)), torch.randn(5, 4, 8, 8)),
    "groups": (convolution(6, inputs=2, kernel=(3, 3), group=2), torch.randn(5, 4, 5, 5)),
    "depthwise": (convolution(8, inputs=1, kernel=(3, 3), group=4), torch.randn(5, 4, 5, 5)),
    "one axis": (convolution(6, inputs=4, kernel=(3,), pads=(1, 2)), torch.randn(5, 4, 9)),
    "linear": (Operator("Gemm", "y", ("x",), "", {}, torch.randn(6, 4)), torch.randn(20, 4)),
    "product": (Operator("MatMul", "y", ("x",), "", {}, torch.randn(4, 6)), torch.randn(5, 3, 4)),
}


def sizes(layer: Operator, output: Tensor) -> Tensor:
    """The mean square of each output channel."""
    return output.movedim(1 if layer.kind == "Conv" else -1, 0).flatten(1).square().mean(1)


@pytest.mark.parametrize("name", LAYERS)
def test_second_moments_tell_the_size_of_the_output_of_any_weights(name: str) -> None:
    layer, read = LAYERS[name]
    rows = rows_read(layer, (read[:2], read[2:]), seed=0)
    found = output_errors(as_matrix(layer, layer.constant()), second_moments(rows)).flatten()
    assert torch.allclose(found, sizes(layer, compute(layer, read)), rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_goes_back_into_the_shape_of_the_weight(name: str) -> None:
    layer, _ = LAYERS[name]
    assert torch.equal(from_matrix(layer, as_matrix(layer, layer.constant())), layer.constant())


def test_of_many_positions_a_random_part_is_taken_the_same_for_the_same_seed() -> None:
    layer = convolution(2, inputs=1, kernel=(1, 1))
    maps = torch.arange(2 * 1 * 128 * 128.0).reshape(2, 1, 128, 128)
    rows = [rows_read(layer, (maps,), seed=seed) for seed in (0, 0, 1)]
    assert rows[0].shape == (1, 2048, 1)
    assert len(set(rows[0].flatten().tolist())) == 2048
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    linear = Operator("Gemm", "y", ("x",), "", {}, torch.randn(6, 1))
    read = rows_read(linear, (torch.arange(9000.0)[:, None],), seed=0)
    assert len(set(read.flatten().tolist())) == 2048
