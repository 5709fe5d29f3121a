"""Files profiled or compared on several devices; what one device fails with costs no other its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nestling.profile.comparison import Comparison, compare_files
from nestling.profile.devices import Device
from nestling.profile.file_profile import FileProfile, Refusal, profile_file
from nestling.profile.opening import open_device
from nestling.profile.transport import DeviceError, DevicesGoneError

LEAST_TIMEOUT_SECONDS = 120.0
"""What a device may take for all that is asked of a file at once, however short its timing."""


def profile_on_each(
    addresses: Sequence[str], models: Sequence[Path], *, seconds: float, nodes: bool = False
) -> tuple[list[FileProfile], list[Refusal]]:
    """The profile of each file on each device, and what devices refused or failed with.

    Args:
        addresses: of the devices, which are asked one after another.
        models: the files.
        seconds: the longest that timing one may take.
        nodes: whether the time of each node is told.
    """
    profiles: list[FileProfile] = []
    refused: list[Refusal] = []
    for address in addresses:
        left = list(models)
        try:
            with _opened(address, seconds) as device:
                while left:
                    try:
                        profiles.append(profile_file(device, left[0], nodes=nodes))
                    except DeviceError as error:
                        refused.append(Refusal(str(left[0]), address, str(error)))
                    left.pop(0)
        except (DeviceError, DevicesGoneError) as error:
            refused += [Refusal(str(model), address, str(error)) for model in left]
    return profiles, refused


def compare_on_each(
    addresses: Sequence[str], first: Path, second: Path, *, seconds: float
) -> tuple[list[Comparison], list[Refusal]]:
    """The comparison of two files on each device, and what devices refused or failed with.

    Args:
        addresses: of the devices, which are asked one after another.
        first: the file of which it is told how many times faster it is.
        second: the one that it is compared with.
        seconds: the longest that timing one file may take.
    """
    compared: list[Comparison] = []
    refused: list[Refusal] = []
    for address in addresses:
        try:
            with _opened(address, seconds) as device:
                compared.append(compare_files(device, first, second, seconds=2 * seconds))
        except (DeviceError, DevicesGoneError) as error:
            refused.append(Refusal(f"{first} and {second}", address, str(error)))
    return compared, refused


def _opened(address: str, seconds: float) -> Device:
    return open_device(address, seconds=seconds, timeout_seconds=max(LEAST_TIMEOUT_SECONDS, 3 * seconds))
