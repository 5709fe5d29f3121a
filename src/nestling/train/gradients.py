"""One exchange a step: the gradients of all visits, and what was found by the way, averaged over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nestling.train.distributed import Ranks


def average_gradients(
    ranks: Ranks, parameters: Sequence[nn.Parameter], losses: Tensor, *, images: int
) -> Tensor:
    """`losses`, averaged over the images of all ranks; so are the gradients of `parameters`, in place.

    With losses that are means over images, R ranks with B / R images each have then, up to rounding, the
    gradients of one rank with all B. Batch normalization is the exception: see `joint_statistics`. A
    gradient that some ranks lack counts as zero there; one that all lack stays None, so that the optimizer
    passes it over. Something that is not a number on one rank is so on all: they stop, or skip a step of
    fp16, together. Gradients may be scaled, by the same factor on every rank.

    All of it is one sum over the ranks of one float32 buffer.

    Args:
        ranks: which average.
        parameters: of the network that lends; the same on every rank.
        losses: (visits,), of this rank's images.
        images: how many this rank had.

    Raises:
        RanksError: another rank is gone, or visits another number of subnets.
    """
    if ranks.world == 1:
        return losses
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in trained]
    buffer = torch.empty(sum(sizes) + len(trained) + len(losses) + 1, device=ranks.device)
    *pieces, there, mean_losses, count = torch.split(buffer, [*sizes, len(trained), len(losses), 1])
    slots = [piece.view(parameter.shape) for piece, parameter in zip(pieces, trained, strict=True)]
    for slot, parameter in zip(slots, trained, strict=True):
        if parameter.grad is None:
            slot.zero_()
        else:
            torch.mul(parameter.grad, images, out=slot)
    there.copy_(torch.tensor([float(parameter.grad is not None) for parameter in trained]))
    torch.mul(losses.detach(), images, out=mean_losses)
    count.fill_(images)
    total = ranks.sum(buffer)[-1]
    for slot, parameter, held in zip(slots, trained, there.tolist(), strict=True):
        if parameter.grad is None and held > 0:
            parameter.grad = torch.empty_like(parameter)
        if parameter.grad is not None:
            torch.div(slot, total, out=parameter.grad)
    averaged: Tensor = mean_losses / total
    return averaged


def average(ranks: Ranks, values: Tensor, *, images: int) -> Tensor:
    """`values`, such as losses of this rank's `images` images, averaged over the images of all ranks.

    Raises:
        RanksError: another rank is gone, or sent something else.
    """
    if ranks.world == 1:
        return values
    told = torch.cat([values.detach().float() * images, values.new_full((1,), images, dtype=torch.float32)])
    averaged: Tensor = ranks.sum(told)[:-1] / told[-1]
    return averaged
