"""An elastic network as the published code has it: the largest one's layers, which cut their own weights.

OFA's and AttentiveNAS's networks hold an active configuration, and each layer's forward pass takes a
contiguous copy of the part of its weights that is active: leading channels, the centre of a kernel. Tensors
are in channels-first order, and depthwise kernels are computed whole. AttentiveNAS is not on PyPI; here its
way is given to timm's layers, without the shortcuts of first blocks that its own network has besides, and
with PyTorch's own activations: what the network is spared is in its favour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from nestling.train.losses import label_loss, soft_label_loss

Shapes = Mapping[str, torch.Size]
"""What is active: for each parameter of a subnet, by its name in the largest network, its shape."""


class ElasticConv2d(nn.Conv2d):
    """A convolution, full or depthwise, of which a part is active."""

    active: torch.Size

    def forward(self, input: Tensor) -> Tensor:
        """The active part's convolution of `input` (N, C, H, W)."""
        outputs, inputs, *sides = self.active
        (low_y, high_y), (low_x, high_x) = (
            ((whole - side) // 2, (whole + side) // 2)
            for whole, side in zip(self.kernel_size, sides, strict=True)
        )
        weight = self.weight[:outputs, :inputs, low_y:high_y, low_x:high_x].contiguous()
        bias = None if self.bias is None else self.bias[:outputs]
        padding = (sides[0] // 2, sides[1] // 2)
        groups = 1 if self.groups == 1 else outputs
        return F.conv2d(input, weight, bias, self.stride, padding, 1, groups)


class ElasticBatchNorm(BatchNormAct2d):
    """A batch normalization with its activation, of the channels that come."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, C, H, W) normalized by the batch's own statistics; running ones are kept as well."""
        channels = x.shape[1]
        mean, var, batches, momentum = (
            self.running_mean, self.running_var, self.num_batches_tracked, self.momentum,
        )  # fmt: skip
        assert mean is not None
        assert var is not None
        assert batches is not None
        assert momentum is not None
        batches.add_(1)
        weight, bias = self.weight[:channels], self.bias[:channels]
        x = F.batch_norm(x, mean[:channels], var[:channels], weight, bias, True, momentum, self.eps)
        activated: Tensor = self.act(x)
        return activated


class ElasticLinear(nn.Linear):
    """A linear layer of which a part is active."""

    active: torch.Size

    def forward(self, input: Tensor) -> Tensor:
        """The active part's logits (N, outputs) of `input` (N, inputs)."""
        outputs, inputs = self.active
        return F.linear(input, self.weight[:outputs, :inputs].contiguous(), self.bias[:outputs])


class ElasticStage(nn.Sequential):
    """A stage of which the first blocks are active."""

    depth: int

    def forward(self, input: Tensor) -> Tensor:
        """The output of the active blocks."""
        for block in list(self)[: self.depth]:
            input = block(input)
        return input


class ElasticNetwork:
    """A network that remembers which of its subnets is on.

    Args:
        network: a MobileNet of timm's, the largest of its space; changed in place: order, classes of layers.
        optimizer_of: makes the optimizer of its parameters.

    Raises:
        ValueError: a grouped convolution that is not depthwise.
    """

    def __init__(
        self, network: nn.Module, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> None:
        # a 1x1 kernel in channels-last order, which `.contiguous()` takes for contiguous, would let the whole
        # network run in that order; `.to()` lays it out anew
        self.network = network.to(memory_format=torch.contiguous_format).train()
        blocks = network.get_submodule("blocks")
        self.stages: dict[str, ElasticStage] = {}
        for name, stage in blocks.named_children():
            stage.__class__ = ElasticStage
            assert isinstance(stage, ElasticStage)
            self.stages[f"blocks.{name}."] = stage
        self.layers: dict[str, ElasticConv2d | ElasticLinear] = {}
        for name, layer in network.named_modules():
            if type(layer) is nn.Conv2d:
                if layer.groups not in (1, layer.in_channels):
                    raise ValueError(f"{name} has {layer.groups} groups; neither full nor depthwise")
                layer.__class__ = ElasticConv2d
            elif isinstance(layer, nn.Linear):  # timm has a class of its own
                layer.__class__ = ElasticLinear
            elif type(layer) is BatchNormAct2d:
                layer.__class__ = ElasticBatchNorm
            if isinstance(layer, ElasticConv2d | ElasticLinear):
                self.layers[f"{name}.weight"] = layer
        self.optimizer = optimizer_of(network)

    def activate(self, shapes: Shapes) -> None:
        """Lets the subnet whose parameters have `shapes` be the one that runs."""
        for name, layer in self.layers.items():
            if name in shapes:
                layer.active = shapes[name]
        for prefix, stage in self.stages.items():
            stage.depth = len({n[len(prefix) :].partition(".")[0] for n in shapes if n.startswith(prefix)})

    def logits(self, images: Tensor, shapes: Shapes) -> Tensor:
        """Logits (N, classes) of the subnet with `shapes` for `images` (N, 3, H, W), channels first."""
        self.activate(shapes)
        found: Tensor = self.network(images)
        return found

    def step(
        self, images: Tensor, labels: Tensor, subnets: Sequence[Shapes], *, smoothing: float
    ) -> list[float]:
        """The losses of a training step: the first subnet learns from labels, the others from it."""
        first, *others = subnets
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.logits(images, first)
        soft_labels = logits.detach()
        losses = [label_loss(logits, labels, smoothing=smoothing)]
        losses[0].backward()  # type: ignore[no-untyped-call]
        for shapes in others:
            losses.append(soft_label_loss(self.logits(images, shapes), soft_labels))
            losses[-1].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return [loss.item() for loss in losses]
