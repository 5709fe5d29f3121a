"""MeasurementStore: measurements by file, device and settings, in one SQLite file that outlives a kill."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from nestling.profile.measurement import Fingerprint, Measurement

VERSION = 1
BUSY_SECONDS = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS measurement (
    file TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    settings TEXT NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (file, fingerprint, settings)
) WITHOUT ROWID
"""

_HELD = "SELECT content FROM measurement WHERE file = ? AND fingerprint = ? AND settings = ?"

_RESTLESS = """
CREATE TABLE IF NOT EXISTS unstable (
    id INTEGER PRIMARY KEY,
    file TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    settings TEXT NOT NULL,
    content TEXT NOT NULL
)
"""

_RESTLESS_INDEX = "CREATE INDEX IF NOT EXISTS unstable_by_file ON unstable (file)"

_FACTS = """
CREATE TABLE IF NOT EXISTS fact (
    name TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (name, fingerprint)
) WITHOUT ROWID
"""


class StoreError(RuntimeError):
    """A measurement store that cannot be used; the message names its file."""


@contextlib.contextmanager
def opened(path: Path, *, what: str, synchronous: str) -> Iterator[sqlite3.Connection]:
    """A connection to the SQLite file `path`, closed afterwards; transactions are begun by hand.

    Args:
        path: the file, made when it is missing.
        what: it is, for messages.
        synchronous: when SQLite syncs to disk: `FULL`, with every commit; `NORMAL`, so that a power cut may
            lose the last ones, but nothing is damaged.

    Raises:
        StoreError: whatever SQLite objects to.
    """
    try:
        with contextlib.closing(
            sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            yield connection
    except sqlite3.Error as error:
        raise StoreError(f"{what} {path}: {error}") from error


def refuse_foreign(connection: sqlite3.Connection, path: Path, *, what: str, ours: str) -> None:
    """Refuses an SQLite file without a version of ours that holds another program's tables.

    Args:
        connection: to the file.
        path: the file.
        what: it should be.
        ours: a table of ours: with it the file is a `what` that another process has just begun.

    Raises:
        StoreError: a table of it is named.
    """
    found = [name for (name,) in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
    if found and ours not in found:
        raise StoreError(
            f"{path} is no {what}: it is another program's SQLite database, with {found[0]!r} in it; name "
            "another file"
        )


def _has(connection: sqlite3.Connection, table: str) -> bool:
    """Whether the file has `table`: who only reads makes none, as that may not be allowed."""
    asked = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(asked, (table,)).fetchone() is not None


class MeasurementStore:
    """Measurements in the SQLite file `path`, which is made when it is missing.

    Several processes may use one file. A measurement is there for good once `put` has returned: it was synced
    to disk. SQLite's own rollback journal undoes what a kill left half done. Every call opens the file anew,
    so a store may be used from any thread and after a fork. Unstable measurements are kept too, each of them,
    raw times and all; none of them is ever found by `get`.

    Raises:
        StoreError: the folder is missing, the file is no measurement store, or a later version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as connection:
            [(version,)] = connection.execute("PRAGMA user_version").fetchall()
            if version not in (0, VERSION):
                raise StoreError(
                    f"{path} is a measurement store of version {version}; this program reads {VERSION}"
                )
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                refuse_foreign(connection, path, what="measurement store", ours="measurement")
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("COMMIT")

    def __len__(self) -> int:
        with self._open() as connection:
            [(count,)] = connection.execute("SELECT count(*) FROM measurement").fetchall()
        return int(count)

    def get(self, file: str, *, fingerprint: Fingerprint, settings: str) -> Measurement | None:
        """What the file with the key `file` took on the device, None where that is not known."""
        with self._open() as connection:
            row = connection.execute(_HELD, (file, fingerprint.key, settings)).fetchone()
        return None if row is None else self._parse(row[0])

    def put(
        self, measurement: Measurement, *, file: str, settings: str, instead: Measurement | None = None
    ) -> Measurement:
        """The measurement that holds from now on: the first that was put, so that all readers see one.

        One that is unstable is kept beside those that hold, once, and is given back as it is.

        Args:
            measurement: taken now.
            file: the key of the file.
            settings: how it was measured.
            instead: one that held and is doubted, as it is judged now. If it is the one that still holds, a
                stable `measurement` takes its place, and it is kept beside those that hold.

        Raises:
            ValueError: `instead` is stable.
        """
        if instead is not None and not instead.unstable:
            raise ValueError(f"the measurement of {file} is stable; there is nothing to doubt")
        key = (file, measurement.fingerprint.key, settings)
        with self._open() as connection:
            if measurement.unstable:
                self._keep_unstable(connection, measurement, key)
                return measurement
            connection.execute("BEGIN IMMEDIATE")
            if instead is not None:
                self._make_room(connection, instead, key)
            connection.execute(
                "INSERT OR IGNORE INTO measurement VALUES (?, ?, ?, ?)", (*key, measurement.to_json())
            )
            row = connection.execute(_HELD, key).fetchone()
            connection.execute("COMMIT")
        return self._parse(row[0])

    def unstable(self, file: str | None = None) -> list[Measurement]:
        """Every unstable measurement, those of one file where `file` is given, in order."""
        with self._open() as connection:
            if not _has(connection, "unstable"):
                return []
            asked, given = ("", ()) if file is None else ("WHERE file = ?", (file,))
            rows = connection.execute(f"SELECT content FROM unstable {asked} ORDER BY id", given).fetchall()
        return [self._parse(content) for (content,) in rows]

    def all(self) -> list[Measurement]:
        """Every stable measurement, by file, device and settings."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT content FROM measurement ORDER BY file, fingerprint, settings"
            ).fetchall()
        return [self._parse(content) for (content,) in rows]

    def recall(self, name: str, *, fingerprint: Fingerprint) -> str | None:
        """What was remembered of the device under `name`, or None."""
        with self._open() as connection:
            if not _has(connection, "fact"):
                return None
            row = connection.execute(
                "SELECT content FROM fact WHERE name = ? AND fingerprint = ?", (name, fingerprint.key)
            ).fetchone()
        return None if row is None else str(row[0])

    def remember(self, name: str, content: str, *, fingerprint: Fingerprint) -> None:
        """Keeps `content`, something found out about the device, under `name`, in place of what was there."""
        with self._open() as connection:
            connection.execute(_FACTS)  # a file of an earlier version has no such table
            connection.execute("REPLACE INTO fact VALUES (?, ?, ?)", (name, fingerprint.key, content))

    def revise(self, name: str, change: Callable[[str | None], str], *, fingerprint: Fingerprint) -> None:
        """Keeps what `change` makes of what is remembered; no other process comes between."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_FACTS)
            asked = "SELECT content FROM fact WHERE name = ? AND fingerprint = ?"
            row = connection.execute(asked, (name, fingerprint.key)).fetchone()
            content = change(None if row is None else str(row[0]))
            connection.execute("REPLACE INTO fact VALUES (?, ?, ?)", (name, fingerprint.key, content))
            connection.execute("COMMIT")

    def _make_room(
        self, connection: sqlite3.Connection, doubted: Measurement, key: tuple[str, str, str]
    ) -> None:
        """Moves `doubted` to the unstable ones, unless another has taken its place since it was read."""
        row = connection.execute(_HELD, key).fetchone()
        if row is None:
            return
        held = self._parse(row[0])
        # by its times: what it is judged by is no part of it
        if (held.seconds, held.reference_seconds) != (doubted.seconds, doubted.reference_seconds):
            return
        self._keep_unstable(connection, doubted, key)
        connection.execute("DELETE FROM measurement WHERE file = ? AND fingerprint = ? AND settings = ?", key)

    @staticmethod
    def _keep_unstable(
        connection: sqlite3.Connection, measurement: Measurement, key: tuple[str, str, str]
    ) -> None:
        connection.execute(_RESTLESS)  # a file of an earlier version has no such table, or no index
        connection.execute(_RESTLESS_INDEX)
        content = measurement.to_json()
        connection.execute(
            "INSERT INTO unstable (file, fingerprint, settings, content) SELECT ?, ?, ?, ? "
            "WHERE NOT EXISTS (SELECT 1 FROM unstable WHERE file = ? AND content = ?)",
            (*key, content, key[0], content),
        )

    def _open(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, what="measurement store", synchronous="FULL")

    def _parse(self, content: str) -> Measurement:
        try:
            return Measurement.from_json(content)
        except ValueError as error:
            raise StoreError(f"measurement store {self.path}: {error}") from None
