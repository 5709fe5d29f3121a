"""Latency that is true: a file timed in a worker process, interleaved with the device's reference model."""

from nestling.profile.address import Address, parse_address
from nestling.profile.devices import Device, WorkerDevice, connect
from nestling.profile.kernels import Kernel, OptimizedOp
from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.pool import DevicePool, open_device
from nestling.profile.roster import DevicesGoneError
from nestling.profile.store import MeasurementStore, StoreError, file_key
from nestling.profile.transport import DeviceError, LineLostError, WorkerLostError

__all__ = [
    "Address",
    "Device",
    "DeviceError",
    "DevicePool",
    "DevicesGoneError",
    "Fingerprint",
    "Kernel",
    "LineLostError",
    "Measurement",
    "MeasurementStore",
    "OptimizedOp",
    "StoreError",
    "WorkerDevice",
    "WorkerLostError",
    "connect",
    "file_key",
    "open_device",
    "parse_address",
]
