"""WeightAverage: the moving average of a network's weights, which is often better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_PREFIX = "average/"


class WeightAverage:
    """An exponential moving average of parameters (Polyak and Juditsky 1992), kept beside them.

    The average of a supernet's largest network is that of every subnet, as they are cut from it. Published
    supernets use a decay of 0.9999 (BigNAS, Yu et al. 2020, arXiv 2003.11142). Over the first updates the
    decay rises, as in TensorFlow's `ExponentialMovingAverage(num_updates=)`: update n, counted from 0, has
    `min(decay, (1 + n) / (10 + n))`, so that the weights that training began with are soon forgotten.

    Statistics of normalization are not averaged: no average of them fits the averaged weights. They come from
    recalibration, as every subnet's do (Izmailov et al. 2018, arXiv 1803.05407, do the same).

    Args:
        parameters: by name; read at every update, and kept by reference.
        decay: of the average, in [0, 1): the part of it that an update keeps.

    Raises:
        ValueError: `decay` is not in that range.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"the decay of averaged weights is {decay}; it must be in [0, 1), such as 0.9999"
            )
        self._parameters = dict(parameters)
        self._decay = decay
        self._average = {name: _copy(parameter) for name, parameter in parameters.items()}
        self._updates = 0

    @property
    def updates(self) -> int:
        """How many updates there were since the start or the last restart."""
        return self._updates

    def update(self) -> None:
        """Moves the average towards the parameters, in place: to be called after every optimizer step."""
        # one call of a multi-tensor kernel, not one for each parameter
        average, current = list(self._average.values()), [p.detach() for p in self._parameters.values()]
        if average:
            decay = warmed_up(self._decay, updates=self._updates)
            move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            move(tuple(average), tuple(current), self._updates)
        self._updates += 1

    def restart(self) -> None:
        """Makes the average the parameters as they are, and the decay rise anew.

        For when they change otherwise than by training: after channels are sorted, an average of before would
        mix different channels.
        """
        for name, parameter in self._parameters.items():
            self._average[name].copy_(parameter.detach())
        self._updates = 0

    def tensors(self) -> dict[str, Tensor]:
        """The averages, such as `average/conv.weight`, for a checkpoint; not copied."""
        return {f"{_PREFIX}{name}": average for name, average in self._average.items()}

    def load(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Goes on from what `tensors` and `updates` gave, in place. Other tensors are passed over.

        Raises:
            KeyError: a parameter's average is missing.
        """
        for name, average in self._average.items():
            if f"{_PREFIX}{name}" not in tensors:
                raise KeyError(
                    f"{_PREFIX}{name} is not in the checkpoint: it was saved without averaged weights"
                )
            average.copy_(tensors[f"{_PREFIX}{name}"])
        self._updates = updates

    def settle(self) -> None:
        """Gives the parameters the averaged numbers, in place: the end of training."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The context in which the parameters have the averaged numbers: for a look at their accuracy."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])


def averaged_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages among a checkpoint's `tensors`, by parameter; none where there are none."""
    return {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}


def warmed_up(decay: float, *, updates: int) -> float:
    """The decay after `updates` updates."""
    return min(decay, (1 + updates) / (10 + updates))


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().clone(memory_format=torch.preserve_format)
