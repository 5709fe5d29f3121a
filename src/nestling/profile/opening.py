"""The device, or the pool of devices, that an address names."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from nestling.profile.address import POOL, Address, parse_addresses
from nestling.profile.devices import Device, check_limits, connect, transport_to
from nestling.profile.leases import LeaseQueue
from nestling.profile.pool import DevicePool
from nestling.profile.quiet import QuietTimes
from nestling.profile.store import MeasurementStore
from nestling.profile.worker_device import START_PAUSES, WorkerDevice


def open_device(
    address: str,
    *,
    seconds: float = 1.5,
    tolerance: float = 0.01,
    timeout_seconds: float = 120.0,
    store: MeasurementStore | None = None,
    leases: Path | None = None,
    quiet: QuietTimes | None = None,
) -> Device:
    """The device at `address`, or the pool of devices, ready to measure.

    A device that a line leads to is a pool of one: it outlives lines that are cut.

    Args:
        address: as `connect` has it, or several of one class: `pool:ssh://a/ort:cpu,ssh://b/ort:cpu`.
        seconds: as `connect` has it.
        tolerance: likewise.
        timeout_seconds: likewise.
        store: likewise.
        leases: the file by which processes share boards; None: they do not.
        quiet: as `connect` has it.

    Raises:
        DeviceError: as `connect`; or no board of a pool can be used.
        StoreError: `leases` cannot be used.
    """
    parsed = parse_addresses(address)
    if isinstance(parsed, Address) and parsed.place is None:
        return connect(
            address,
            seconds=seconds,
            tolerance=tolerance,
            timeout_seconds=timeout_seconds,
            store=store,
            quiet=quiet,
        )
    check_limits(address, seconds=seconds, tolerance=tolerance, timeout_seconds=timeout_seconds)
    members = (parsed,) if isinstance(parsed, Address) else parsed.members
    quiet = QuietTimes() if quiet is None else quiet
    with ExitStack() as undone:
        held = ExitStack()
        undone.callback(held.close)
        if leases is None:
            leases = Path(held.enter_context(TemporaryDirectory(prefix="nestling-pool."))) / "leases.db"
        pool = DevicePool(
            [
                WorkerDevice(
                    member,
                    transport=transport_to(member),
                    seconds=seconds,
                    tolerance=tolerance,
                    timeout_seconds=timeout_seconds,
                    quiet=quiet,
                    # several are tried one after another
                    start_pauses=START_PAUSES if len(members) == 1 else (),
                )
                for member in members
            ],
            name=parsed.name,
            device=parsed.name if isinstance(parsed, Address) else POOL + parsed.device,
            queue=LeaseQueue(leases),
            store=store,
            on_close=held.close,
        )
        undone.callback(pool.close)
        pool.start()
        undone.pop_all()
    return pool
