from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from nestling.config import TrainConfig
from nestling.train.optimization import Precision, make_optimizer


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw"])
def test_weight_decay_spares_norms_and_biases(name: Literal["sgd", "rmsprop", "adamw"]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    frozen = network.append(nn.Linear(2, 2, bias=False))[-1].get_parameter("weight").requires_grad_(False)
    optimizer = make_optimizer(network, TrainConfig(optimizer=name, weight_decay=0.01))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert id(frozen) not in decay
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0.01 if key in ("0.weight", "3.weight") else 0.0), key


def test_the_optimizer_is_the_one_that_the_configuration_names() -> None:
    network = nn.Linear(2, 2)
    sgd = make_optimizer(network, TrainConfig(optimizer="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.8, True)
    plain = make_optimizer(network, TrainConfig(optimizer="sgd", momentum=0.0))
    assert plain.defaults["nesterov"] is False
    rmsprop = make_optimizer(network, TrainConfig(optimizer="rmsprop", momentum=0.9))
    assert isinstance(rmsprop, torch.optim.RMSprop)
    assert (rmsprop.defaults["alpha"], rmsprop.defaults["eps"]) == (0.9, 0.0316)
    assert isinstance(make_optimizer(network, TrainConfig(optimizer="adamw")), torch.optim.AdamW)


@pytest.mark.parametrize("amp", ["auto", "off"])
def test_precision_is_not_mixed_on_the_cpu_by_itself(amp: str) -> None:
    precision = Precision(amp, torch.device("cpu"))
    with precision.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert precision.state() == {}


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_mixed_on_the_cpu_where_it_is_asked_for(amp: str, dtype: torch.dtype) -> None:
    precision = Precision(amp, torch.device("cpu"))
    with precision.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    assert ("scale" in precision.state()) == (amp == "fp16")  # bf16 has float32's range


def test_scaled_gradients_are_clipped_at_their_own_size() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("fp16", torch.device("cpu"))
    precision.backward((weight * torch.tensor([30.0, 40.0])).sum())
    precision.step(optimizer, [weight], clip_norm=1.0)
    assert weight.detach().tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)


def test_gradients_are_clipped_to_the_norm_and_removed_after_the_step() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("auto", torch.device("cpu"))
    precision.backward((weight * torch.tensor([30.0, 40.0])).sum())
    precision.step(optimizer, [weight], clip_norm=1.0)
    assert weight.detach().tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert weight.grad is None


def test_no_number_of_a_gradient_is_above_the_clip_value() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("auto", torch.device("cpu"))
    precision.backward((weight * torch.tensor([30.0, -40.0, 0.5])).sum())
    precision.step(optimizer, [weight], clip_value=1.0)
    assert weight.detach().tolist() == [-1.0, 1.0, -0.5]


def test_gradients_are_clipped_by_value_before_they_are_clipped_by_norm() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("auto", torch.device("cpu"))
    precision.backward((weight * torch.tensor([30.0, 40.0])).sum())
    precision.step(optimizer, [weight], clip_norm=0.5, clip_value=1.0)
    assert weight.detach().tolist() == pytest.approx([-(0.5**1.5)] * 2, abs=1e-5)
