from __future__ import annotations

import contextlib
import dataclasses
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nestling.profile import Conditions, Fingerprint, Measurement, MeasurementStore, StoreError
from nestling.profile.leases import Job, LeaseQueue

Measured = Callable[..., Measurement]


@pytest.fixture
def measured(fingerprint: Fingerprint) -> Measured:
    """Makes a stable measurement, another one for other numbers."""

    def make(*numbers: float) -> Measurement:
        count = max(40, len(numbers))
        return Measurement(fingerprint, (sum(numbers) / 1e3,) * count, (1e-3,) * count, 0.5, 0.25)

    return make


def test_an_unstable_measurement_is_kept_whole_and_never_found(tmp_path: Path, measured: Measured) -> None:
    store, stable = MeasurementStore(tmp_path / "m.sqlite"), measured(1)
    restless = [dataclasses.replace(stable, seconds=(1e-3, spread) * 20) for spread in (2e-3, 3e-3)]
    for taken in (*restless, restless[0]):
        assert taken.unstable
        assert store.put(taken, file="a", settings="s") == taken
    assert store.get("a", fingerprint=stable.fingerprint, settings="s") is None
    assert store.unstable() == store.unstable("a") == restless
    assert store.unstable("b") == store.all() == []
    assert store.put(stable, file="a", settings="s") == stable
    assert store.put(restless[0], file="a", settings="s") == restless[0]
    assert store.get("a", fingerprint=stable.fingerprint, settings="s") == stable
    assert len(store.unstable()) == 2


def test_a_doubted_measurement_holds_until_a_stable_one_takes_its_place(
    tmp_path: Path, measured: Measured
) -> None:
    store, old = MeasurementStore(tmp_path / "m.sqlite"), measured(1)
    doubted = dataclasses.replace(old, conditions=Conditions(slowed=1.5))
    restless = dataclasses.replace(old, seconds=(1e-3, 9e-3) * 20)

    def put(measurement: Measurement, *, instead: Measurement | None = None) -> Measurement:
        return store.put(measurement, file="a", settings="s", instead=instead)

    def held() -> Measurement | None:
        return store.get("a", fingerprint=old.fingerprint, settings="s")

    put(old)
    with pytest.raises(ValueError, match="measurement of a is stable; there is nothing to doubt"):
        put(measured(2), instead=old)
    assert put(restless, instead=doubted) == restless
    assert held() == old
    assert put(measured(2), instead=doubted) == measured(2)
    assert held() == measured(2)
    assert store.unstable("a") == [restless, doubted]
    # another process that doubted the same measurement comes second
    assert put(measured(3), instead=doubted) == measured(2)
    assert store.all() == [measured(2)]


def test_asking_writes_nothing_so_that_a_run_that_may_only_be_read_can_be_asked(
    tmp_path: Path, measured: Measured
) -> None:
    path = tmp_path / "m.sqlite"
    stable = MeasurementStore(path).put(measured(1), file="a", settings="s")
    before = path.read_bytes()
    asked = MeasurementStore(path)
    assert asked.unstable() == asked.unstable("a") == []
    assert asked.recall("noise", fingerprint=stable.fingerprint) is None
    assert path.read_bytes() == before


def test_one_file_s_unstable_measurements_are_found_by_an_index(tmp_path: Path, measured: Measured) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    with contextlib.closing(sqlite3.connect(store.path)) as connection:  # as an earlier version made it
        connection.execute(
            "CREATE TABLE unstable (id INTEGER PRIMARY KEY, file TEXT NOT NULL, fingerprint TEXT NOT NULL, "
            "settings TEXT NOT NULL, content TEXT NOT NULL)"
        )
    store.put(dataclasses.replace(measured(1), seconds=(1e-3, 2e-3) * 20), file="a", settings="s")
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT 1 FROM unstable WHERE file = 'a' AND content = 'c'"
        ).fetchall()
    assert "USING INDEX" in str(plan)


@pytest.mark.parametrize("opens", [MeasurementStore, LeaseQueue])
def test_another_program_s_database_is_refused_and_left_as_it_was(
    tmp_path: Path, opens: Callable[[Path], object]
) -> None:
    path = tmp_path / "addresses.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE friends (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"addresses\.db is no .*another program's .*'friends'"):
        opens(path)
    assert path.read_bytes() == before


def test_what_was_put_is_found_again(tmp_path: Path, measured: Measured) -> None:
    taken = measured(1, 2, 3)
    assert MeasurementStore(tmp_path / "m.sqlite").put(taken, file="a", settings="s") == taken
    again = MeasurementStore(tmp_path / "m.sqlite")
    assert again.get("a", fingerprint=taken.fingerprint, settings="s") == taken
    assert len(again) == 1


def test_another_file_device_or_setting_is_not_found(tmp_path: Path, measured: Measured) -> None:
    store, taken = MeasurementStore(tmp_path / "m.sqlite"), measured(1)
    store.put(taken, file="a", settings="s")
    other = dataclasses.replace(taken.fingerprint, runtime="onnxruntime 2.0")
    assert store.get("b", fingerprint=taken.fingerprint, settings="s") is None
    assert store.get("a", fingerprint=taken.fingerprint, settings="t") is None
    assert store.get("a", fingerprint=other, settings="s") is None


def test_the_first_measurement_stays(tmp_path: Path, measured: Measured) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    store.put(measured(1), file="a", settings="s")
    assert store.put(measured(2), file="a", settings="s") == measured(1)


def test_several_writers_lose_nothing(tmp_path: Path, measured: Measured) -> None:
    path, taken = tmp_path / "m.sqlite", measured(1, 2)

    def write(writer: int) -> None:
        store = MeasurementStore(path)
        for number in range(5):
            store.put(taken, file=f"{writer}-{number}", settings="s")

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert len(MeasurementStore(path)) == 20


WRITER = """
import sys
from pathlib import Path
from nestling.profile import Conditions, Fingerprint, Measurement, MeasurementStore
store = MeasurementStore(Path(sys.argv[1]))
taken = Measurement.from_json(sys.argv[2])
number = 0
while True:
    store.put(taken, file=str(number), settings="s")
    print(number, flush=True)
    number += 1
"""


def test_a_kill_while_writing_loses_nothing_that_was_acknowledged(tmp_path: Path, measured: Measured) -> None:
    path, taken = tmp_path / "m.sqlite", measured(*range(1, 400))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), taken.to_json()], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.readlines()
    numbers = [int(line) for line in acknowledged if line.endswith("\n")]
    store = MeasurementStore(path)
    assert numbers == list(range(len(numbers)))
    assert all(store.get(str(n), fingerprint=taken.fingerprint, settings="s") == taken for n in numbers)
    assert len(store) - len(numbers) in (0, 1)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match=r"m\.sqlite.*not a database"):
        MeasurementStore(path)
    with pytest.raises(StoreError, match="unable to open"):
        MeasurementStore(tmp_path / "missing" / "m.sqlite")


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StoreError, match="version 2; this program reads 1"):
        MeasurementStore(path)


def test_damaged_content_is_an_error_that_names_the_store(tmp_path: Path, measured: Measured) -> None:
    store, taken = MeasurementStore(tmp_path / "m.sqlite"), measured(1)
    store.put(taken, file="a", settings="s")
    connection = sqlite3.connect(store.path)
    connection.execute("UPDATE measurement SET content = '{}'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match=r"m\.sqlite: not a measurement"):
        store.get("a", fingerprint=taken.fingerprint, settings="s")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def until_it_fails(write: Callable[[int], object]) -> tuple[int, StoreError]:
    """How often `write` did what it should before it failed, and how."""
    for number in range(1000):
        try:
            write(number)
        except StoreError as error:
            return number, error
    raise AssertionError("the disk is not full")


def test_a_full_disk_is_an_error_and_loses_nothing_that_was_acknowledged(
    small_disk: Path, measured: Measured
) -> None:
    store, taken = MeasurementStore(small_disk / "m.sqlite"), measured(*range(1, 200))
    acknowledged, error = until_it_fails(lambda number: store.put(taken, file=str(number), settings="s"))
    assert acknowledged > 0
    assert "m.sqlite: database or disk is full" in str(error)
    again = MeasurementStore(store.path)
    kept = [again.get(str(n), fingerprint=taken.fingerprint, settings="s") for n in range(acknowledged)]
    assert kept == [taken] * acknowledged
    assert len(again) == acknowledged
    grow(small_disk, "256k")
    store.put(taken, file="more", settings="s")
    assert len(store) == acknowledged + 1
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_full_disk_stops_a_lease_queue_which_goes_on_where_there_is_room_again(small_disk: Path) -> None:
    grow(small_disk, "160k")
    queue, content = LeaseQueue(small_disk / "leases.db"), "content" * 100

    def measure(number: int) -> None:
        lease = queue.take(Job(str(number), "class", "settings"), [str(number)])
        assert lease is not None
        queue.finish(lease, content)

    counted, error = until_it_fails(measure)
    assert counted > 0
    assert "leases.db: database or disk is full" in str(error)
    grow(small_disk, "512k")
    again = LeaseQueue(queue.path)
    assert {again.state(Job(str(n), "class", "settings")).content for n in range(counted)} == {content}
    measure(1000)
