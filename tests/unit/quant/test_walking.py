from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestling.models.graph import Graph, Operator
from nestling.quant import Range
from nestling.quant.fake import rounded
from nestling.quant.walking import Reading, walk


def test_a_layer_is_given_what_the_float_and_the_quantized_network_hold(
    graph: Graph, uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    floats: dict[str, Tensor] = {}
    nearest: dict[str, Tensor] = {}
    uneven.run(images, after=lambda name, tensor: floats.setdefault(name, tensor))

    def keep(name: str, tensor: Tensor) -> Tensor:
        return nearest.setdefault(name, coarse[name].nearest(tensor) if name in coarse else tensor)

    replace(uneven, operators=tuple(rounded(o, coarse) for o in uneven.operators)).run(images, after=keep)
    seen = []

    def look(operator: Operator, reading: Reading) -> Operator:
        (read,) = operator.inputs
        assert torch.allclose(torch.cat(reading.exact), floats[read], rtol=1e-4, atol=1e-5)
        assert torch.allclose(torch.cat(reading.wanted), floats[operator.name], rtol=1e-4, atol=1e-4)
        differs = (torch.cat(reading.rounded) - nearest[read]).abs() > 1e-5
        assert differs.float().mean() < 0.01  # halves may fall either way
        assert reading.images == len(images)
        seen.append(operator.name)
        return operator

    walked = walk(uneven, coarse, images.chunk(3), look)
    assert len(seen) == 6
    assert walked.operators == uneven.operators
    assert len(graph.operators) != len(uneven.operators)


def test_a_changed_layer_is_what_the_next_one_sees(
    uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    read: list[Tensor] = []

    def silence(operator: Operator, reading: Reading) -> Operator:
        read.append(torch.cat(reading.rounded))
        assert operator.bias is not None
        return replace(operator, weight=0 * operator.constant(), bias=0 * operator.bias)

    walk(uneven, coarse, [images], silence)
    assert [bool(tensor.any()) for tensor in read] == [True, False, False, False, False, False]


def test_layers_without_a_range_are_left(uneven: Graph, images: Tensor) -> None:
    def refuse(operator: Operator, reading: Reading) -> Operator:
        raise AssertionError(f"{operator.name} {reading}")

    assert walk(uneven, {}, [images], refuse).operators == uneven.operators


def test_images_are_needed_and_must_fit(uneven: Graph, graph: Graph, images: Tensor) -> None:
    with pytest.raises(ValueError, match="no calibration images"):
        walk(uneven, {}, [], lambda operator, _: operator)
    with pytest.raises(ValueError, match=r"takes images \(N, 3, 12, 12\), not \(64, 3, 10, 10\)"):
        walk(uneven, {}, [images[:, :, :10, :10]], lambda operator, _: operator)
    with pytest.raises(ValueError, match="other operators"):
        walk(uneven, {}, [images], lambda operator, _: operator, exact=graph)
