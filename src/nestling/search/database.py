"""Database: where a study is kept, in an SQLite file or in PostgreSQL; and one writer at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import exc

from nestling.search.samplers import quiet

LOCK_SECONDS = 60
CONNECT_SECONDS = 10
MARKER_SECONDS = 10.0
"""How long a process may take to rename a file before it counts as killed."""
SQLITE_HEADER = b"SQLite format 3\0"
POSTGRES = "postgresql+psycopg"
EXTRA = "pip install 'nestling[postgres]'"


class StudyMismatch(ValueError):  # noqa: N818 - it names what is wrong
    """A file that does not hold a study of this problem; the message says what differs and what would do."""


class StudyUnavailable(RuntimeError):  # noqa: N818 - it names what is wrong
    """A database that cannot be reached or written; the message names it, without its password."""


class Database:
    """The database at `where`, opened: the path of an SQLite file, or `postgresql://user@host/name`.

    Writing transactions exclude one another, over all processes and machines: in SQLite by the file's lock,
    in PostgreSQL by an advisory one. Each is there for good once it is committed, also after a kill; SQLite
    keeps to its rollback journal, so that the file alone is the study.

    Args:
        where: an SQLite file is made where there is none, whole or not at all.
        prepare: called on a new SQLite file before it takes its name, and on any other once it is open.
        clock: seconds since 1970 that all machines agree on; by default PostgreSQL's own, and of an SQLite
            file, which is on one machine, that machine's.

    Raises:
        StudyMismatch: the file is no SQLite file.
        StudyUnavailable: no driver, no such server, no such database, no right to write.
        FileNotFoundError: no folder to make the file in.
        ValueError: a URL of another kind.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        prepare: Callable[[Database], None] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.url = study_url(where)
        self._clock = clock
        path, made = sqlite_path(self.url), False
        if path is not None:
            _check_file(path)
            made = prepare is not None and not path.exists()
            if prepare is not None and made:
                _begin(path, prepare)
        self.engine = _engine(self.url)
        if prepare is not None and not made:
            try:
                with self._together():
                    self.lay_out()
                    prepare(self)
            except BaseException:
                self.close()
                raise

    def __str__(self) -> str:
        path = sqlite_path(self.url)
        return str(path) if path is not None else self.url.render_as_string(hide_password=True)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that no other writing one overlaps; committed at the end, undone by an exception.

        Raises:
            StudyUnavailable: the database cannot be written.
        """
        with self._told(), self.engine.connect() as connection:
            connection = connection.execution_options(writing=True)
            with connection.begin():
                if self.url.get_backend_name() == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(self._lock)))
                yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the database, and waits for nobody.

        Raises:
            StudyUnavailable: the database cannot be read.
        """
        with self._told(), self.engine.connect() as connection:
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970, of the clock that all who share the database agree on."""
        if self._clock is not None:
            return self._clock()
        if self.url.get_backend_name() == "postgresql":
            return float(
                connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one()
            )
        return time.time()

    def lay_out(self) -> None:
        """Makes the tables in which Optuna keeps studies, where they are not there.

        Raises:
            StudyMismatch: the tables are those of another version of Optuna.
            StudyUnavailable: the database cannot be written.
        """
        with self._told(), quiet():
            try:
                # no pool: where its constructor fails, nobody could close the connections
                options = {"connect_args": _arguments(self.url), "poolclass": sa.NullPool}
                storage = RDBStorage(self.optuna_url, engine_kwargs=options)
            except RuntimeError as error:
                # what Optuna says of tables of another version
                raise StudyMismatch(f"{self} cannot be used: {error}") from error
            storage.remove_session()

    @property
    def optuna_url(self) -> str:
        """The database's URL as Optuna takes it, password included."""
        # Optuna fills braces in
        shown = self.url.render_as_string(hide_password=False)
        return shown.replace("{", "%7B").replace("}", "%7D")

    def close(self) -> None:
        """Ends the connections."""
        self.engine.dispose()

    @property
    def _lock(self) -> int:
        return int.from_bytes(hashlib.sha256(b"nestling").digest()[:8], "big", signed=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Keeps others from laying out the same PostgreSQL database meanwhile."""
        if self.url.get_backend_name() != "postgresql":
            yield
            return
        with self._told(), self.engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_lock(self._lock + 1)))
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(self._lock + 1)))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (exc.DBAPIError, StorageInternalError) as error:
            cause = error.orig if isinstance(error, exc.DBAPIError) else error.__cause__
            said = next(iter(str(cause or error).strip().splitlines()), "no reason")
            raise StudyUnavailable(f"the study's database {self} cannot be used: {said}") from error


def study_url(where: Path | str) -> sa.URL:
    """The URL of the database at `where`: a path, `sqlite:///path` or `postgresql://user@host/name`.

    Raises:
        ValueError: it is a URL of another kind, or none.
    """
    if isinstance(where, Path) or "://" not in where:
        return sa.URL.create("sqlite", database=str(Path(where).resolve()))
    try:
        url = sa.make_url(where.replace("postgres://", "postgresql://", 1))
    except (exc.ArgumentError, ValueError) as error:
        raise ValueError(f"the study {where!r} is no URL: {error}") from None
    backend = url.drivername.partition("+")[0]
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return sa.URL.create("sqlite", database=str(Path(url.database).resolve()))
    if backend != "postgresql" or not url.database:
        shown = url.render_as_string(hide_password=True)
        raise ValueError(
            f"the study {shown!r} cannot be used: give the path of an SQLite file, or "
            "postgresql://user@host/database"
        )
    return url if "+" in url.drivername else url.set(drivername=POSTGRES)


def sqlite_path(url: sa.URL) -> Path | None:
    """The file that `url` names; None where it names a server's database."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _check_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for the study {path.name}")
    if path.exists():
        with path.open("rb") as file:
            beginning = file.read(len(SQLITE_HEADER))
        if beginning not in (b"", SQLITE_HEADER):
            raise StudyMismatch(f"{path} is not an SQLite file; name another one, or move it away")


def _begin(path: Path, prepare: Callable[[Database], None]) -> None:
    """Makes the file with its tables and what `prepare` adds, all at once.

    Optuna makes its tables one after the other, and cannot open a file in which a kill has left some of them.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        made = Database(temporary)
        made.lay_out()
        prepare(made)
        made.close()
        with suppress(OSError):  # file systems without rights refuse what they cannot keep
            temporary.chmod(0o644)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:  # another process was faster, and its file is as good
            pass
        except OSError:  # exFAT, SMB and some of FUSE know no links
            _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    """Gives the file `temporary` the name `path`, unless there is a file of that name.

    A rename would replace one, so who renames makes a marker first, which one process alone can. Where the
    marker of a killed one stays, the next marker has the next number; each is waited for and none is taken
    over, as two that wait could both take it.
    """
    number, since = 0, time.monotonic()
    try:
        while not path.exists():
            marker = _marker(path, number)
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            except FileExistsError:
                if time.monotonic() - since > MARKER_SECONDS:
                    number, since = number + 1, time.monotonic()
                else:
                    time.sleep(MARKER_SECONDS / 200)
                continue
            try:
                if not path.exists():
                    temporary.rename(path)
                    # the markers of killed processes, which nobody heeds any more
                    for dead in range(number):
                        _marker(path, dead).unlink(missing_ok=True)
            finally:
                marker.unlink(missing_ok=True)
    except OSError as error:
        raise StudyUnavailable(
            f"{path} cannot be made: {error.strerror}; give the path of a file on another file system, or a "
            "database's URL, by `--study`"
        ) from None


def _marker(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.taken{number}")


def _engine(url: sa.URL) -> sa.Engine:
    pool: dict[str, Any] = {"pool_pre_ping": True}
    if sqlite_path(url) is not None:
        # a connection for each transaction: any thread may ask, and a fork inherits none
        pool = {"poolclass": sa.NullPool}
    try:
        engine = sa.create_engine(url, connect_args=_arguments(url), **pool)
    except ModuleNotFoundError as error:
        shown = url.render_as_string(hide_password=True)
        raise StudyUnavailable(f"the study {shown} needs the package {error.name}: {EXTRA}") from None
    except exc.NoSuchModuleError as error:
        raise ValueError(f"the study {url.render_as_string(hide_password=True)}: {error}") from None
    if sqlite_path(url) is not None:
        sa.event.listen(engine, "connect", _leave_transactions_to_us)
        sa.event.listen(engine, "begin", _begin_transaction)
    return engine


def _arguments(url: sa.URL) -> dict[str, Any]:
    if sqlite_path(url) is not None:
        return {"timeout": LOCK_SECONDS}
    return {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}


def _leave_transactions_to_us(connection: Any, _: object) -> None:
    # Python's sqlite3 would begin one at the first change, when another writer may have been before it
    connection.isolation_level = None


def _begin_transaction(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
