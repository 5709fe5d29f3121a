from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nestling.train.averaging import WeightAverage, averaged_weights, warmed_up


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution in channels-last order, its norm and a classifier."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    layers(torch.randn(2, 3, 4, 4))
    return layers.to(memory_format=torch.channels_last)


def change(network: nn.Module, step: int) -> None:
    """Other weights, as training would make them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.named_parameters()}


def average_of(network: nn.Module, *, decay: float) -> WeightAverage:
    return WeightAverage(dict(network.named_parameters()), decay=decay)


def test_with_a_constant_decay_it_is_the_average_of_torch(network: nn.Sequential) -> None:
    decay = 0.05  # less than the warm-up ever gives
    average = average_of(network, decay=decay)
    move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    trusted = AveragedModel(network, multi_avg_fn=move)
    trusted.update_parameters(network)  # its first update copies
    for step in range(5):
        change(network, step)
        average.update()
        trusted.update_parameters(network)
    averaged = averaged_weights(average.tensors())
    for name, expected in trusted.module.named_parameters():
        assert torch.equal(averaged[name], expected), name


def test_the_decay_rises_to_its_value() -> None:
    rising = [warmed_up(0.9, updates=n) for n in range(200)]
    assert rising[0] == pytest.approx(0.1)
    assert all(a <= b for a, b in pairwise(rising))
    assert rising[79] < 0.9
    assert rising[-1] == 0.9


def test_while_the_decay_rises_each_update_has_its_own(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.9999)
    expected = {name: value.double() for name, value in values(network).items()}
    for step in range(30):
        change(network, step)
        average.update()
        decay = (1 + step) / (10 + step)
        for name, value in values(network).items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert average.updates == 30
    for name, value in averaged_weights(average.tensors()).items():
        assert torch.allclose(value.double(), expected[name], atol=1e-5), name


def test_within_the_context_the_network_has_the_average_and_after_it_its_own_weights(
    network: nn.Sequential,
) -> None:
    average = average_of(network, decay=0.5)
    change(network, 1)
    average.update()
    own = values(network)

    def look_and_fail() -> None:
        with average.in_place():
            for name, value in averaged_weights(average.tensors()).items():
                assert torch.equal(network.get_parameter(name), value)
                assert not torch.equal(network.get_parameter(name), own[name])
            raise InterruptedError

    with pytest.raises(InterruptedError):
        look_and_fail()
    assert all(torch.equal(network.get_parameter(name), value) for name, value in own.items())


def test_settling_gives_the_network_the_average(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.5)
    change(network, 1)
    average.update()
    average.settle()
    assert all(
        torch.equal(network.get_parameter(name), value)
        for name, value in averaged_weights(average.tensors()).items()
    )


def test_statistics_of_normalization_are_left_to_recalibration(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.5)
    network.train()
    network(torch.randn(2, 3, 4, 4))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    average.update()
    average.settle()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert not any("running" in name for name in average.tensors())


def test_after_a_restart_nothing_is_left_of_the_weights_before(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.9)
    for step in range(3):
        change(network, step)
        average.update()
    average.restart()
    fresh = average_of(network, decay=0.9)
    change(network, 9)
    average.update()
    fresh.update()
    assert average.updates == 1
    assert all(torch.equal(t, fresh.tensors()[name]) for name, t in average.tensors().items())


def test_an_average_that_was_saved_and_loaded_goes_on_as_if_never_stopped(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.9999)
    for step in range(4):
        change(network, step)
        average.update()
    saved = {name: tensor.clone() for name, tensor in average.tensors().items()}
    resumed = average_of(network, decay=0.9999)
    resumed.load(saved | {"largest/0.weight": torch.zeros(1)}, updates=average.updates)
    for step in range(4, 8):
        change(network, step)
        average.update()
        resumed.update()
    assert all(torch.equal(t, resumed.tensors()[name]) for name, t in average.tensors().items())


def test_the_average_lies_in_memory_as_the_weights_do(network: nn.Sequential) -> None:
    average = average_of(network, decay=0.9)
    kernel = average.tensors()["average/0.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.requires_grad


def test_a_checkpoint_without_averages_is_refused(network: nn.Sequential) -> None:
    with pytest.raises(KeyError, match=r"average/0\.weight is not in the checkpoint"):
        average_of(network, decay=0.9).load({}, updates=3)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_never_learns_or_grows_is_refused(network: nn.Sequential, decay: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        average_of(network, decay=decay)
