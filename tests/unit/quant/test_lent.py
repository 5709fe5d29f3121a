from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.models.compiling import call_lent
from nestling.quant import PRECISIONS, QuantPolicy, Range
from nestling.quant.calibration import WeightMethod
from nestling.quant.constants import grouped_range, stored_weight, weight_range
from nestling.quant.formats import Format, Minifloat
from nestling.quant.lent import rounded_call, rounded_weight, spanning_range
from nestling.quant.ranges import activation_range


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        result = self.head(self.norm(self.stem(images)).relu().mean((2, 3)))
        assert isinstance(result, Tensor)
        return result


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Small().train()


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize("weights", ["minmax", "mse"])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-tensor", "w4a4", "w2a8"])
def test_weights_are_rounded_as_they_are_after_training(
    name: str, weights: WeightMethod, network: nn.Module
) -> None:
    format = PRECISIONS[name].weight
    assert isinstance(format, Format)
    for layer in ("stem", "head"):
        weight = network.get_parameter(f"{layer}.weight")
        expected = weight_range(weight, format, axis=0, weights=weights).nearest(weight.detach())
        assert torch.equal(rounded_weight(weight, PRECISIONS[name], weights=weights), expected)


@pytest.mark.parametrize("weights", ["minmax", "mse"])
@pytest.mark.parametrize("name", [name for name in PRECISIONS if name not in ("fp16", "bf16")])
def test_weights_are_rounded_to_what_is_stored_of_them(
    name: str, weights: WeightMethod, network: nn.Module
) -> None:
    weight, precision = network.get_parameter("stem.weight"), PRECISIONS[name]
    expected = stored_weight(weight.detach(), precision, axis=0, weights=weights)
    assert torch.equal(rounded_weight(weight, precision, weights=weights), expected)


def test_a_call_rounds_weights_by_the_method_that_it_was_given() -> None:
    network, format = nn.Sequential(nn.Linear(4096, 2, bias=False)), PRECISIONS["w8a8"].weight
    assert isinstance(format, Format)
    drawn = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))  # many weights near zero
    methods: tuple[WeightMethod, ...] = ("minmax", "mse")
    computed = []
    for weights in methods:
        call = rounded_call(QuantPolicy((("", "w8a8"),)), weights=weights)
        assert call is not None
        computed.append(call(network, {"0.weight": drawn}, torch.ones(1, 4096)))
        expected = weight_range(drawn, format, axis=0, weights=weights).nearest(drawn)
        assert torch.allclose(computed[-1][0], expected.sum(1), atol=1e-3)
    assert not torch.allclose(computed[0], computed[1], atol=1e-2)


def test_weights_in_groups_and_on_codes_are_too(network: nn.Module) -> None:
    weight = network.get_parameter("stem.weight")
    grouped, code = PRECISIONS["w4"].weight, PRECISIONS["fp4"].weight
    assert isinstance(grouped, Format)
    assert isinstance(code, Minifloat)
    expected = grouped_range(weight, grouped, axis=0).nearest(weight.detach())
    assert torch.equal(rounded_weight(weight, PRECISIONS["w4"]), expected)
    assert torch.equal(rounded_weight(weight, PRECISIONS["fp4"]), code.nearest(weight.detach(), axis=0))


@pytest.mark.parametrize("name", ["w8a8", "w8a8-signed", "w4a4"])
@pytest.mark.parametrize("shift", [-9.0, 0.0, 0.7, 9.0])
def test_what_is_read_is_rounded_to_the_range_that_spans_it(name: str, shift: float) -> None:
    format = PRECISIONS[name].activation
    assert format is not None
    tensor = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) + shift
    found = spanning_range(tensor, format)
    expected = activation_range(float(tensor.min()), float(tensor.max()), format)
    assert found.dtype == expected.dtype
    assert torch.allclose(found.scale, expected.scale, rtol=1e-6)
    assert torch.equal(found.zero_point, expected.zero_point)


def test_a_range_of_nothing_but_zeros_and_a_symmetric_one_can_be_had() -> None:
    symmetric = Format(bits=8, signed=True, symmetric=True, per_channel=False)
    assert spanning_range(torch.zeros(3), symmetric).nearest(torch.zeros(3)).tolist() == [0, 0, 0]
    assert float(spanning_range(torch.tensor([-2.0, 1.0]), symmetric).scale) == pytest.approx(2 / 127)


def test_a_call_rounds_the_layers_of_the_policy_and_what_they_read(network: nn.Module) -> None:
    call = rounded_call(QuantPolicy((("stem", "w4a4"),)))
    assert call is not None
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    held = tensors(network)
    format = PRECISIONS["w4a4"].activation
    assert format is not None
    rounded = {**held, "stem.weight": rounded_weight(held["stem.weight"], PRECISIONS["w4a4"])}
    expected = call_lent(network, rounded, spanning_range(images, format).nearest(images))
    got = call(network, held, images)
    assert torch.equal(got, expected)
    assert not torch.equal(got, call_lent(network, held, images))


def test_a_network_is_left_as_it_was(network: nn.Module) -> None:
    images, held = torch.randn(4, 3, 8, 8), tensors(network)
    network.eval()
    before = call_lent(network, held, images)
    call = rounded_call(QuantPolicy((("", "w4a4"),)))
    assert call is not None
    call(network, held, images)
    assert torch.equal(call_lent(network, held, images), before)

    def breaks(network: nn.Module, lent: Mapping[str, Tensor], images: Any) -> None:
        with pytest.raises(RuntimeError):
            call(network, lent, images)

    breaks(network, held, torch.zeros(4, 5, 8, 8))  # an error inside leaves nothing behind either
    assert torch.equal(call_lent(network, held, images), before)


def test_gradients_of_what_was_lent_are_those_of_what_was_rounded(network: nn.Module) -> None:
    call = rounded_call(QuantPolicy((("", "w8a8"),)))
    assert call is not None
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-1, 1, 4)
    torch.autograd.backward((call(network, tensors(network), images) * weights).sum())
    leaves = {
        name: rounded_weight(parameter, PRECISIONS["w8a8"]).detach().requires_grad_()
        for name, parameter in network.named_parameters()
        if name.endswith(("stem.weight", "head.weight"))
    }
    # what is rounded already stays where it is
    torch.autograd.backward((call(network, {**tensors(network), **leaves}, images) * weights).sum())
    for name, leaf in leaves.items():
        found = network.get_parameter(name).grad
        assert found is not None
        assert leaf.grad is not None
        assert found.abs().min() > 0
        assert torch.allclose(found, leaf.grad, rtol=1e-3, atol=1e-5), name


def test_rounding_before_normalization_is_rounding_after_it_is_folded() -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([0.1, -2.0, 3.0, 0.5, -0.3, 1.0]).reshape(-1, 1, 1, 1)
    precision = PRECISIONS["w8a8"]
    folded = rounded_weight(weight, precision) * factors
    assert torch.allclose(folded, rounded_weight(weight * factors, precision), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_floats_are_called_as_ever(name: str) -> None:
    assert rounded_call(QuantPolicy((("stem", name),))) is None
    assert rounded_call(QuantPolicy()) is None
    assert rounded_call(QuantPolicy((("stem", name), ("head", "w8")))) is not None


def test_halves_are_rounded_in_32_bits(network: nn.Module) -> None:
    call = rounded_call(QuantPolicy((("stem", "w8a8"),)))
    assert call is not None
    seen: list[Tensor] = []
    hook = network.get_submodule("stem").register_forward_pre_hook(lambda _, read: seen.append(read[0]))
    images = torch.randn(2, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        call(network, tensors(network), images)
    hook.remove()
    format = PRECISIONS["w8a8"].activation
    assert format is not None
    held: Range = spanning_range(images, format)
    # a hook of before the call is called before the call's own
    assert seen[0].dtype == torch.bfloat16
    assert len(set(held.nearest(images.float()).flatten().tolist())) > 100
