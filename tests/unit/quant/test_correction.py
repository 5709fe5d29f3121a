from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from nestling.export import to_onnx
from nestling.models.graph import Graph
from nestling.quant import QuantPolicy, Range, insert_qdq, observe, simulate
from nestling.quant.correction import correct_biases
from nestling.quant.fake import rounded

ALL = QuantPolicy((("", "w8a8"),))


def means(graph: Graph, images: Tensor, ranges: Mapping[str, Range]) -> dict[str, Tensor]:
    """The mean output of each channel of each layer with weights, all rounded to `ranges`."""
    found: dict[str, Tensor] = {}
    weighted = {operator.name for operator in graph.operators if operator.weight is not None}

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in weighted:
            found[name] = tensor.movedim(1, 0).flatten(1).mean(1)
        return ranges[name].nearest(tensor) if name in ranges else tensor

    replace(graph, operators=tuple(rounded(o, ranges) for o in graph.operators)).run(images, after=look)
    return found


def error(graph: Graph, ranges: Mapping[str, Range], wanted: Tensor, images: Tensor) -> float:
    return float((simulate(graph, ranges).run(images) - wanted).square().mean())


def test_each_layer_has_the_mean_output_of_the_float_network(
    uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    corrected, ranges = correct_biases(uneven, coarse, images.chunk(4))
    wanted = means(uneven, images, {})
    before = means(uneven, images, coarse)
    after = means(corrected, images, ranges)
    assert len(wanted) == 6
    was_off = []
    for name, mean in wanted.items():
        half_a_step = 0.51 * ranges[f"{name}.bias"].scale + 1e-4
        assert ((after[name] - mean).abs() <= half_a_step).all()
        was_off.append(bool(((before[name] - mean).abs() > half_a_step).any()))
    assert all(was_off)


def test_a_corrected_network_errs_less(uneven: Graph, coarse: Mapping[str, Range], images: Tensor) -> None:
    seen, unseen = images[:48], images[48:]
    corrected, ranges = correct_biases(uneven, coarse, [seen])
    wanted = uneven.run(unseen)
    assert error(corrected, ranges, wanted, unseen) < 0.5 * error(uneven, coarse, wanted, unseen)


def without_bias(graph: Graph) -> Graph:
    return replace(graph, operators=tuple(replace(operator, bias=None) for operator in graph.operators))


def test_a_layer_without_a_bias_gets_one_that_the_file_adds_as_an_integer(
    uneven: Graph, images: Tensor
) -> None:
    graph = without_bias(uneven)
    observed = observe(graph, ALL, [images], reduce_range=True)
    corrected, ranges = correct_biases(graph, observed, [images])
    assert not any(name.endswith(".bias") for name in observed)
    assert sum(name.endswith(".bias") for name in ranges) == 6
    found, weight = ranges["2/Conv.bias"], ranges["2/Conv.weight"]
    assert found.dtype == "int32"
    assert torch.equal(found.scale, weight.scale * ranges["1/Relu"].scale)
    wanted = graph.run(images)
    assert error(corrected, ranges, wanted, images) < error(graph, observed, wanted, images)

    model = insert_qdq(to_onnx(corrected, dynamic_batch=True), ranges)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, {"images": images.numpy()})[0])
    expected = simulate(corrected, ranges).run(images).numpy()
    assert np.median(np.abs(got - expected)) < 1e-5 * np.abs(expected).max()


def test_weights_that_were_changed_are_held_to_the_network_they_come_from(
    uneven: Graph, coarse: Mapping[str, Range], images: Tensor
) -> None:
    weights = (None if operator.weight is None else 1.1 * operator.weight for operator in uneven.operators)
    changed = replace(
        uneven,
        operators=tuple(
            replace(operator, weight=weight)
            for operator, weight in zip(uneven.operators, weights, strict=True)
        ),
    )
    corrected, ranges = correct_biases(changed, coarse, [images], exact=uneven)
    wanted = means(uneven, images, {})["logits"]
    got = means(corrected, images, ranges)["logits"]
    assert torch.allclose(got, wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))


def test_images_are_needed(uneven: Graph, coarse: Mapping[str, Range]) -> None:
    with pytest.raises(ValueError, match="no calibration images"):
        correct_biases(uneven, coarse, [])
