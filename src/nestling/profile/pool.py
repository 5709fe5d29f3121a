"""DevicePool: several boards of one class as one Device, which measures a file on each of them at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from nestling.file_keys import file_key
from nestling.profile.kernels import Kernel, MadeUp, OptimizedOp
from nestling.profile.leases import Job, LeaseQueue
from nestling.profile.measurement import Fingerprint, Measurement
from nestling.profile.roster import PATIENCE_SECONDS, SPREAD, Roster, TryLost
from nestling.profile.store import MeasurementStore
from nestling.profile.transport import DeviceError, WorkerLostError
from nestling.profile.turns import turn
from nestling.profile.worker import SLOWED
from nestling.profile.worker_device import WorkerDevice

TRIES = 3
"""A file on which so many workers were lost is not tried again."""
MOST_CUTS = 20
"""Boards and lines that may be lost in one call before it fails."""

T = TypeVar("T")


class DevicePool:
    """Boards of one class as one device. Every method may be called by as many threads as there are boards.

    A file that costs a worker is tried again, on another board where there is one, and after three losses no
    more; a line that is cut speaks against its board alone. One that is timed while its board is slower than
    at its best is timed on another board too. A board that fails three times in a row, that is not what the
    others are, or that computes at another speed is set aside, and probed again later.

    Args:
        boards: the devices, each without a store.
        name: the pool's address.
        device: names the class in fingerprints; without places, so that boards may come and go.
        queue: by which all processes that use these boards share them.
        store: where measurements are kept; a file found there is not timed again.
        spread: how much slower or faster than the others a board may be, as a part.
        patience_seconds: how long to wait for a board where none is in service.
        tell: is given a sentence when a board is set aside or returns.
        clock: seconds.
        on_close: called last.
    """

    def __init__(
        self,
        boards: Sequence[WorkerDevice],
        *,
        name: str,
        device: str,
        queue: LeaseQueue,
        store: MeasurementStore | None = None,
        spread: float = SPREAD,
        patience_seconds: float = PATIENCE_SECONDS,
        tell: Callable[[str], None] = warnings.warn,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.store = queue, store
        self._name, self._device, self._on_close = name, device, on_close
        self._settings, self._timeout_seconds = boards[0].settings, boards[0].timeout_seconds
        self._roster = Roster(
            boards,
            name=name,
            device=device,
            queue=queue,
            spread=spread,
            patience_seconds=patience_seconds,
            tell=tell,
            clock=clock,
        )

    @property
    def name(self) -> str:
        """The pool's address."""
        return self._name

    @property
    def fingerprint(self) -> Fingerprint:
        """What all boards in service are; they are started and compared when it is first needed."""
        return self.start()

    @property
    def in_service(self) -> tuple[str, ...]:
        """The boards that are given work."""
        return self._roster.in_service

    @property
    def aside(self) -> Mapping[str, str]:
        """The boards that are set aside, and why."""
        return self._roster.aside

    def start(self) -> Fingerprint:
        """What the boards have in common; the first call starts and calibrates all of them at once.

        Raises:
            DeviceError: none of them can be used.
        """
        return self._roster.start().fingerprint

    def measure(self, path: Path) -> Measurement:
        """How long the file takes on one of the boards, from the store where it has been measured before.

        Where another thread or process is just measuring it, that measurement is waited for. One from when
        its board was slowed is taken once more, on another board in service; the less slowed one counts.

        Raises:
            DeviceError: no such file; the runtime refuses it.
            WorkerLostError: three workers were lost on it, now or when it was asked for before; not counting
                those that were given less time.
            DevicesGoneError: no board was in service for too long.
        """
        job = self._job(path)
        before = self.queue.state(job).content
        if before is not None:
            # its process may have been lost between counting and storing it
            self._keep(job, Measurement.from_json(before))
        known = self._stored(job)
        if known is not None and not known.unstable:
            return known
        cuts, tried = 0, set[str]()
        while True:
            state = self.queue.state(job, limit_seconds=self._timeout_seconds)
            if state.content is not None and state.content != before:
                return Measurement.from_json(state.content)  # another was at it
            if state.strikes >= TRIES:
                raise WorkerLostError(
                    f"{state.strikes} workers were lost on {path}; the last one: {state.cause}"
                )
            loan = self._roster.borrow(job, avoid=tried, before=before)
            if loan is None:
                self._roster.wait()
                continue
            tried.add(loan.board.name)
            with self._roster.held(loan):
                try:
                    taken = self._roster.use(
                        loan, lambda device: in_turn(device, lambda: device.measure(path))
                    )
                except TryLost as lost:
                    cuts += not lost.strike
                    if cuts >= MOST_CUTS:
                        raise lost.error from None
                    continue
                measurement = self._of_class(taken)
                self._roster.watch(loan.board, taken)
                if not self.queue.finish(loan.lease, measurement.to_json()):
                    continue
            kept = self._keep(job, measurement, instead=known)
            if measurement.slowness <= SLOWED:
                return kept
            return self._less_slowed(job, path, measurement, tried=tried, instead=known)

    def doubts(self, path: Path) -> bool:
        """Whether the store's time of the file is from when its board was slower than it was seen since.

        Raises:
            DeviceError: no such file, or no board can be used.
        """
        known = self._stored(self._job(path))
        return known is not None and known.unstable

    def predict(
        self, path: Path, images: NDArray[np.float32], *, key: str | None = None
    ) -> NDArray[np.float32]:
        """The logits (N, classes) of the file for `images` (N, 3, H, W), by one of the boards.

        Raises:
            ValueError: `images` is empty or not float32.
            DeviceError: the runtime refuses the file, or three workers were lost on it.
            DevicesGoneError: as `measure`.
        """
        return self._by_any(lambda device: device.predict(path, images, key=key))

    def optimized_ops(self, path: Path) -> tuple[OptimizedOp, ...] | None:
        """What the boards' runtime makes of the file; None where it does not tell.

        Raises:
            DeviceError, DevicesGoneError: as `predict`.
        """
        return self._by_any(lambda device: device.optimized_ops(path))

    def kernels(self, path: Path, *, runs: int = 1) -> tuple[Kernel, ...]:
        """What the boards' runtime runs for the file, timed `runs` times.

        Raises:
            DeviceError, DevicesGoneError: as `predict`.
        """
        return self._by_any(lambda device: in_turn(device, lambda: device.kernels(path, runs=runs)))

    def compare(self, path: Path, other: Path, *, seconds: float, fresh: bool = False) -> Measurement:
        """How long the file takes beside another one, on one of the boards; `fresh`: by a worker of its own.

        Raises:
            DeviceError, DevicesGoneError: as `predict`.
        """

        def compared(device: WorkerDevice) -> Measurement:
            return in_turn(device, lambda: device.compare(path, other, seconds=seconds, fresh=fresh))

        return self._of_class(self._by_any(compared))

    def energy(self, path: Path, *, seconds: float) -> Mapping[str, float]:
        """Joules of one call on one of the boards, by the name of its counter; empty where it has none.

        Raises:
            DeviceError, DevicesGoneError: as `predict`.
        """
        return self._by_any(lambda device: in_turn(device, lambda: device.energy(path, seconds=seconds)))

    def inputs(self, path: Path) -> tuple[MadeUp, ...]:
        """The inputs that the file is timed with.

        Raises:
            DeviceError, DevicesGoneError: as `predict`.
        """
        return self._by_any(lambda device: device.inputs(path))

    def close(self) -> None:
        """Ends all workers."""
        self._roster.close()
        self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _less_slowed(
        self, job: Job, path: Path, slow: Measurement, *, tried: set[str], instead: Measurement | None
    ) -> Measurement:
        """The less slowed of `slow`, which has been counted, and what the file takes on a board not `tried`.

        It is `slow` where there is no such board in service, or the try comes to nothing.

        Raises:
            DevicesGoneError: the pool was closed.
        """
        before = slow.to_json()
        while set(self.in_service) - tried:
            state = self.queue.state(job)
            if state.content is not None and state.content != before:  # another was at it
                return min(slow, Measurement.from_json(state.content), key=_slowness)
            loan = self._roster.borrow(job, avoid=tried, before=before, shun=True)
            if loan is None:
                self._roster.wait()
                continue
            with self._roster.held(loan):
                try:
                    taken = self._roster.use(
                        loan, lambda device: in_turn(device, lambda: device.measure(path))
                    )
                except (TryLost, DeviceError):
                    return slow
                measurement = self._of_class(taken)
                self._roster.watch(loan.board, taken)
                if self.queue.finish(loan.lease, min(slow, measurement, key=_slowness).to_json()):
                    return min(slow, self._keep(job, measurement, instead=instead), key=_slowness)
                return slow
        return slow

    def _job(self, path: Path) -> Job:
        try:
            key = file_key(path)
        except OSError as error:
            raise DeviceError(f"{self.name}: model {path} cannot be read: {error.strerror}") from None
        return Job(key, self.fingerprint.key, self._settings)

    def _of_class(self, taken: Measurement) -> Measurement:
        """`taken` as the class's: which board it was taken on, the queue knows."""
        return replace(taken, fingerprint=replace(taken.fingerprint, device=self._device))

    def _stored(self, job: Job) -> Measurement | None:
        """What the store has of the job's file, judged by how fast its board is known to be."""
        if self.store is None:
            return None
        known = self.store.get(job.file, fingerprint=self.fingerprint, settings=job.settings)
        return None if known is None else self._roster.judged(known)

    def _keep(self, job: Job, measurement: Measurement, *, instead: Measurement | None = None) -> Measurement:
        if self.store is None:
            return measurement
        return self.store.put(measurement, file=job.file, settings=job.settings, instead=instead)

    def _by_any(self, work: Callable[[WorkerDevice], T]) -> T:
        """What `work` gives on the first board that is free; on others, where a board or line is lost."""
        self.start()
        strikes, cuts, tried = 0, 0, set[str]()
        while True:
            loan = self._roster.borrow(None, avoid=tried)
            if loan is None:
                self._roster.wait()
                continue
            with self._roster.held(loan):
                try:
                    return self._roster.use(loan, work)
                except TryLost as lost:
                    tried.add(loan.board.name)
                    strikes, cuts = strikes + lost.strike, cuts + (not lost.strike)
                    if strikes >= TRIES or cuts >= MOST_CUTS:
                        raise lost.error from None


def _slowness(measurement: Measurement) -> float:
    return measurement.slowness


def in_turn(device: WorkerDevice, work: Callable[[], T]) -> T:
    """What `work` gives; where the board is this machine, when it is this process's turn to measure."""
    with turn(device.name, tell=None):
        return work()
