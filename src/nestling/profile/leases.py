"""LeaseQueue: who may measure what where; an SQLite file that processes share and that outlives a kill.

A board measures one file at a time, and a file is measured on one board at a time. Whoever wants to takes a
lease on both. A lease that is not renewed runs out, and one whose process is gone is void at once: another
takes its place, and what the first one may still bring is too late and not counted. So each measurement that
was asked for is counted once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.owners import is_gone, this_owner, told
from nestling.profile.store import StoreError, opened, refuse_foreign

VERSION = 1
LEASE_SECONDS = 30.0
"""A lease that was not renewed for so long has run out."""

_TABLES = """
CREATE TABLE IF NOT EXISTS lease (
    thing TEXT PRIMARY KEY, holder TEXT NOT NULL, owner TEXT NOT NULL, expires REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS job (
    file TEXT NOT NULL, device TEXT NOT NULL, settings TEXT NOT NULL,
    strikes INTEGER NOT NULL DEFAULT 0, content TEXT, cause TEXT,
    PRIMARY KEY (file, device, settings)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempt (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL, board TEXT NOT NULL, holder TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL, began REAL NOT NULL, ended REAL, outcome TEXT, cause TEXT
);
"""


_TIMEOUTS = """
CREATE TABLE IF NOT EXISTS timeout (
    file TEXT NOT NULL, device TEXT NOT NULL, settings TEXT NOT NULL, limit_seconds REAL NOT NULL
)
"""
_OF_JOB = "file = ? AND device = ? AND settings = ?"


@dataclass(frozen=True, slots=True)
class Job:
    """A measurement that is wanted."""

    file: str
    """The file's key."""
    device: str
    """The key of the class of devices."""
    settings: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is stored under."""
        return self.file, self.device, self.settings

    @property
    def thing(self) -> str:
        """What a lease on it names."""
        return f"job {self.file} {self.device} {self.settings}"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use `board`, for `job` where there is one, until it runs out or is given back."""

    holder: str
    board: str
    job: Job | None


@dataclass(frozen=True, slots=True)
class JobState:
    """What is known of a job: the last content that was counted, the boards' workers that were lost on it."""

    content: str | None = None
    strikes: int = 0
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a measurement. Its outcome is None while it is under way.

    `measured` was counted; `late` was not, because its lease had run out; `refused` by the runtime; `lost`
    the worker; `cut` the line; `board`: the board itself failed first; `abandoned` by a process that was
    killed or stood still.
    """

    file: str
    board: str
    began: float
    ended: float | None
    outcome: str | None
    cause: str | None


class LeaseQueue:
    """Leases in the SQLite file `path`, which is made when it is missing. Any thread may use it.

    Args:
        path: on a local disk; processes that share boards share it.
        seconds: after so long without renewal a lease has run out.
        clock: seconds since the epoch, as all processes that use the file see it.

    Raises:
        StoreError: the folder is missing, the file is something else, or a later version wrote it.
    """

    def __init__(
        self, path: Path, *, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.seconds, self.clock = path, seconds, clock
        self.owner = this_owner()
        with self._open() as connection:
            [(version,)] = connection.execute("PRAGMA user_version").fetchall()
            if version not in (0, VERSION):
                raise StoreError(
                    f"{path} is a lease queue of version {version}; this program reads {VERSION}"
                )
            if version == 0:
                refuse_foreign(connection, path, what="lease queue", ours="lease")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
                )
            connection.execute(_TIMEOUTS)  # files of earlier programs have no such table

    def take(self, job: Job | None, boards: Sequence[str], *, before: str | None = None) -> Lease | None:
        """A lease on `job`, if one is given, and on the first free one of `boards`; None where there is none.

        Leases that ran out, or whose process is gone, are void. Nor is there one where the job's content is
        no more what it was `before`: another has done it.
        """
        now, holder = self.clock(), uuid.uuid4().hex
        with self._writing() as connection:
            self._void(connection, now)
            held = {thing for (thing,) in connection.execute("SELECT thing FROM lease")}
            free = next((board for board in boards if _board_thing(board) not in held), None)
            if free is None or (job is not None and job.thing in held):
                return None
            if job is not None and self._content(connection, job) != before:
                return None
            things = [_board_thing(free)] + ([job.thing] if job is not None else [])
            connection.executemany(
                "INSERT INTO lease VALUES (?, ?, ?, ?)",
                [(thing, holder, self.owner, now + self.seconds) for thing in things],
            )
            if job is not None:
                connection.execute(
                    "INSERT OR IGNORE INTO job (file, device, settings) VALUES (?, ?, ?)",
                    job.key,
                )
                connection.execute(
                    "INSERT INTO attempt (file, board, holder, owner, began) VALUES (?, ?, ?, ?, ?)",
                    (job.file, free, holder, self.owner, now),
                )
        return Lease(holder, free, job)

    def renew(self, leases: Sequence[Lease]) -> None:
        """Lets `leases` run on from now; one that has been given to another stays lost."""
        until = self.clock() + self.seconds
        with self._writing() as connection:
            connection.executemany(
                "UPDATE lease SET expires = ? WHERE holder = ?", [(until, lease.holder) for lease in leases]
            )

    def finish(self, lease: Lease, content: str) -> bool:
        """Whether `content` counts as the job's: unless the lease was lost; gives the lease back."""
        with self._writing() as connection:
            counts = self._give_back(connection, lease)
            self._end(connection, lease, "measured" if counts else "late", None)
            if counts and lease.job is not None:
                connection.execute(
                    f"UPDATE job SET content = ?, strikes = 0, cause = NULL WHERE {_OF_JOB}",
                    (content, *lease.job.key),
                )
                connection.execute(f"DELETE FROM timeout WHERE {_OF_JOB}", lease.job.key)
        return counts

    def fail(
        self,
        lease: Lease,
        outcome: str,
        cause: str,
        *,
        strike: bool = False,
        limit_seconds: float | None = None,
    ) -> int:
        """How often the job has cost a worker, now that `outcome` befell it; gives the lease back.

        What befell who had lost the lease is late, and speaks against nothing.

        Args:
            lease: the try.
            outcome: `refused`, `lost`, `cut` or `board`, see `Attempt`.
            cause: for a person.
            strike: whether this speaks against the file.
            limit_seconds: the limit that the worker did not keep, where it was lost to that.
        """
        with self._writing() as connection:
            held = self._give_back(connection, lease)
            self._end(connection, lease, outcome if held else "late", cause)
            if lease.job is None:
                return 0
            key = lease.job.key
            if held and strike:
                counted = 1 if limit_seconds is None else 0
                connection.execute(
                    f"UPDATE job SET strikes = strikes + ?, cause = ? WHERE {_OF_JOB}", (counted, cause, *key)
                )
                if limit_seconds is not None:
                    connection.execute("INSERT INTO timeout VALUES (?, ?, ?, ?)", (*key, limit_seconds))
            return self._state(connection, lease.job, limit_seconds=0.0).strikes

    def release(self, lease: Lease) -> None:
        """Gives back a lease of which nothing came, where it was not given back before."""
        with self._writing() as connection:
            if self._give_back(connection, lease):
                self._end(connection, lease, "abandoned", None)

    def state(self, job: Job, *, limit_seconds: float = 0.0) -> JobState:
        """What is known of `job`; nothing where it was never taken.

        Workers that were lost because they were too slow for a shorter limit than `limit_seconds` are not
        counted: with more time they may not be.
        """
        with self._open() as connection:
            return self._state(connection, job, limit_seconds=limit_seconds)

    def attempts(self) -> list[Attempt]:
        """Every try, in the order in which they began."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT file, board, began, ended, outcome, cause FROM attempt ORDER BY id"
            ).fetchall()
        return [Attempt(*row) for row in rows]

    def _state(self, connection: sqlite3.Connection, job: Job, *, limit_seconds: float) -> JobState:
        row = connection.execute(
            f"SELECT content, strikes, cause FROM job WHERE {_OF_JOB}", job.key
        ).fetchone()
        if row is None:
            return JobState()
        content, strikes, cause = row
        [(late,)] = connection.execute(
            f"SELECT COUNT(*) FROM timeout WHERE {_OF_JOB} AND limit_seconds >= ?", (*job.key, limit_seconds)
        )
        return JobState(content, strikes + late, cause)

    def _content(self, connection: sqlite3.Connection, job: Job) -> str | None:
        row = connection.execute(f"SELECT content FROM job WHERE {_OF_JOB}", job.key).fetchone()
        return None if row is None else row[0]

    def _void(self, connection: sqlite3.Connection, now: float) -> None:
        """Strikes out leases that ran out or whose process is gone, and ends their attempts."""
        rows = connection.execute("SELECT DISTINCT holder, owner, expires FROM lease").fetchall()
        for holder, owner, expires in rows:
            gone = owner != self.owner and is_gone(owner)
            if expires > now and not gone:
                continue
            cause = f"{told(owner)} is gone" if gone else f"not renewed for {self.seconds:.0f} s"
            connection.execute("DELETE FROM lease WHERE holder = ?", (holder,))
            connection.execute(
                "UPDATE attempt SET outcome = 'abandoned', ended = ?, cause = ? "
                "WHERE holder = ? AND outcome IS NULL",
                (now, cause, holder),
            )

    def _give_back(self, connection: sqlite3.Connection, lease: Lease) -> bool:
        """Whether the lease was still there to be given back."""
        given = connection.execute("DELETE FROM lease WHERE holder = ?", (lease.holder,))
        return given.rowcount > 0

    def _end(self, connection: sqlite3.Connection, lease: Lease, outcome: str, cause: str | None) -> None:
        connection.execute(
            "UPDATE attempt SET outcome = ?, ended = ?, cause = ? WHERE holder = ?",
            (outcome, self.clock(), cause, lease.holder),
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def _open(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, what="lease queue", synchronous="NORMAL")


def _board_thing(board: str) -> str:
    return f"board {board}"
