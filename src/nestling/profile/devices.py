"""Devices: `connect` turns an address into something that measures ONNX files and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nestling.profile.address import AdbPlace, Address, SshPlace, parse_address
from nestling.profile.kernels import Kernel, MadeUp, OptimizedOp
from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.quiet import QuietTimes
from nestling.profile.store import MeasurementStore
from nestling.profile.transport import DeviceError, Transport
from nestling.profile.transport_local import LocalProcess
from nestling.profile.worker_device import WorkerDevice


class Device(Protocol):
    """Something that runs ONNX files. A context manager: leaving it ends what it started."""

    @property
    def name(self) -> str:
        """The address, in full."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What the device is."""

    def measure(self, path: Path) -> Measurement:
        """How long the file takes.

        Raises:
            DeviceError: the file was refused, or the device crashed, hung or was lost.
        """

    def predict(
        self, path: Path, images: NDArray[np.float32], *, key: str | None = None
    ) -> NDArray[np.float32]:
        """The logits (N, classes) of the file for `images` (N, 3, H, W).

        Raises:
            DeviceError: as `measure`.
        """

    def optimized_ops(self, path: Path) -> tuple[OptimizedOp, ...] | None:
        """What the runtime makes of the file; None where it does not tell.

        Raises:
            DeviceError: as `measure`.
        """

    def kernels(self, path: Path, *, runs: int = 1) -> tuple[Kernel, ...]:
        """What the runtime runs for the file, timed `runs` times.

        Raises:
            DeviceError: as `measure`.
        """

    def doubts(self, path: Path) -> bool:
        """Whether the store's time of the file is from when the device was slower than it was seen since.

        Raises:
            DeviceError: no such file, or no device.
        """

    def compare(self, path: Path, other: Path, *, seconds: float, fresh: bool = False) -> Measurement:
        """How long the file takes beside another one, which stands for the reference model.

        Raises:
            DeviceError: as `measure`.
        """

    def energy(self, path: Path, *, seconds: float) -> Mapping[str, float]:
        """Joules of one call by the name of the machine's counter; empty where the machine has none.

        Raises:
            DeviceError: as `measure`.
        """

    def inputs(self, path: Path) -> tuple[MadeUp, ...]:
        """The inputs that the file is timed with.

        Raises:
            DeviceError: as `measure`.
        """

    def close(self) -> None:
        """Ends what the device has started."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def connect(
    address: str,
    *,
    seconds: float = 1.5,
    tolerance: float = 0.01,
    timeout_seconds: float = 120.0,
    store: MeasurementStore | None = None,
    quiet: QuietTimes | None = None,
) -> WorkerDevice:
    """The device at `address`, ready to measure: its worker has been started and has said what it is.

    Args:
        address: A runtime and its options, `ort:cpu?threads=2`, on this machine or, as
            `ssh://user@board/ort:cpu`, on another; `nestling.profile.opening.open_device` knows pools too.
        seconds: The longest that one measurement may take after warm-up; a slow file is still timed 10 times,
            and while others slow the device it may take three times as long.
        tolerance: Half the 95 % interval of the ratio, as a part of it, at which a measurement ends early.
        timeout_seconds: The longest that one call of the device may take; after that its worker is killed.
        store: Where measurements are kept; a file found there is not timed again.
        quiet: What devices take at their best; None: what all processes of the user know, from a file of
            theirs (`nestling.profile.quiet.state_file`).

    Raises:
        DeviceError: an address that cannot be read, a runtime that is not installed, more threads than
            cores, or limits that make no sense.
    """
    parsed = parse_address(address)
    check_limits(address, seconds=seconds, tolerance=tolerance, timeout_seconds=timeout_seconds)
    device = WorkerDevice(
        parsed,
        transport=transport_to(parsed),
        seconds=seconds,
        tolerance=tolerance,
        timeout_seconds=timeout_seconds,
        store=store,
        quiet=QuietTimes() if quiet is None else quiet,
    )
    device.start()
    return device


def check_limits(address: str, *, seconds: float, tolerance: float, timeout_seconds: float) -> None:
    """Refuses limits of a measurement that make no sense.

    Raises:
        DeviceError: which, and why.
    """
    if not (seconds > 0 and tolerance > 0):
        raise DeviceError(
            f"device {address!r}: seconds={seconds} and tolerance={tolerance} must be above zero"
        )
    if timeout_seconds <= seconds:
        raise DeviceError(
            f"device {address!r}: timeout_seconds={timeout_seconds} must be above seconds={seconds}; "
            "a measurement would be cut off"
        )


def transport_to(address: Address) -> Transport:
    """How a worker is reached at `address`."""
    needed = (
        "numpy",
        *{"ort": ("onnxruntime",), "torch": ("torch", "onnx")}.get(address.engine, (address.engine,)),
    )
    match address.place:
        case SshPlace():
            from nestling.profile.transport_ssh import SshProcess

            return SshProcess(address.place, modules=needed)
        case AdbPlace():
            from nestling.profile.transport_adb import AdbProcess

            return AdbProcess(address.place, modules=needed)
        case None:
            return LocalProcess()
