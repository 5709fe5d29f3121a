"""What a runtime makes of a file: its inputs, the nodes that optimizations leave, the kernels that ran."""

from __future__ import annotations

from dataclasses import dataclass

INTEGER_OPS = {"com.microsoft.QLinearConv", "QLinearConv", "com.microsoft.QGemm", "QLinearMatMul"}
"""ONNX Runtime's operators that compute a weighted layer on integers."""
WEIGHTED_OPS = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}
"""OpenVINO's layers that have weights, grouped convolutions by either name."""


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
    precision: str | None = None
    """What it computes in, such as `u8` or `bf16`, where the runtime says so; ONNX Runtime does by `op`."""

    @property
    def on_integers(self) -> bool:
        """Whether it is a convolution or a product that the runtime computes on integers."""
        if self.precision is None:
            return self.op in INTEGER_OPS
        return self.op in WEIGHTED_OPS and self.precision in ("u8", "i8")


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
    microseconds: float | None = None
    """Of one run of the file: the median of those that were timed."""


@dataclass(frozen=True, slots=True)
class MadeUp:
    """An input that a file is timed with: random numbers, always the same."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {'x'.join(map(str, self.shape))}"
