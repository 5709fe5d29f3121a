from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nestling.data import Batch
from nestling.train.evaluate import Accuracy, recalibrate, top1


def normalized() -> tuple[nn.Sequential, nn.BatchNorm2d]:
    norm = nn.BatchNorm2d(3, momentum=0.1)
    return nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)), norm


def some_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 4, 4, generator=generator) * n + n for n in (2, 3, 6)]


def test_recalibrated_statistics_are_the_mean_over_batches() -> None:
    network, norm = normalized()
    network.train()(torch.full((2, 3, 4, 4), 9.0))
    assert recalibrate(network, some_batches()) is network
    mean = torch.stack([b.mean((0, 2, 3)) for b in some_batches()]).mean(0)
    variance = torch.stack([b.var((0, 2, 3), unbiased=True) for b in some_batches()]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, mean, rtol=1e-5)
    assert torch.allclose(norm.running_var, variance, rtol=1e-5)
    assert norm.momentum == 0.1
    assert not network.training
    assert not norm.training


def test_recalibration_leaves_weights_and_gradients_alone() -> None:
    network, norm = normalized()
    before = norm.weight.clone()
    recalibrate(network, some_batches())
    assert torch.equal(norm.weight, before)
    assert norm.weight.grad is None


def test_a_recalibration_that_fails_leaves_momentum_and_mode_as_they_should_be() -> None:
    network, norm = normalized()

    def broken() -> Iterator[Tensor]:
        yield some_batches()[0]
        raise OSError("no more images")

    with pytest.raises(OSError, match="no more images"):
        recalibrate(network, broken())
    assert norm.momentum == 0.1
    assert not norm.training


def test_recalibration_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(normalized()[0], [])


def test_top1_counts_what_the_network_gets_right_in_evaluation() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9)).train()
    images = torch.eye(3).view(3, 3, 1, 1)
    batches = [Batch(images, torch.tensor([0, 1, 0])), Batch(images[:1], torch.tensor([0]))]
    found = top1(network, batches)
    assert found == Accuracy(correct=3, total=4)
    assert found.top1 == 0.75
    assert not network.training


def test_accuracy_on_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        top1(nn.Flatten(), [])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_the_published_one_of_wilson(
    correct: int, total: int, low: float, high: float
) -> None:
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=5e-5)
