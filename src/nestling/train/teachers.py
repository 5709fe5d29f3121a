"""Teachers outside the supernet: pretrained timm networks, and the largest network as it once was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models import timm_family
from nestling.models.supernet import Supernet
from nestling.models.timm_arguments import recipe_of
from nestling.space import Arch, Value

_PREFIX = "teacher/"

Colours = tuple[float, ...]
"""For each channel, as a fraction of 255."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network that only teaches, and the images that it was trained on.

    Attributes:
        network: from images to logits (N, classes); it stays as it is.
        side: of the images that it reads, in pixels; None: any.
        mean: of the channels, as it was trained; so is `std`.
        std: see `mean`.
    """

    network: nn.Module
    side: int | None
    mean: Colours
    std: Colours


class SoftLabels:
    """Averages what teachers hold for likely (MEAL V2, Shen & Savvides 2020, arXiv 2009.08453).

    Called with images (N, 3, H, W), normalised as the data are, it gives probabilities (N, classes) without
    gradients. Teachers see the very images that the students see, with the same augmentation, brought to the
    colours and the size that they know, in evaluation mode.

    Args:
        teachers: at least one; their networks are put into evaluation mode.
        mean: of the data's channels.
        std: of the data's channels.

    Raises:
        ValueError: no teachers.
    """

    def __init__(self, teachers: Sequence[Teacher], *, mean: Colours, std: Colours) -> None:
        if not teachers:
            raise ValueError("soft labels are averaged over teachers; give at least one")
        self.teachers = tuple(teachers)
        self.mean, self.std = mean, std
        for teacher in self.teachers:
            teacher.network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, classes), float32, the mean of all teachers'."""
        with torch.no_grad():
            found = [self._of(teacher, images).float().softmax(dim=1) for teacher in self.teachers]
        return torch.stack(found).mean(dim=0)

    def to(self, device: torch.device | str) -> SoftLabels:
        """These, their networks moved to `device`, in place."""
        for teacher in self.teachers:
            teacher.network.to(device)
        return self

    def _of(self, teacher: Teacher, images: Tensor) -> Tensor:
        ratio = [ours / theirs for ours, theirs in zip(self.std, teacher.std, strict=True)]
        means = zip(self.mean, teacher.mean, teacher.std, strict=True)
        shift = [(ours - theirs) / std for ours, theirs, std in means]
        seen = images * _column(ratio, images) + _column(shift, images)
        if teacher.side is not None and images.shape[-2:] != (teacher.side, teacher.side):
            seen = F.interpolate(seen, (teacher.side, teacher.side), mode="bicubic", antialias=True)
        logits: Tensor = teacher.network(seen)
        return logits


def load_teacher(name: str, *, classes: int) -> Teacher:
    """The teacher that `name` says: timm's name of a model, and `=PATH` where its weights are in a file.

    Without a path they are timm's own, which know ImageNet's classes. A network trained at the size of the
    data reads images of that size; timm's own weights those that timm says.

    Raises:
        ValueError: no such model, weights that do not fit, or timm's own weights know other classes.
        FileNotFoundError: there is no such file.
    """
    model, _, path = name.partition("=")
    decisions: tuple[tuple[str, Value], ...] = (("model", model), ("classes", classes))
    timm_family.model_name(Arch(decisions))
    config = recipe_of(model).weights["pretrained_cfg"]
    if not path and config["num_classes"] != classes:
        raise ValueError(
            f"the teacher {model} knows {config['num_classes']} classes with timm's weights, the data have "
            f"{classes}; give weights of your own, as {model}=PATH"
        )
    network = timm_family.pretrained(Arch((*decisions, ("pretrained", path or True))))
    fixed = bool(config.get("fixed_input_size")) or not path
    side = int(config["input_size"][-1]) if fixed else None
    return Teacher(network, side, tuple(config["mean"]), tuple(config["std"]))


class Frozen:
    """The soft labels of the largest network as it is now, whatever becomes of `supernet`.

    Called with images (N, 3, H, W) it gives probabilities (N, classes) without gradients. Batches are
    normalized by their own statistics, as once-for-all's teacher does (arXiv 1908.09791): after its first
    phase, of the largest network alone, it teaches all later ones.

    Args:
        supernet: whose largest network is copied.
        tensors: weights in place of those that the network has now: what `tensors` gave.
    """

    def __init__(self, supernet: Supernet, tensors: Mapping[str, Tensor] | None = None) -> None:
        space = supernet.space
        network = supernet.materialize(space.largest)
        if tensors is not None:
            network.load_state_dict(_held(tensors))
        copy = Supernet(space, supernet.build, layout=supernet.layout, largest=network)
        self._copy = copy.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (N, classes), float32."""
        with torch.no_grad():
            logits: Tensor = self._copy(images, self._copy.space.largest, at_most=images.shape[-1])
        return logits.float().softmax(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, for a checkpoint."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self._copy.largest.state_dict().items()}


def refrozen(supernet: Supernet, tensors: Mapping[str, Tensor]) -> Frozen | None:
    """The frozen teacher that a checkpoint's `tensors` hold; None where they hold none."""
    return Frozen(supernet, tensors) if _held(tensors) else None


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
