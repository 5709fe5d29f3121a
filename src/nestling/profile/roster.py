"""Roster: which boards of a pool are in service, who uses them, and when the others are probed again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nestling.profile.boards import Board, Calibration, DeviceClass
from nestling.profile.leases import Job, Lease, LeaseQueue
from nestling.profile.measurement import Measurement
from nestling.profile.store import StoreError
from nestling.profile.transport import (
    DeviceError,
    DevicesGoneError,
    LineLostError,
    TooSlowError,
    WorkerLostError,
)
from nestling.profile.turns import turn
from nestling.profile.worker_device import WorkerDevice

CALIBRATION_SECONDS = 0.5
CALIBRATIONS = 3
"""How often a board is calibrated at most, where that is unstable."""
SPREAD = 0.25
"""How much slower or faster than the others a board may be, as a part."""
DRIFTED = 3
"""Measurements in a row in which a board must be another than at its calibration to be set aside."""
PATIENCE_SECONDS = 600.0
"""How long a pool without a board in service waits for one."""
POLL_SECONDS = 0.05

T = TypeVar("T")


class TryLost(Exception):  # noqa: N818 - it names what happened
    """A try that came to nothing. `strike`: whether it speaks against the file rather than the board."""

    def __init__(self, error: DeviceError, *, strike: bool) -> None:
        super().__init__(str(error))
        self.error, self.strike = error, strike


@dataclass(frozen=True, slots=True)
class Loan:
    """A board, and the lease on it."""

    board: Board
    lease: Lease


def reference_ms(taken: Measurement) -> float:
    """What the reference model took in a measurement: the median."""
    return float(np.median(taken.reference_seconds)) * 1e3


def _why_gone(gone: DevicesGoneError) -> DeviceError:
    """Why one device is gone: to a pool it is a board that fails, as others may be there."""
    return gone.__cause__ if isinstance(gone.__cause__, DeviceError) else DeviceError(str(gone))


class Roster:
    """The boards of a pool; its arguments are those of `DevicePool`. Any thread may call it."""

    def __init__(
        self,
        boards: Sequence[WorkerDevice],
        *,
        name: str,
        device: str,
        queue: LeaseQueue,
        spread: float,
        patience_seconds: float,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.name, self.queue = name, queue
        self.spread, self.patience_seconds = spread, patience_seconds
        self._device, self._tell, self._clock = device, tell, clock
        self._boards = [Board(one) for one in boards]
        self._class: DeviceClass | None = None
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._live: list[Lease] = []
        self._heart: threading.Thread | None = None
        self._forsaken_since: float | None = None

    @property
    def size(self) -> int:
        """How many boards there are, those set aside included."""
        return len(self._boards)

    @property
    def in_service(self) -> tuple[str, ...]:
        """The boards that are given work."""
        with self._lock:
            return tuple(board.name for board in self._boards if board.in_service)

    def judged(self, measurement: Measurement) -> Measurement:
        """`measurement` as the board that took it judges it now; as it is, where that one is not known."""
        for board in self._boards:
            measurement = board.device.judged(measurement)
        return measurement

    @property
    def aside(self) -> Mapping[str, str]:
        """The boards that are set aside, and why."""
        with self._lock:
            return {board.name: board.cause for board in self._boards if not board.in_service}

    def start(self) -> DeviceClass:
        """What the boards have in common; the first call starts and calibrates all of them at once.

        Raises:
            DeviceError: none of them can be used.
        """
        with self._opening:
            if self._class is None:
                with ThreadPoolExecutor(self.size) as threads:
                    visits = list(threads.map(self._visit, self._boards))
                pairs = list(zip(self._boards, visits, strict=True))
                found = {board.name: visit for board, visit in pairs if isinstance(visit, Calibration)}
                if not found:
                    causes = "; ".join(str(visit) for visit in visits)
                    raise DeviceError(causes if len(visits) == 1 else f"no board can be used: {causes}")
                settled = DeviceClass.of(found, device=self._device, spread=self.spread)
                for board, visit in pairs:
                    self._judge(board, visit, settled)
                self._class = settled
            return self._class

    def borrow(
        self, job: Job | None, *, avoid: set[str], before: str | None = None, shun: bool = False
    ) -> Loan | None:
        """A board in service that is free, those of `avoid` last; None where there is none just now.

        Args:
            job: what it is wanted for; a lease on it is taken too.
            avoid: names of boards.
            before: what the job's content was when it was asked for: there is no board where it has changed.
            shun: whether those of `avoid` are not lent at all.

        Raises:
            DevicesGoneError: none was in service for too long, or the pool was closed.
        """
        if self._closed.is_set():
            raise DevicesGoneError(f"{self.name} was closed")
        with self._lock:
            now = self._clock()
            for board in self._boards:
                if board.due(now):
                    board.probing = True
                    threading.Thread(target=self._probe, args=(board,), daemon=True).start()
            ready = {board.name: board for board in self._boards if board.in_service}
            if ready:
                self._forsaken_since = None
            elif self._forsaken_since is None:
                self._forsaken_since = now
            elif now - self._forsaken_since > self.patience_seconds:
                causes = "; ".join(board.cause for board in self._boards)
                raise DevicesGoneError(
                    f"no board was in service for {self.patience_seconds:.0f} s: {causes}; "
                    "the same command continues when one is there"
                )
        names = [name for name in ready if name not in avoid]
        names += [name for name in ready if name in avoid and not shun]
        lease = self.queue.take(job, names, before=before)
        return None if lease is None else Loan(ready[lease.board], lease)

    @contextmanager
    def held(self, loan: Loan) -> Iterator[None]:
        """Renews the loan's lease as long as this lasts, and gives back what is left of it."""
        with self._lock:
            self._live.append(loan.lease)
            if self._heart is None and not self._closed.is_set():
                self._heart = threading.Thread(target=self._beat, name=f"{self.name}: leases", daemon=True)
                self._heart.start()
        try:
            yield
        finally:
            with self._lock:
                self._live.remove(loan.lease)
            self.queue.release(loan.lease)

    def use(self, loan: Loan, work: Callable[[WorkerDevice], T]) -> T:
        """What `work` gives on the board.

        Raises:
            TryLost: the worker, the line or the board failed.
            DeviceError: the file was refused.
        """
        board, lease = loan.board, loan.lease
        ready = False
        try:
            board.device.start()
            ready = True
            done = work(board.device)
        except (DeviceError, DevicesGoneError) as told:
            # work may start the worker anew: where that is impossible, no file is to blame
            ready, error = (False, _why_gone(told)) if isinstance(told, DevicesGoneError) else (ready, told)
            if ready and not isinstance(error, WorkerLostError):
                self.queue.fail(lease, "refused", str(error))
                with self._lock:
                    board.succeeded()
                raise
            cut = isinstance(error, LineLostError)
            strike = ready and not cut
            outcome = "lost" if strike else "cut" if cut else "board"
            limit = board.device.timeout_seconds if isinstance(error, TooSlowError) else None
            self.queue.fail(lease, outcome, str(error), strike=strike, limit_seconds=limit)
            self._failed(board, error)
            raise TryLost(error, strike=strike) from error
        with self._lock:
            board.succeeded()
        return done

    def watch(self, board: Board, taken: Measurement) -> None:
        """Sets the board aside where the reference model now takes longer there than on others of its class.

        It takes `DRIFTED` measurements in a row, and as many on another board that show no such thing: where
        all boards became slower, each is as good as the others. One that is unstable for nothing but that
        its board is slower than at its best counts; others tell nothing.
        """
        if taken.restless or self._class is None:
            return
        with self._lock:
            board.recent = [*board.recent, reference_ms(taken)][-DRIFTED:]
            objections = self._objections(board)
            fine = any(
                None in self._objections(other)
                for other in self._boards
                if other is not board and other.in_service and len(other.recent) == DRIFTED
            )
            if None in objections or not fine or not board.in_service:
                return
            board.recent = []
            board.set_aside(str(objections[-1]), now=self._clock())
        self._tell(f"{board.name} is set aside: {board.cause}")

    def _objections(self, board: Board) -> list[str | None]:
        """What speaks against the board in each of its last measurements; None where there were too few."""
        if self._class is None or len(board.recent) < DRIFTED:
            return [None]
        found = (Calibration(self._class.fingerprint, took) for took in board.recent)
        return [self._class.objection(one) for one in found]

    def wait(self) -> None:
        """Waits a moment for a board to become free."""
        self._closed.wait(POLL_SECONDS)

    def close(self) -> None:
        """Ends all workers."""
        self._closed.set()
        with self._lock:
            heart, self._heart = self._heart, None
            idle = [board for board in self._boards if not board.probing]
        for board in idle:
            board.device.close()
        if heart is not None:
            heart.join()

    def _failed(self, board: Board, error: DeviceError) -> None:
        with self._lock:
            now = self._clock()
            if isinstance(error, WorkerLostError):
                told = board.failed(str(error), now=now)
            else:  # it lacks something, or has become another device: trying again at once is of no use
                board.set_aside(str(error), now=now)
                told = True
        if told:
            self._tell(f"{board.name} is set aside: {error}")

    def _beat(self) -> None:
        while not self._closed.wait(self.queue.seconds / 3):
            with self._lock:
                live = list(self._live)
            # A lease that cannot be renewed runs out, and what it brings is not counted.
            with suppress(StoreError):
                self.queue.renew(live)

    def _probe(self, board: Board) -> None:
        """Looks whether a board that was set aside can be used again."""
        settled, visit = self._class, self._visit(board)
        if settled is not None:
            self._judge(board, visit, settled)
        if self._closed.is_set():
            board.device.close()

    def _visit(self, board: Board) -> Calibration | str:
        """What the board is and how fast, or why it cannot be used."""
        try:
            while (lease := self.queue.take(None, [board.name])) is None:
                if self._closed.wait(POLL_SECONDS):
                    return "the pool was closed"
            with self.held(Loan(board, lease)):
                board.device.start()
                taken = self._calibrated(board)
        except DevicesGoneError as gone:
            return str(_why_gone(gone))
        except (DeviceError, StoreError) as error:
            return str(error)
        except Exception as error:  # one board must not end the pool or its own probing, whatever it answers
            return f"{board.name}: {type(error).__name__}: {error}"
        return Calibration(taken.fingerprint, reference_ms(taken))

    def _calibrated(self, board: Board) -> Measurement:
        """How long the reference model takes on the board: the first that is stable, else the fastest."""
        taken: list[Measurement] = []
        while not taken or (taken[-1].unstable and len(taken) < CALIBRATIONS):
            with turn(board.name, tell=None):
                taken.append(board.device.calibrate(seconds=CALIBRATION_SECONDS))
        return taken[-1] if not taken[-1].unstable else min(taken, key=reference_ms)

    def _judge(self, board: Board, visit: Calibration | str, settled: DeviceClass) -> None:
        """Puts the board into service or sets it aside, by what a visit found.

        One that is faster than its class was is believed where it was of the class itself, or of two; where
        it never was, the others are the majority.
        """
        with self._lock:
            if self._class is not None:  # all have been compared before; another one may have been since
                settled = self._class
                members = sum(one.is_member for one in self._boards)
                if isinstance(visit, Calibration) and (board.is_member or members == 1):
                    settled = self._class = settled.renewed(visit, alone=self.size == 1)
            objection = visit if isinstance(visit, str) else settled.objection(visit)
            was_in_service, board.probing = board.in_service, False
            if objection is not None:
                known = not was_in_service and board.cause == objection
                board.set_aside(objection, now=self._clock())
            else:
                board.is_member = True
                if not was_in_service:
                    board.admit()
        if objection is not None and not known:
            self._tell(f"{board.name} is set aside: {objection}")
        elif objection is None and not was_in_service:
            self._tell(f"{board.name} is back in service")
