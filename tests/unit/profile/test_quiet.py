"""A machine that is busy all the time is told by what it did before."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nestling.profile import Measurement
from nestling.profile.measurement import Conditions
from nestling.profile.quiet import KEPT_SECONDS, QuietTimes, state_file
from nestling.profile.store import MeasurementStore, StoreError

Measured = Callable[..., Measurement]


@pytest.fixture
def taken(measured: Measured) -> Callable[[float], Measurement]:
    """A measurement in which the reference model took so many seconds each time."""
    return lambda seconds: measured(*[3 * seconds] * 40, reference=(seconds,) * 40)


def test_a_device_slower_than_it_was_is_unstable_and_says_by_how_much(
    tmp_path: Path, taken: Callable[[float], Measurement]
) -> None:
    quiet = QuietTimes(tmp_path / "devices.db")
    first = quiet.heard(taken(1.0))
    assert (first.conditions.slowed, first.unstable) == (1.0, False)
    assert not quiet.heard(taken(1.1)).unstable
    busy = quiet.heard(taken(1.5))
    assert busy.unstable_because == (
        "the reference model took 1.50 times as long as on this device at its best",
    )
    assert busy.reference_ms == pytest.approx(1)
    assert busy.ratio == pytest.approx(3)


def test_other_processes_know_it_and_a_faster_time_doubts_what_was_stable(
    tmp_path: Path, taken: Callable[[float], Measurement]
) -> None:
    path = tmp_path / "below" / "devices.db"
    slow = QuietTimes(path).heard(taken(1.5))
    assert not slow.unstable
    assert QuietTimes(path).heard(taken(1.0)).conditions.slowed == 1.0
    assert QuietTimes(path).judged(slow).unstable
    assert QuietTimes(tmp_path / "another.db").judged(slow).conditions.slowed is None


def test_the_fast_part_of_a_restless_measurement_is_the_best(tmp_path: Path, measured: Measured) -> None:
    quiet = QuietTimes(tmp_path / "devices.db")
    restless = measured(*[3.0] * 40, reference=(1.5,) * 28 + (0.98, 1.0, 1.02) * 4)
    assert quiet.heard(restless).conditions.slowed == pytest.approx(1.5)
    assert quiet.heard(measured(*[3.0] * 40, reference=(1.0,) * 40)).conditions.slowed == 1.0


def test_a_few_fast_calls_or_interrupted_ones_are_nobodys_best(tmp_path: Path, measured: Measured) -> None:
    quiet = QuietTimes(tmp_path / "devices.db")
    lucky = measured(*[3.0] * 40, reference=(1.5,) * 34 + (1.0,) * 6)
    assert quiet.heard(lucky).conditions.slowed is None
    crowded = measured(*[3.0] * 40, reference=(1.0,) * 40)
    crowded = replace(crowded, conditions=Conditions(interrupted=0.3))
    assert quiet.heard(crowded).conditions.slowed is None
    assert quiet.heard(measured(*[3.0] * 40, reference=(1.4,) * 40)).conditions.slowed == 1.0


def test_two_machines_of_one_kind_have_each_their_best(tmp_path: Path, measured: Measured) -> None:
    quiet = QuietTimes(tmp_path / "devices.db")
    one, other = (
        replace(measured(*[3.0] * 40, reference=(took,) * 40), machine=name)
        for name, took in {"one": 1.0, "other": 1.5}.items()
    )
    assert one.fingerprint == other.fingerprint
    assert quiet.heard(one).conditions.slowed == quiet.heard(other).conditions.slowed == 1.0
    assert quiet.best(one.fingerprint, machine="one") == pytest.approx(1e-3)
    assert quiet.best(one.fingerprint, machine="a third") is None


def test_processes_that_tell_at_once_leave_the_better_time(tmp_path: Path, measured: Measured) -> None:
    path = tmp_path / "devices.db"
    takes = [1.0 + 0.001 * number for number in range(12)]
    random.Random(0).shuffle(takes)
    with ThreadPoolExecutor(4) as pool:
        for took in takes:
            pool.submit(QuietTimes(path).heard, measured(*[3.0] * 20, reference=(took,) * 20))
    fingerprint = measured(1.0).fingerprint
    assert QuietTimes(path).best(fingerprint, machine="") == pytest.approx(1e-3)


def test_a_best_that_was_not_seen_again_for_a_month_holds_no_more(
    tmp_path: Path, taken: Callable[[float], Measurement]
) -> None:
    now = [0.0]
    quiet = QuietTimes(tmp_path / "devices.db", now=lambda: now[0])
    quiet.heard(taken(1.0))
    now[0] = 0.9 * KEPT_SECONDS
    assert quiet.heard(taken(1.04)).conditions.slowed == pytest.approx(1.04)  # which sees it again
    now[0] = 1.8 * KEPT_SECONDS
    assert not quiet.judged(taken(1.0)).unstable  # an old one, which sees nothing again
    assert quiet.heard(taken(1.5)).unstable
    now[0] = 2.0 * KEPT_SECONDS
    assert not quiet.heard(taken(1.5)).unstable


@pytest.mark.parametrize("content", [None, b"no database at all, but long enough to be looked at"])
def test_where_nothing_can_be_kept_a_process_knows_its_own_best(
    content: bytes | None, tmp_path: Path, taken: Callable[[float], Measurement]
) -> None:
    path = tmp_path / "file" / "devices.db"
    if content is None:
        path.parent.write_bytes(b"no folder")
    else:
        path.parent.mkdir()
        path.write_bytes(content)
    quiet = QuietTimes(path)
    quiet.heard(taken(1.0))
    assert quiet.heard(taken(1.5)).unstable
    assert content is None or path.read_bytes() == content


def test_a_file_that_can_be_read_alone_does_not_hide_what_a_process_saw_itself(
    tmp_path: Path, taken: Callable[[float], Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "devices.db"
    QuietTimes(path).heard(taken(1.5))
    quiet = QuietTimes(path)

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("attempt to write a readonly database")

    monkeypatch.setattr(MeasurementStore, "revise", refuse)
    assert quiet.heard(taken(1.0)).conditions.slowed == 1.0
    assert quiet.heard(taken(1.5)).unstable


def test_it_is_kept_in_the_users_folder_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/states")
    assert state_file() == Path("/states/nestling/devices.db")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "/home/one")
    assert state_file() == Path("/home/one/.local/state/nestling/devices.db")
