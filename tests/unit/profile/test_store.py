from __future__ import annotations

import dataclasses
import hashlib
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nestling.profile import Measurement, MeasurementStore, StoreError, file_key

Measured = Callable[..., Measurement]


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
from nestling.profile import Measurement, MeasurementStore
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


def test_the_key_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    assert file_key(path) == hashlib.sha256(b"content").hexdigest()
