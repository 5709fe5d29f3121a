"""The runtimes that an address may name, their options, and what brings each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nestling.profile.worker import PROVIDERS


@dataclass(frozen=True, slots=True)
class RuntimeKind:
    """A runtime as addresses know it."""

    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The values that each option may have, what it is without being given first."""
    module: Path | None = None
    """The module that is sent to the worker; None for ONNX Runtime, which is built into it."""


_HERE = Path(__file__).parent
_TORCH = ("f32", "bf16", "f16")
_FALLBACK = {"allow_fallback": ("0", "1")}

RUNTIMES: dict[str, RuntimeKind] = {
    **{f"ort:{target}": RuntimeKind({} if target == "cpu" else _FALLBACK) for target in PROVIDERS},
    "openvino:cpu": RuntimeKind({"dtype": ("f32", "bf16")}, _HERE / "openvino_runtime.py"),
    "torch:cpu": RuntimeKind({"dtype": _TORCH}, _HERE / "torch_runtime.py"),
    "torch:cuda": RuntimeKind({"dtype": (*_TORCH, "tf32"), "graph": ("1", "0")}, _HERE / "torch_runtime.py"),
}
"""By the part of an address before its options."""
