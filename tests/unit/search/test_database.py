"""Where a study can be, and what is said where it cannot."""

from __future__ import annotations

import errno
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from nestling.search import StudyMismatch, StudyUnavailable
from nestling.search import database as module
from nestling.search.database import Database, study_url


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("postgresql://me@board/nas", "postgresql+psycopg://me@board/nas"),
        ("postgres://me@board:5433/nas", "postgresql+psycopg://me@board:5433/nas"),
        ("postgresql+psycopg2://me@board/nas", "postgresql+psycopg2://me@board/nas"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
        ("/data/study.db", "sqlite:////data/study.db"),
        (Path("/data/study.db"), "sqlite:////data/study.db"),
    ],
)
def test_a_study_is_in_a_file_or_in_postgresql(given: str | Path, url: str) -> None:
    assert study_url(given).render_as_string(hide_password=False) == url


@pytest.mark.parametrize(
    "given", ["mysql://me:secret@board/nas", "postgresql://me:secret@board", "sqlite://", "http://secret"]
)
def test_other_places_are_refused_without_telling_the_password(given: str) -> None:
    with pytest.raises(
        ValueError, match="give the path of an SQLite file, or postgresql://user@host/"
    ) as told:
        study_url(given)
    assert "me:secret" not in str(told.value)


def test_a_driver_that_is_missing_is_named_with_what_installs_it() -> None:
    # the driver's name stands for one that is not installed
    url = "postgresql+pg8000://me:secret@board/nas"
    with pytest.raises(StudyUnavailable, match=r"needs the package pg8000.*nestling\[postgres\]") as told:
        Database(url)
    assert "secret" not in str(told.value)


def test_a_database_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    file.write_bytes(b"SQLite format 3\0" + bytes(200))
    database = Database(file)
    with (
        pytest.raises(StudyUnavailable, match=rf"{file} cannot be used: file is not a database"),
        database.writing(),
    ):
        pass


def test_writers_wait_for_each_other(empty_study_file: Path) -> None:
    database = Database(empty_study_file)
    order: list[str] = []
    entered, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with database.writing():
            entered.set()
            may_end.wait(5)
            order.append("first")

    def second() -> None:
        entered.wait(5)
        with database.writing():
            order.append("second")

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    entered.wait(5)
    with database.reading() as connection:  # readers do not wait
        assert connection.execute(sa.text("select count(*) from studies")).scalar() == 0
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]


def test_what_an_exception_ends_is_undone(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    with closing(sqlite3.connect(file)) as made:
        made.execute("create table a (b)")
    database = Database(file)

    def fail() -> None:
        with database.writing() as connection:
            connection.execute(sa.text("insert into a values (1)"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with database.reading() as connection:
        assert connection.execute(sa.text("select count(*) from a")).scalar() == 0


def test_a_new_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "study.db"

    def interrupted(_: Database) -> None:
        assert not file.exists()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Database(file, prepare=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_made_meanwhile_is_kept(tmp_path: Path, empty_study_file: Path) -> None:
    file = tmp_path / "study.db"

    def late(_: Database) -> None:
        file.write_bytes(empty_study_file.read_bytes())
        with closing(sqlite3.connect(file)) as other, other:
            other.execute("insert into studies (study_name) values ('theirs')")

    database = Database(file, prepare=late)
    with database.reading() as connection:
        assert connection.execute(sa.text("select study_name from studies")).scalar() == "theirs"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_is_made_where_the_file_system_knows_neither_links_nor_rights(
    tmp_path: Path, empty_study_file: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    file = tmp_path / "study.db"
    Database(file, prepare=lambda _: None).close()
    with closing(sqlite3.connect(file)) as made:
        assert made.execute("SELECT count(*) FROM trials").fetchall() == [(0,)]
    assert list(tmp_path.iterdir()) == [file]
    other = tmp_path / "other.db"

    def overtaken(_: Database) -> None:
        other.write_bytes(empty_study_file.read_bytes() + b"theirs")

    Database(other, prepare=overtaken).close()
    assert other.read_bytes().endswith(b"theirs")


def test_of_two_that_make_a_file_without_links_and_locks_the_second_keeps_the_firsts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    file, real, renamed = tmp_path / "study.db", Path.rename, list[Path]()
    ready = threading.Event()
    second = threading.Thread(target=lambda: Database(file, prepare=lambda _: ready.set()).close())

    def overtaken(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == 1:  # between the look at the name and the rename
            second.start()
            ready.wait(5)
            second.join(0.05)
        return real(self, target)

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(Path, "rename", overtaken)
    Database(file, prepare=lambda _: None).close()
    second.join()
    assert len(renamed) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_process_left_that_was_killed_at_the_rename_keeps_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(module, "MARKER_SECONDS", 0.02)
    file = tmp_path / "study.db"
    for number in range(2):
        (tmp_path / f".study.db.taken{number}").touch()
    Database(file, prepare=lambda _: None).close()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_take_its_name_is_told_with_what_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StudyUnavailable, match=r"study.db cannot be made: Operation not permitted.*--study"):
        Database(tmp_path / "study.db", prepare=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_tables_of_another_version_of_optuna_are_told(empty_study_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.db"
    file.write_bytes(empty_study_file.read_bytes())
    with closing(sqlite3.connect(file)) as made, made:
        made.execute("update version_info set schema_version = 11, library_version = '2.0.0'")
        made.execute("update alembic_version set version_num = 'v2.6.0.a'")
    with pytest.raises(StudyMismatch, match=r"old.db cannot be used: The runtime optuna version"):
        Database(file, prepare=lambda _: None)
