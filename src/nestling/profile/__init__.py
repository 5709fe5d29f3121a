"""Latency that is true: a file timed in a worker process, interleaved with the device's reference model."""

from nestling.profile.address import Address, parse_address
from nestling.profile.devices import Device, WorkerDevice, connect
from nestling.profile.kernels import Kernel, OptimizedOp
from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.store import MeasurementStore, StoreError, file_key
from nestling.profile.transport import DeviceError, WorkerLostError

__all__ = [
    "Address",
    "Device",
    "DeviceError",
    "Fingerprint",
    "Kernel",
    "Measurement",
    "MeasurementStore",
    "OptimizedOp",
    "StoreError",
    "WorkerDevice",
    "WorkerLostError",
    "connect",
    "file_key",
    "parse_address",
]
