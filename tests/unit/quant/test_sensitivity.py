from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nestling.models.graph import Graph, trace
from nestling.quant import PRECISIONS, QuantPolicy, Recipe, quantize, simulate
from nestling.quant import sensitivity as sensitivity_of
from nestling.quant.constants import stored_weight
from nestling.quant.fake import rounded
from nestling.quant.formats import Format
from nestling.quant.observing import needed
from nestling.quant.quantizing import prepared
from nestling.quant.regions import WEIGHT_AXES
from nestling.quant.sensitivity import Sensitivity, _metadata, measure_sensitivity

MEASURED = ("w8a8", "w4a8", "w4", "bf16")
MIXED = QuantPolicy((("", "w8a8"), ("a", "w4a8"), ("wide", "w4"), ("b.conv1", "fp32"), ("head", "bf16")))


@pytest.fixture(scope="module")
def sensitivity(graph: Graph, images: Tensor) -> Sensitivity:
    return measure_sensitivity(graph, MEASURED, [images[:40], images[40:]], draws=8)


@pytest.fixture(scope="module")
def brute_force(graph: Graph, images: Tensor) -> Callable[[QuantPolicy], float]:
    """The divergence of a policy by quantizing and running it."""

    def divergence(policy: QuantPolicy) -> float:
        quantized = quantize(graph, policy, [images])
        with torch.no_grad():
            wanted = graph.run(images).double().log_softmax(1)
            got = simulate(quantized.graph, quantized.ranges).run(images).double().log_softmax(1)
        return float((wanted.exp() * (wanted - got)).sum(1).mean())

    return divergence


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4"])
def test_one_pass_tells_the_divergence_that_quantizing_each_layer_alone_gives(
    sensitivity: Sensitivity, brute_force: Callable[[QuantPolicy], float], precision: str
) -> None:
    layers = sensitivity.by_layer()
    assert next(iter(layers)) == "stem"
    assert list(layers)[-1] == "classifier"
    told = torch.tensor([found[precision] for found in layers.values()])
    true = torch.tensor([brute_force(QuantPolicy(((layer, precision),))) for layer in layers])
    assert told == pytest.approx(true, rel=0.5)
    ranks = torch.stack([told.argsort().argsort(), true.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9


def test_what_is_read_from_a_file_tells_every_policy_the_same(sensitivity: Sensitivity, graph: Graph) -> None:
    again = Sensitivity.from_bytes(graph, MEASURED, sensitivity.to_bytes())
    assert again.parts.keys() == sensitivity.parts.keys()
    assert again.precisions == sensitivity.precisions
    assert again.divergence(MIXED) == sensitivity.divergence(MIXED) > 0


@pytest.mark.parametrize("precisions", [["w8a8", "bf16"], [*MEASURED, "w2a8"]])
def test_what_is_read_from_a_file_of_other_precisions_is_refused(
    sensitivity: Sensitivity, graph: Graph, precisions: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"not to {', '.join(precisions)}"):
        Sensitivity.from_bytes(graph, precisions, sensitivity.to_bytes())


def test_a_file_that_lacks_a_part_or_is_damaged_is_refused(sensitivity: Sensitivity, graph: Graph) -> None:
    whole = sensitivity.to_bytes()
    fewer = dict(list(sensitivity.parts.items())[1:])
    # as if what was measured were less than what was asked for
    odd = safetensors.torch.save(
        safetensors.torch.load(replace(sensitivity, parts=fewer).to_bytes()), metadata=_metadata(whole)
    )
    plain = safetensors.torch.save(safetensors.torch.load(whole))
    for damaged in (odd, plain, whole[:-1], whole[:100], b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}"):
        with pytest.raises(ValueError, match="sensitivity"):
            Sensitivity.from_bytes(graph, MEASURED, damaged)


def test_tensors_of_one_scale_lose_what_that_scale_costs_them(graph: Graph, images: Tensor) -> None:
    everywhere = QuantPolicy((("", "w8a8"),))
    with torch.no_grad():
        wanted = graph.run(images).double().log_softmax(1)
    told, true = [], []
    for shared in ((), ("Add",)):
        found = measure_sensitivity(graph, ["w8a8"], [images], shared=shared, draws=8)
        told.append(found.divergence(everywhere))
        quantized = quantize(graph, everywhere, [images], recipe=Recipe(shared=shared))
        with torch.no_grad():
            got = simulate(quantized.graph, quantized.ranges).run(images).double().log_softmax(1)
        true.append(float((wanted.exp() * (wanted - got)).sum(1).mean()))
    assert told[1] / told[0] == pytest.approx(true[1] / true[0], rel=0.3)
    assert told[1] > 1.05 * told[0]


class Twice(nn.Module):
    """Two equal convolutions, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.second.load_state_dict(self.first.state_dict())
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head((self.first(images) + self.second(images)).mean((2, 3)))
        assert isinstance(logits, Tensor)
        return logits


def test_errors_that_strengthen_one_another_count_more_than_their_sum(images: Tensor) -> None:
    torch.manual_seed(0)
    found = measure_sensitivity(trace(Twice().eval(), resolution=12), ["w4"], [images])
    alone = found.divergence(QuantPolicy((("first", "w4"),)))
    assert alone > 0
    both = found.divergence(QuantPolicy((("first", "w4"), ("second", "w4"))))
    assert both == pytest.approx(4 * alone, rel=1e-3)


def test_a_number_that_is_only_carried_on_is_rounded_to_16_bits_once(images: Tensor) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = nn.Sequential(nn.Sequential(*layers), nn.Linear(400, 5)).eval()
    found = measure_sensitivity(trace(network, resolution=12), ["bf16"], [images])
    parts = {name for name, to in found.parts if to == "bfloat16"}
    written = QuantPolicy((("0.0", "bf16"),)), QuantPolicy((("0", "bf16"),))
    assert len(parts) >= 5
    assert found.divergence(written[0]) == pytest.approx(found.divergence(written[1]), rel=1e-9)


def test_one_pass_tells_the_divergence_of_policies_that_mix_precisions(
    sensitivity: Sensitivity, brute_force: Callable[[QuantPolicy], float]
) -> None:
    for policy in (MIXED, QuantPolicy((("", "w8a8"),)), QuantPolicy((("a", "w8a8"), ("b", "w8a8")))):
        assert sensitivity.divergence(policy) == pytest.approx(brute_force(policy), rel=0.4)
    assert sensitivity.divergence(QuantPolicy()) == 0.0


@pytest.fixture(scope="module")
def gated() -> Graph:
    """Hard swishes before a convolution, the pooling and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.Hardswish()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(16, 5)]
    return trace(nn.Sequential(*layers, *last).eval(), resolution=12)


GATED = (
    QuantPolicy((("", "w8a8"),)),
    QuantPolicy((("", "w8a8"), ("1", "fp32"))),
    QuantPolicy((("", "w8a8"), ("2", "w4"), ("6", "bf16"))),
)


@pytest.mark.parametrize("policy", GATED)
def test_every_tensor_that_the_file_rounds_is_looked_at_gates_among_them(
    gated: Graph, images: Tensor, policy: QuantPolicy
) -> None:
    found = measure_sensitivity(gated, ["w8a8", "w4", "bf16"], [images[:8]])
    looked_at = {name for name, to in found.parts if isinstance(to, Format)}
    wanted = needed(prepared(gated, policy), policy)
    assert any(name.endswith(".gate") for name in wanted)
    assert {name.removesuffix(".bfloat16") for name in wanted} <= looked_at
    counted = {name for name, to in sensitivity_of._parts(gated, policy) if isinstance(to, Format)}
    assert counted == {name.removesuffix(".bfloat16") for name in wanted}


@pytest.mark.parametrize("name", [name for name in PRECISIONS if name not in ("fp32", "fp16", "bf16")])
def test_the_weight_that_is_looked_at_is_the_one_that_is_simulated(
    graph: Graph, images: Tensor, name: str
) -> None:
    policy = QuantPolicy((("", name),))
    recipe = Recipe(weights="mse")
    quantized = quantize(graph, policy, [images[:4]], recipe=recipe, reduce_range=True)
    simulated = {o.name: rounded(o, quantized.ranges) for o in quantized.graph.operators}
    for operator in graph.operators:
        if operator.kind in WEIGHT_AXES and operator.weight is not None:
            weight = stored_weight(
                operator.constant(),
                PRECISIONS[name],
                axis=WEIGHT_AXES[operator.kind],
                weights="mse",
                reduce_range=True,
            )
            assert torch.allclose(weight, simulated[operator.name].constant(), rtol=1e-5, atol=1e-7)


def test_the_same_images_in_other_batches_and_draws_tell_nearly_the_same(
    graph: Graph, images: Tensor
) -> None:
    one = measure_sensitivity(graph, ["w8a8"], [images], draws=4)
    other = measure_sensitivity(graph, ["w8a8"], torch.split(images, 20), draws=4, seed=1)
    policy = QuantPolicy((("", "w8a8"),))
    assert one.divergence(policy) == pytest.approx(other.divergence(policy), rel=0.3)
    assert all(len(moved) == 4 * len(images) for moved in other.parts.values())


def test_a_precision_that_was_not_looked_at_is_refused(sensitivity: Sensitivity) -> None:
    with pytest.raises(ValueError, match="the sensitivity to 'fp8' was not measured; only to w8a8, w4a8"):
        sensitivity.divergence(QuantPolicy((("stem", "fp8"),)))


def test_without_images_nothing_is_told(graph: Graph) -> None:
    with pytest.raises(ValueError, match="no images; sensitivity needs at least one batch"):
        measure_sensitivity(graph, ["w4"], [])


def test_weights_keep_no_gradients(graph: Graph, images: Tensor, sensitivity: Sensitivity) -> None:
    assert sensitivity.parts
    assert all(o.weight.grad is None for o in graph.operators if o.weight is not None)
    assert images.grad is None
