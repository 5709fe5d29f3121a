"""Latency that is true: a file timed in a worker process, interleaved with the device's reference model."""

from nestling.file_keys import file_key
from nestling.profile.address import Address, parse_address
from nestling.profile.comparison import Comparison, compare_files
from nestling.profile.devices import Device, connect
from nestling.profile.file_profile import FileProfile, Refusal, profile_file
from nestling.profile.kernels import Kernel, MadeUp, OptimizedOp
from nestling.profile.known import DeviceSummary, devices_here, devices_in, with_aa_spread
from nestling.profile.measurement import Conditions, Elsewhere, Fingerprint, Measurement
from nestling.profile.on_each import compare_on_each, profile_on_each
from nestling.profile.opening import open_device
from nestling.profile.pool import DevicePool
from nestling.profile.prediction import Step
from nestling.profile.store import MeasurementStore, StoreError
from nestling.profile.transport import DeviceError, DevicesGoneError, LineLostError, WorkerLostError
from nestling.profile.worker_device import WorkerDevice

__all__ = [
    "Address",
    "Comparison",
    "Conditions",
    "Device",
    "DeviceError",
    "DevicePool",
    "DeviceSummary",
    "DevicesGoneError",
    "Elsewhere",
    "FileProfile",
    "Fingerprint",
    "Kernel",
    "LineLostError",
    "MadeUp",
    "Measurement",
    "MeasurementStore",
    "OptimizedOp",
    "Refusal",
    "Step",
    "StoreError",
    "WorkerDevice",
    "WorkerLostError",
    "compare_files",
    "compare_on_each",
    "connect",
    "devices_here",
    "devices_in",
    "file_key",
    "open_device",
    "parse_address",
    "profile_file",
    "profile_on_each",
    "with_aa_spread",
]
