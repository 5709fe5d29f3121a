"""What a runtime makes of a file: the nodes that its optimizations leave, the kernels that it ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OptimizedOp:
    """A node that is left after the runtime's optimizations.

    A quantized layer keeps its name (`stem`, as `com.microsoft.QLinearConv`); a convolution in float that the
    CPU runs in blocks of channels is named after its output (`maps_nchwc`, `com.microsoft.nchwc.Conv`).
    """

    name: str
    op: str
    reads: tuple[str, ...] = ()
    """The tensors that it reads, constants among them; an operand that is left out is empty."""
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that the runtime ran, as its own profile tells it."""

    name: str
    """Of the node, as in `OptimizedOp`."""
    op: str
    """The operator without its domain, such as `QLinearConv`."""
    provider: str
    """What ran it, such as `CPUExecutionProvider`."""
    reads: tuple[str, ...]
    """The types of the tensors that it read, such as `uint8` or `float`."""
    writes: tuple[str, ...]
