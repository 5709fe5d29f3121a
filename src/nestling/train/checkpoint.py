"""Checkpoints of a training run: tensors in safetensors, the rest in one small file that names them.

The small file is written last: a crash at any moment leaves the checkpoint before. Two generations are kept,
and one whose checksum is wrong is passed over, with a warning, in favour of the other.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nestling.run import write_atomically

GENERATIONS = 2


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be read; the message names them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of training: `step` steps are done; the next one starts from `tensors` and `state`."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Makes `checkpoint` the newest of `folder`; the one before is kept, all others are removed.

    Those of later steps go too: training that went back to an earlier step has left them behind.

    Raises:
        ValueError: a tensor holds something that is not a finite number; nothing was written.
        CheckpointError: the file that names the checkpoints is damaged.
        OSError: it could not be written; the checkpoints that were there still are.
    """
    for tensor_name, tensor in checkpoint.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{tensor_name} holds numbers that are not finite; such a checkpoint is not kept"
            )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    data = safetensors.torch.save(tensors)
    name = f"step-{checkpoint.step:08d}.safetensors"
    write_atomically(folder / name, data)
    newest = {
        "file": name,
        "step": checkpoint.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "state": checkpoint.state,
    }
    before = [g for g in _generations(folder) if g["step"] < checkpoint.step]
    generations = [newest, *before][:GENERATIONS]
    write_atomically(folder / "checkpoints.json", json.dumps(generations, indent=1).encode())
    kept = {generation["file"] for generation in generations}
    for file in folder.iterdir():
        # a name with a dot in front is what a save leaves behind that was killed
        if file.name.startswith(("step-", ".step-", ".checkpoints.json.")) and file.name not in kept:
            file.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of `folder` that is whole; None where there never was one.

    Warns where a newer one is not whole.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    damaged: list[str] = []
    for generation in _generations(folder):
        found = _whole(folder, generation)
        if found is not None:
            if damaged:
                warnings.warn(
                    f"{folder}: {', '.join(damaged)} is damaged; "
                    f"the checkpoint of step {generation['step']} before it is used",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return found
        damaged.append(generation["file"])
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({', '.join(damaged)}); remove the folder to start anew"
        )
    return None


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of `folder`, no other in its place; None where there never was one.

    Raises:
        CheckpointError: it is not whole.
    """
    generations = _generations(folder)
    if not generations:
        return None
    found = _whole(folder, generations[0])
    if found is None:
        raise CheckpointError(f"the newest checkpoint, {folder / generations[0]['file']}, is damaged or gone")
    return found


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter and key, such as `optimizer/conv.weight/momentum_buffer`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Gives the optimizer back the tensors that `optimizer_tensors` took, in place."""
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            owner = parameters[parameter]
            # optimizers keep the step counter on the CPU, everything else where and laid out as the parameter
            home = tensor.clone() if key == "step" else _like(tensor, owner)
            optimizer.state[owner][key] = home


def _like(tensor: Tensor, owner: nn.Parameter) -> Tensor:
    return torch.empty_like(owner, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _whole(folder: Path, generation: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint, unless its file is not the one that was written."""
    file = folder / generation["file"]
    data = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(data).hexdigest() != generation["sha256"]:
        return None
    return Checkpoint(generation["step"], safetensors.torch.load(data), generation["state"])


def _generations(folder: Path) -> list[dict[str, Any]]:
    index = folder / "checkpoints.json"
    if not index.exists():
        return []
    try:
        loaded: list[dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{index}, which names the checkpoints, is damaged ({error}); remove the folder to start anew"
        ) from None
    return loaded
