from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestling.profile import (
    Address,
    DeviceError,
    DevicePool,
    DevicesGoneError,
    LineLostError,
    MeasurementStore,
    StoreError,
    WorkerDevice,
    WorkerLostError,
    compare_files,
    open_device,
    opening,
    profile_file,
)
from nestling.profile.address import SshPlace
from nestling.profile.boards import FIRST_REST, Board
from nestling.profile.leases import Job, JobState, LeaseQueue
from nestling.profile.measurement import Conditions
from nestling.profile.quiet import QuietTimes
from nestling.profile.roster import TryLost
from nestling.profile.transport import Answer

SEGFAULT = WorkerLostError("the worker was ended by SIGSEGV during 'time'")
CUT = LineLostError("the line was lost during 'time'")
REFUSED = "Fail: no kernel"


class Clock:
    """Seconds of which a pool's backoff is told; they pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBoard:
    """A worker that answers by itself; `faults` are raised, or refused with, when a file is timed next."""

    def __init__(self, faults: list[Exception | str] | None = None, *, reference_ms: float = 1.0) -> None:
        self.faults = list(faults or [])
        self.reference_ms, self.cpu = reference_ms, "A CPU"
        self.running = False
        self.starts = self.timed = self.most_at_once = 0
        self.unreachable = False
        self.nonsense: Exception | None = None
        """What starting it raises, though no transport should."""
        self.restless = 0
        self.gate: threading.Event | None = None
        self.delay = 0.0
        """Seconds that pass before a fault."""
        self._now = 0

    def start(self) -> None:
        if self.unreachable:
            raise LineLostError("the board does not answer")
        if self.nonsense is not None:
            raise self.nonsense
        self.running = True
        self.starts += 1

    def stop(self) -> None:
        self.running = False

    def exchange(
        self, request: Mapping[str, Any], blob: bytes | memoryview, *, timeout_seconds: float
    ) -> Answer:
        del blob, timeout_seconds
        verb = request["verb"]
        if verb == "hello":
            said = {"cpu": self.cpu, "instructions": [], "cores": 2, "platform": "Linux aarch64"}
            return Answer({**said, "runtime": "onnxruntime 1.0", "int8_saturates": False}, b"")
        if verb == "load":
            inputs = [{"name": "images", "dtype": "float32", "shape": [1, 3, 8, 8]}]
            return Answer({"load_seconds": 0.1, "first_seconds": 0.2, "inputs": inputs}, b"")
        if verb == "energy":
            return Answer({"calls": 2, "joules": {"board": 3.0}}, b"")
        if verb == "time":
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            try:
                return self._time(request)
            finally:
                self._now -= 1
        if verb == "predict":
            return Answer({"shape": [2, 4]}, np.zeros((2, 4), "<f4").tobytes())
        return Answer({}, b"")

    def _time(self, request: Mapping[str, Any]) -> Answer:
        reference = int(self.reference_ms * 1e6)
        if request["seconds"] != 1.0 and self.restless:
            self.restless -= 1
            return Answer({}, np.array([[reference] * 20 + [3 * reference] * 20] * 2, "<i8").tobytes())
        if request["seconds"] != 1.0:  # the pool calibrates
            return Answer({}, np.array([[reference] * 40] * 2, "<i8").tobytes())
        if self.gate is not None:
            assert self.gate.wait(10)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, str):
            return Answer({"refused": fault}, b"")
        if fault is not None:
            time.sleep(self.delay)
            self.running = False
            raise fault
        self.timed += 1
        return Answer({}, np.array([[3 * reference] * 40, [reference] * 40], "<i8").tobytes())


Made = Callable[..., DevicePool]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, clock: Clock, told: list[str]) -> Iterator[Made]:
    """Makes a pool of fake boards, called ssh://0 and so on."""
    made: list[DevicePool] = []

    def make(
        *boards: FakeBoard, quiet: QuietTimes | None = None, timeout_seconds: float = 5, **options: Any
    ) -> DevicePool:
        devices = [
            WorkerDevice(
                Address("cpu", place=SshPlace(str(number))),
                transport=board,
                seconds=1.0,
                tolerance=0.01,
                timeout_seconds=timeout_seconds,
                quiet=quiet,
                start_pauses=(),
            )
            for number, board in enumerate(boards)
        ]
        queue = LeaseQueue(tmp_path / "leases.db")
        given = {"name": "pool:some", "device": "pool:ort:cpu?threads=1", "queue": queue, "tell": told.append}
        made.append(DevicePool(devices, **{**given, "clock": clock, **options}))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.onnx" for number in range(count)]
    for path in paths:
        path.write_text(path.name)
    return paths


def outcomes(pool: DevicePool) -> list[tuple[str, str | None]]:
    return [(attempt.board[6:7], attempt.outcome) for attempt in pool.queue.attempts()]


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_pool_measures_as_its_class_wherever_that_was(make: Made, tmp_path: Path) -> None:
    pool = make(FakeBoard(), FakeBoard())
    [path] = files(tmp_path, 1)
    taken = pool.measure(path)
    assert taken.ratio == pytest.approx(3)
    assert taken.fingerprint == pool.fingerprint
    assert taken.device == "pool:ort:cpu?threads=1"
    assert pool.predict(path, np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 4)
    assert outcomes(pool) == [("0", "measured")]


def test_all_boards_measure_at_once_and_each_one_file_at_a_time(make: Made, tmp_path: Path) -> None:
    boards = [FakeBoard() for _ in range(3)]
    gate = threading.Event()
    for board in boards:
        board.gate = gate
    pool, paths = make(*boards), files(tmp_path, 6)
    pool.start()
    threads = [threading.Thread(target=pool.measure, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(pool.queue.attempts()) == 3)
    gate.set()
    for thread in threads:
        thread.join()
    assert [board.most_at_once for board in boards] == [1, 1, 1]
    assert sum(board.timed for board in boards) == 6
    assert [outcome for _, outcome in outcomes(pool)] == ["measured"] * 6


def test_those_who_want_one_file_at_once_get_one_measurement(
    make: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, gate = FakeBoard(), threading.Event()
    board.gate = gate
    pool, [path] = make(board, FakeBoard()), files(tmp_path, 1)
    pool.start()
    wanting = set[int]()
    state = pool.queue.state

    def counted(job: Job, *, limit_seconds: float = 0.0) -> JobState:
        known = state(job, limit_seconds=limit_seconds)
        wanting.add(threading.get_ident())
        return known

    monkeypatch.setattr(pool.queue, "state", counted)
    taken: list[float] = []
    threads = [threading.Thread(target=lambda: taken.append(pool.measure(path).ratio)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(pool.queue.attempts()) == 1 and len(wanting) == 3)
    gate.set()
    for thread in threads:
        thread.join()
    assert taken == [pytest.approx(3)] * 3
    assert outcomes(pool) == [("0", "measured")]


def test_what_the_store_has_is_not_measured_whatever_boards_there_are(make: Made, tmp_path: Path) -> None:
    store, [path] = MeasurementStore(tmp_path / "m.db"), files(tmp_path, 1)
    taken = make(FakeBoard(), store=store).measure(path)
    other = FakeBoard()
    assert make(other, FakeBoard(), store=store).measure(path) == taken
    assert other.timed == 0


def test_what_was_counted_before_a_kill_is_stored_and_not_timed_again(make: Made, tmp_path: Path) -> None:
    killed, [path] = make(FakeBoard()), files(tmp_path, 1)
    counted = killed.measure(path)  # without a store, as if the process had ended before it was stored
    board, store = FakeBoard(), MeasurementStore(tmp_path / "m.db")
    assert make(board, store=store).measure(path) == counted
    assert board.timed == 0
    assert store.all() == [counted]


def test_what_was_counted_and_is_unstable_is_kept_and_timed_again(make: Made, tmp_path: Path) -> None:
    killed, [path] = make(FakeBoard()), files(tmp_path, 1)
    counted = killed.measure(path)
    job = killed._job(path)
    restless = replace(counted, seconds=(1e-3, 9e-3) * 20)
    lease = killed.queue.take(job, ["ssh://0/ort:cpu?threads=1"], before=counted.to_json())
    assert lease is not None
    assert killed.queue.finish(lease, restless.to_json())
    board, store = FakeBoard(), MeasurementStore(tmp_path / "m.db")
    assert make(board, store=store).measure(path) == counted
    assert board.timed == 1
    assert store.unstable() == [restless]
    assert store.all() == [counted]


def test_a_file_that_costs_a_worker_is_tried_on_another_board(make: Made, tmp_path: Path) -> None:
    pool = make(FakeBoard([SEGFAULT]), FakeBoard())
    assert pool.measure(files(tmp_path, 1)[0]).ratio == pytest.approx(3)
    assert outcomes(pool) == [("0", "lost"), ("1", "measured")]
    [first, _] = pool.queue.attempts()
    assert first.cause is not None
    assert "SIGSEGV" in first.cause


def test_a_file_that_costs_three_workers_is_given_up_for_good(make: Made, tmp_path: Path) -> None:
    pool, [path] = make(FakeBoard([SEGFAULT] * 2), FakeBoard([SEGFAULT])), files(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(
            WorkerLostError, match=r"3 workers were lost on .*0\.onnx; the last one: .*SIGSEGV"
        ):
            pool.measure(path)
    assert [outcome for _, outcome in outcomes(pool)] == ["lost"] * 3
    assert make(FakeBoard()).measure(files(tmp_path, 2)[1]).ratio == pytest.approx(3)


def test_a_file_that_was_too_slow_is_tried_again_with_more_time(make: Made, tmp_path: Path) -> None:
    [path] = files(tmp_path, 1)
    board = FakeBoard([SEGFAULT] * 3)
    board.delay = 0.03
    pool = make(board, timeout_seconds=0.02)
    for _ in range(2):
        with pytest.raises(WorkerLostError, match=r"3 workers were lost on .*raise profile\.timeout_seconds"):
            pool.measure(path)
    assert make(FakeBoard()).measure(path).ratio == pytest.approx(3)


def test_a_refusal_is_the_file_s_and_not_tried_elsewhere(make: Made, tmp_path: Path) -> None:
    pool, [path] = make(FakeBoard([REFUSED]), FakeBoard()), files(tmp_path, 1)
    with pytest.raises(DeviceError, match=REFUSED):
        pool.measure(path)
    assert outcomes(pool) == [("0", "refused")]
    assert pool.in_service == ("ssh://0/ort:cpu?threads=1", "ssh://1/ort:cpu?threads=1")


def test_lines_that_are_cut_never_speak_against_the_file(make: Made, tmp_path: Path) -> None:
    pool = make(FakeBoard([CUT] * 2), FakeBoard([CUT]))
    assert pool.measure(files(tmp_path, 1)[0]).ratio == pytest.approx(3)
    assert [outcome for _, outcome in outcomes(pool)] == ["cut"] * 3 + ["measured"]


def test_a_board_that_fails_three_times_in_a_row_rests_and_returns_after_a_probe(
    make: Made, tmp_path: Path, clock: Clock, told: list[str]
) -> None:
    board = FakeBoard()
    pool, paths = make(board, FakeBoard()), files(tmp_path, 4)
    pool.start()
    board.unreachable, board.running = True, False
    pool.measure(paths[0])
    for path in paths[1:3]:
        pool.measure(path)
    assert pool.aside == {"ssh://0/ort:cpu?threads=1": "the board does not answer"}
    assert [outcome for name, outcome in outcomes(pool) if name == "0"] == ["cut"] * 3
    starts = board.starts
    board.unreachable = False
    pool.measure(paths[3])
    assert board.starts == starts  # it rests
    clock.now += FIRST_REST
    pool.predict(paths[0], np.zeros((2, 3, 8, 8), np.float32))
    wait_for(lambda: not pool.aside)
    assert told == [
        "ssh://0/ort:cpu?threads=1 is set aside: the board does not answer",
        "ssh://0/ort:cpu?threads=1 is back in service",
    ]


def test_each_probe_that_fails_doubles_the_rest() -> None:
    device = WorkerDevice(Address("cpu"), transport=FakeBoard(), seconds=1, tolerance=1, timeout_seconds=5)
    board = Board(device)
    assert [board.failed("gone", now=0.0) for _ in range(3)] == [False, False, True]
    assert board.aside_until == FIRST_REST
    board.set_aside("gone", now=10.0)
    assert board.aside_until == 10.0 + 2 * FIRST_REST
    for _ in range(20):
        board.set_aside("gone", now=0.0)
    assert board.aside_until == 300.0
    board.admit()
    assert board.failed("gone", now=0.0)  # one failure is enough after a probe
    board.admit()
    board.succeeded()
    assert not board.failed("gone", now=0.0)


def test_a_board_of_another_speed_is_set_aside_with_figures(make: Made, told: list[str]) -> None:
    pool = make(FakeBoard(reference_ms=2.0), FakeBoard(reference_ms=3.1), FakeBoard(reference_ms=2.1))
    pool.start()
    assert pool.in_service == ("ssh://0/ort:cpu?threads=1", "ssh://2/ort:cpu?threads=1")
    assert told == [
        "ssh://1/ort:cpu?threads=1 is set aside: the reference model takes 3.1 ms there and 2.1 ms on "
        "the others, 1.48 times as long; 1.25 times is the most in one class"
    ]
    assert make(FakeBoard(), FakeBoard(reference_ms=1.2)).start().cpu == "A CPU"


def test_when_a_pool_is_opened_the_majority_has_the_class_s_speed(make: Made) -> None:
    pool = make(*(FakeBoard(reference_ms=each) for each in (1.5, 1.0, 1.5)))
    pool.start()
    assert pool.in_service == ("ssh://0/ort:cpu?threads=1", "ssh://2/ort:cpu?threads=1")


@pytest.mark.parametrize(("restless", "in_service"), [(2, 3), (3, 2)])
def test_an_unstable_calibration_is_taken_again_twice(make: Made, restless: int, in_service: int) -> None:
    board = FakeBoard()
    board.restless = restless
    pool = make(FakeBoard(), board, FakeBoard())
    pool.start()
    assert board.restless == 0
    assert len(pool.in_service) == in_service


@pytest.mark.parametrize("slowed", [None, 1.5])  # whether the board's best is known
def test_a_board_that_became_slower_than_the_others_is_set_aside(
    make: Made, told: list[str], tmp_path: Path, slowed: float | None
) -> None:
    pool = make(FakeBoard(), FakeBoard())
    calm = pool.measure(files(tmp_path, 1)[0])
    slow = replace(calm, reference_seconds=(1.5e-3,) * 40, conditions=Conditions(slowed=slowed))
    roster = pool._roster
    first, second = roster._boards
    assert first.recent == [1.0]  # of what was measured
    for _ in range(5):
        roster.watch(first, slow)
    roster.watch(second, calm)
    assert len(pool.in_service) == 2  # too little is known of the other one
    roster.watch(first, calm)
    for _ in range(2):
        roster.watch(first, slow)
        roster.watch(second, calm)
    assert len(pool.in_service) == 2  # it was itself a moment ago
    roster.watch(first, replace(slow, seconds=(1e-3, 9e-3) * 20))
    assert len(pool.in_service) == 2  # one that is unstable for another reason tells nothing
    roster.watch(first, slow)
    assert [*pool.in_service] == [second.name]
    assert (
        "ssh://0/ort:cpu?threads=1 is set aside: the reference model takes 1.5 ms there and 1 ms" in told[0]
    )


def slowed_pool(
    make: Made, folder: Path, *times: float, **options: Any
) -> tuple[DevicePool, list[FakeBoard]]:
    """A pool of boards that take so many times as long as when it was opened."""
    boards = [FakeBoard() for _ in times]
    pool = make(*boards, quiet=QuietTimes(folder / "devices.db"), **options)
    pool.start()
    for board, slowness in zip(boards, times, strict=True):
        board.reference_ms = slowness
    return pool, boards


def test_what_a_slowed_board_timed_is_timed_on_another_until_the_slow_one_is_set_aside(
    make: Made, told: list[str], tmp_path: Path
) -> None:
    store, paths = MeasurementStore(tmp_path / "m.db"), files(tmp_path, 5)
    pool, _ = slowed_pool(make, tmp_path, 1.5, 1.0, store=store)
    taken = [pool.measure(path) for path in paths]
    assert [one.unstable for one in taken] == [False] * 5
    # both were seen three times by then: the fourth finds the first one slower than its class
    assert outcomes(pool) == [("0", "measured"), ("1", "measured")] * 4 + [("1", "measured")]
    assert "takes 1.5 ms there and 1 ms" in told[0]
    assert [one.slowness for one in store.unstable()] == [1.5] * 4
    assert len(store.all()) == 5
    assert pool.queue.state(pool._job(paths[0])).content == taken[0].to_json()


@pytest.mark.parametrize("times", [(1.5, 1.25, 1.2), (1.25, 1.5, 1.2)])
def test_where_boards_are_slowed_one_other_is_tried_and_the_less_slowed_counts(
    make: Made, tmp_path: Path, times: tuple[float, ...]
) -> None:
    store, [path] = MeasurementStore(tmp_path / "m.db"), files(tmp_path, 1)
    pool, _ = slowed_pool(make, tmp_path, *times, store=store)
    taken = pool.measure(path)
    assert taken.slowness == 1.25
    assert outcomes(pool) == [("0", "measured"), ("1", "measured")]
    assert pool.queue.state(pool._job(path)).content == taken.to_json()
    assert [one.slowness for one in store.unstable()] == [*times[:2]]


def test_a_slowed_measurement_stands_where_no_other_board_can_tell_more(make: Made, tmp_path: Path) -> None:
    first, second, third = files(tmp_path, 3)
    alone, _ = slowed_pool(make, tmp_path, 1.5)
    assert alone.measure(first).slowness == 1.5
    assert outcomes(alone) == [("0", "measured")]
    pool, [_, other] = slowed_pool(make, tmp_path, 1.5, 1.0)
    for fault, path, outcome in ((SEGFAULT, second, "lost"), (REFUSED, third, "refused")):
        other.faults = [fault]
        assert pool.measure(path).slowness == 1.5
        assert outcomes(pool)[-2:] == [("0", "measured"), ("1", outcome)]
    [_, second_board] = pool._roster._boards
    second_board.set_aside("its line was cut", now=0.0)
    pool.measure(first)
    assert outcomes(pool)[-1] == ("0", "measured")


def test_a_slowed_measurement_waits_for_another_board_or_for_who_measures_the_file_meanwhile(
    make: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = files(tmp_path, 2)
    pool, _ = slowed_pool(make, tmp_path, 1.5, 1.0)
    queue, name = pool.queue, "ssh://1/ort:cpu?threads=1"
    busy = queue.take(None, [name])
    assert busy is not None
    with monkeypatch.context() as patch:
        patch.setattr(pool._roster, "wait", lambda: queue.release(busy))
        calm = pool.measure(first)
    assert calm.slowness == 1.0
    assert outcomes(pool) == [("0", "measured"), ("1", "measured")]
    assert queue.take(None, [name]) is not None

    def another_process() -> None:
        job = pool._job(second)
        lease = queue.take(job, ["ssh://2/ort:cpu"], before=queue.state(job).content)
        assert lease is not None
        assert queue.finish(lease, calm.to_json())

    monkeypatch.setattr(pool._roster, "wait", another_process)
    assert pool.measure(second) == calm
    assert outcomes(pool)[2:] == [("0", "measured"), ("2", "measured")]


def test_boards_that_became_slower_together_stay_in_service(make: Made, tmp_path: Path) -> None:
    pool = make(FakeBoard(), FakeBoard())
    slow = replace(pool.measure(files(tmp_path, 1)[0]), reference_seconds=(1.5e-3,) * 40)
    for _ in range(5):
        for board in pool._roster._boards:
            pool._roster.watch(board, slow)
    assert len(pool.in_service) == 2


def test_of_two_boards_the_faster_one_is_believed(make: Made) -> None:
    pool = make(FakeBoard(reference_ms=3.0), FakeBoard(reference_ms=2.0))
    pool.start()
    assert pool.in_service == ("ssh://1/ort:cpu?threads=1",)


def rested(make: Made, clock: Clock, took: list[float], now: list[float]) -> DevicePool:
    """A pool of boards that took so long when it was opened and take so long `now`; the first was probed."""
    boards = [FakeBoard(reference_ms=each) for each in took]
    pool = make(*boards)
    pool.start()
    for board, each in zip(boards, now, strict=True):
        board.reference_ms = each
    first, starts = pool._roster._boards[0], boards[0].starts
    if first.in_service:
        first.set_aside("its line was cut", now=clock.now)
    first.device.close()
    clock.now += FIRST_REST
    pool._roster.borrow(None, avoid=set())
    wait_for(lambda: boards[0].starts > starts and not first.probing)
    return pool


@pytest.mark.parametrize("now", [[1.0], [2.2]])
def test_a_board_alone_is_compared_with_no_other_time_of_its_own(
    make: Made, clock: Clock, told: list[str], now: list[float]
) -> None:
    assert rested(make, clock, [1.5], now).in_service == ("ssh://0/ort:cpu?threads=1",)
    assert told == ["ssh://0/ort:cpu?threads=1 is back in service"]


@pytest.mark.parametrize(
    ("took", "now", "returns"),
    [
        ([1.5, 1.5, 1.5], [1.0, 1.5, 1.5], True),  # it was slowed down when all were calibrated
        ([1.5, 1.5, 1.5], [2.0, 1.5, 1.5], False),
        ([1.0, 1.5, 1.5], [1.0, 1.5, 1.5], False),  # it never was of the class
        ([3.0, 1.5], [1.0, 1.5], True),  # of two the faster one
    ],
)
def test_of_a_class_a_board_may_become_faster_but_not_slower(
    make: Made, clock: Clock, took: list[float], now: list[float], returns: bool
) -> None:
    pool = rested(make, clock, took, now)
    assert ("ssh://0/ort:cpu?threads=1" in pool.in_service) == returns
    assert pool._roster.start().reference_ms == (1.0 if returns else 1.5)


def test_a_board_of_another_kind_is_set_aside(make: Made, told: list[str]) -> None:
    other = FakeBoard()
    other.cpu = "Another CPU"
    pool = make(FakeBoard(), other, FakeBoard())
    assert pool.fingerprint.cpu == "A CPU"
    assert list(pool.aside) == ["ssh://1/ort:cpu?threads=1"]
    assert "another kind of device (pool:ort:cpu?threads=1 on Another CPU" in told[0]


@pytest.mark.parametrize("how", ["cannot be started", "another"])
def test_a_board_that_is_gone_is_set_aside_and_the_others_measure_on(
    make: Made, tmp_path: Path, told: list[str], how: str
) -> None:
    board = FakeBoard()
    pool = make(board, FakeBoard())
    pool.start()
    board.running = False
    if how == "another":
        board.cpu = "Another CPU"
    else:
        board.nonsense = DeviceError("Python is gone")
    assert pool.measure(files(tmp_path, 1)[0]).ratio == pytest.approx(3)
    assert pool.in_service == ("ssh://1/ort:cpu?threads=1",)
    assert outcomes(pool)[0] == ("0", "board")
    said = "is now .*Another CPU" if how == "another" else "aside: Python is gone$"
    assert re.search(said, told[0])


@pytest.mark.parametrize("how", ["cannot be started", "lost", "another"])
def test_a_board_that_is_gone_when_work_starts_it_anew_is_no_fault_of_the_file(
    make: Made, tmp_path: Path, told: list[str], how: str
) -> None:
    board = FakeBoard()
    pool = make(board, FakeBoard())
    pool.start()
    if how == "another":
        board.cpu = "Another CPU"
    else:
        board.nonsense = DeviceError("Python is gone") if how == "cannot be started" else SEGFAULT
    first, second = files(tmp_path, 2)
    # three times: so many losses of workers would be enough to give up the file
    found = [pool.compare(first, second, seconds=1.0, fresh=True) for _ in range(3)]
    assert [taken.ratio for taken in found] == [pytest.approx(3)] * 3
    assert pool.in_service == ("ssh://1/ort:cpu?threads=1",)
    assert len(told) == 1


def test_a_worker_that_dies_before_it_is_asked_and_cannot_be_started_is_the_board_s_failure(
    make: Made, tmp_path: Path
) -> None:
    board = FakeBoard()
    pool, [path] = make(board, FakeBoard()), files(tmp_path, 1)
    pool.start()
    loan = pool._roster.borrow(pool._job(path), avoid=set())
    assert loan is not None

    def dies(device: WorkerDevice) -> None:
        board.running, board.nonsense = False, SEGFAULT
        device.measure(path)

    with pool._roster.held(loan), pytest.raises(TryLost) as lost:
        pool._roster.use(loan, dies)
    assert not lost.value.strike
    assert outcomes(pool) == [("0", "board")]
    assert pool.queue.state(pool._job(path)).strikes == 0


def test_a_board_that_cannot_be_reached_at_first_does_not_stop_the_others(
    make: Made, told: list[str]
) -> None:
    gone = FakeBoard()
    gone.unreachable = True
    pool = make(gone, FakeBoard())
    assert pool.fingerprint.cpu == "A CPU"
    assert told == ["ssh://0/ort:cpu?threads=1 is set aside: the board does not answer"]
    with pytest.raises(DeviceError, match="no board can be used: the board does not answer; the board does"):
        make(gone, gone).start()


def test_a_board_that_answers_nonsense_is_set_aside_and_probed_again(
    make: Made, tmp_path: Path, clock: Clock, told: list[str]
) -> None:
    odd = FakeBoard()
    odd.nonsense = KeyError("cpu")
    pool = make(odd, FakeBoard())
    assert pool.fingerprint.cpu == "A CPU"
    assert told == ["ssh://0/ort:cpu?threads=1 is set aside: ssh://0/ort:cpu?threads=1: KeyError: 'cpu'"]
    odd.nonsense = ValueError("a probe's")
    first, second = files(tmp_path, 2)
    clock.now += FIRST_REST
    pool.measure(first)
    wait_for(lambda: len(told) == 2)
    odd.nonsense = None
    clock.now += 2 * FIRST_REST
    pool.measure(second)
    wait_for(lambda: not pool.aside)


def test_a_pool_that_stays_without_boards_ends_the_search_with_the_causes(
    make: Made, tmp_path: Path, clock: Clock
) -> None:
    board = FakeBoard()
    pool = make(board, patience_seconds=60.0)
    pool.start()
    board.unreachable, board.running = True, False
    failed: list[BaseException] = []

    def measure() -> None:
        try:
            pool.measure(files(tmp_path, 1)[0])
        except DevicesGoneError as error:
            failed.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    wait_for(lambda: bool(pool.aside))
    for _ in range(20):
        clock.now += 10
        time.sleep(0.06)
    thread.join(10)
    [error] = failed
    assert "no board was in service for 60 s: the board does not answer" in str(error)


def test_a_late_answer_is_not_counted(make: Made, tmp_path: Path) -> None:
    slow = FakeBoard()
    slow.gate = threading.Event()
    pool, [path] = make(slow), files(tmp_path, 1)
    thread = threading.Thread(target=pool.measure, args=(path,))
    thread.start()
    wait_for(lambda: len(pool.queue.attempts()) == 1)
    other = LeaseQueue(pool.queue.path, clock=lambda: time.time() + 2 * pool.queue.seconds)
    other.take(None, ["another"])  # whoever looks at a time when the lease has run out strikes it out
    make(FakeBoard()).measure(path)
    slow.gate.set()
    thread.join()
    assert Counter(outcome for _, outcome in outcomes(pool)) == {"measured": 1, "late": 1}


def test_a_lease_is_renewed_while_its_file_is_timed(make: Made, tmp_path: Path) -> None:
    slow = FakeBoard()
    slow.gate = threading.Event()
    pool, [path] = make(slow, queue=LeaseQueue(tmp_path / "short.db", seconds=0.15)), files(tmp_path, 1)
    thread = threading.Thread(target=pool.measure, args=(path,))
    thread.start()
    wait_for(lambda: len(pool.queue.attempts()) == 1)
    time.sleep(0.4)
    assert pool.queue.take(None, ["ssh://0/ort:cpu?threads=1"]) is None
    slow.gate.set()
    thread.join()
    assert outcomes(pool) == [("0", "measured")]


def test_two_files_are_compared_by_a_fresh_worker_every_round(make: Made, tmp_path: Path) -> None:
    board = FakeBoard()
    first, second = files(tmp_path, 2)
    with make(board) as pool:
        pool.start()
        before = board.starts
        told = compare_files(pool, first, second, seconds=3.0, rounds=3)
        assert board.starts == before + 3
        assert told.device == pool.name
        pool.compare(first, second, seconds=1.0)
        assert board.starts == before + 3


def test_a_file_is_profiled_on_a_pool(make: Made, tmp_path: Path) -> None:
    with make(FakeBoard()) as pool:
        told = profile_file(pool, files(tmp_path, 1)[0])
        assert told.measurement.device == pool.fingerprint.device
        assert told.measurement.ratio == 3
        assert told.inputs[0].shape == (1, 3, 8, 8)
        assert told.joules == {"board": 1.5}


def test_a_pool_that_cannot_be_opened_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for leases in (None, tmp_path / "missing" / "leases.db"):
        with monkeypatch.context() as patched:
            if leases is None:
                patched.setattr(opening, "LeaseQueue", _full)
            with pytest.raises(StoreError) as caught:
                open_device("pool:ort:cpu", leases=leases, quiet=QuietTimes(tmp_path / "q.db"))
        assert list(tmp_path.glob("nestling-pool*")) == [], caught


def _full(path: Path) -> LeaseQueue:
    raise StoreError(f"lease queue {path}: the disk is full")


def test_a_pool_makes_a_folder_only_for_leases_that_nobody_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(opening, "transport_to", lambda _: FakeBoard())
    for leases, count in ((tmp_path / "leases.db", 0), (None, 1)):
        with open_device("pool:ort:cpu", seconds=1.5, leases=leases, quiet=QuietTimes(tmp_path / "q.db")):
            assert len(list(tmp_path.glob("nestling-pool*"))) == count
        assert list(tmp_path.glob("nestling-pool*")) == []


def test_open_device_opens_what_an_address_names(tiny: Path, tmp_path: Path) -> None:
    with open_device("ort:cpu", seconds=0.02, timeout_seconds=60) as device:
        assert isinstance(device, WorkerDevice)
    leases = tmp_path / "leases.db"
    with open_device("pool:ort:cpu", seconds=0.02, timeout_seconds=60, leases=leases) as device:
        assert isinstance(device, DevicePool)
        assert device.name == "pool:ort:cpu?threads=1"
        assert device.measure(tiny).ratio > 0
    assert leases.exists()
    with pytest.raises(DeviceError, match="must be above seconds"):
        open_device("pool:ort:cpu", seconds=5, timeout_seconds=1)
    with pytest.raises(DeviceError, match="needs CUDAExecutionProvider"):
        open_device("pool:ort:cuda")
