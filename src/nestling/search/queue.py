"""Queue: the archs of a study that are to be evaluated, shared by all processes that evaluate some.

Each arch is in the queue once. A process leases one, renews its lease while it works, and hands in the
outcome; a lease that is not renewed ends, and another process takes the arch. The outcome that is handed in
first is the trial: a process that was only slow changes nothing.

One of the processes keeps watch: see `lost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import sqlalchemy as sa

from nestling.owners import is_gone, this_owner
from nestling.search import tables
from nestling.search.database import StudyUnavailable
from nestling.search.lost import count_suspects, losses_of, note_losses, note_watch
from nestling.search.record import Record
from nestling.search.result import Trial
from nestling.space import Arch

LEASE_SECONDS = 60.0
"""How long a process may be silent before what it evaluates is given to another one."""
PROPOSING, WATCHING = "proposing", "watching"


@dataclass(frozen=True, slots=True)
class Task:
    """An arch that is this process's to evaluate."""

    position: int
    arch: Arch


@dataclass(frozen=True, slots=True)
class Proposing:
    """This process's turn to propose: the position of the first new arch, and what others evaluate."""

    position: int
    pending: tuple[Arch, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """Nothing to do: whether all is `done`; else others are at work."""

    done: bool


class Queue:
    """The queue of `record`'s study.

    Args:
        record: of the study.
        owner: a name that no other process has.
        lease_seconds: how long this process may be silent.
        gone: whether the process with that name has ended for sure.
    """

    def __init__(
        self,
        record: Record,
        *,
        owner: str | None = None,
        lease_seconds: float = LEASE_SECONDS,
        gone: Callable[[str], bool] = is_gone,
    ) -> None:
        self.record, self.database, self.study = record, record.database, record.study
        self.owner = this_owner() if owner is None else owner
        self._lease_seconds = lease_seconds
        self._gone = gone
        self._mine = sa.and_(
            tables.candidates.c.study_id == self.study, tables.candidates.c.owner == self.owner
        )
        with self.database.writing() as connection:
            tables.lay_out_ours(connection)
            # trials of a study that was begun before there were queues
            tried = [trial.arch for trial in record.trials if trial.state != "duplicate"]
            self._append(connection, tried, state="done")

    def offer(self, archs: Sequence[Arch]) -> None:
        """Appends those of `archs` that were never in the queue."""
        with self.database.writing() as connection:
            self._append(connection, archs, state="waiting")

    def next(
        self,
        trials: int,
        *,
        outcome: tuple[Task, Trial] | None = None,
        proposals: Iterable[Arch] | None = None,
    ) -> Task | Proposing | Standing:
        """What this process should do now so that `trials` archs are evaluated.

        All of it is one transaction, after which the record has every trial that there is.

        Args:
            trials: how many different archs, those of before included.
            outcome: what became of the last task, which is handed in first.
            proposals: what this process proposes, where that was its turn.
        """
        with self.database.writing() as connection:
            if outcome is not None:
                self._hand_in(connection, *outcome)
            if proposals is not None and self._end_turn(connection):
                self._append(connection, proposals, state="waiting")
            todo = self._todo(connection, trials)
            new = self.record.new(connection)
        self.record.trials += new
        return todo

    def keep_watch(self) -> None:
        """Makes this process the one that watches, in place of any other."""
        with self.database.writing() as connection:
            self._give(connection, WATCHING, self.database.now(connection))

    def suspects(self) -> int:
        """How many archs were lost with all processes so often that who watches should not evaluate them."""
        with self.database.writing() as connection:
            self._open(connection, self.database.now(connection))
            return count_suspects(connection, self.study)

    def evaluated(self) -> frozenset[str]:
        """The keys of the archs whose outcome is stored."""
        table = tables.candidates
        asked = sa.select(table.c.arch_key).where(table.c.study_id == self.study, table.c.state == "done")
        with self.database.reading() as connection:
            return frozenset(connection.execute(asked).scalars())

    def give_back(self) -> None:
        """Leaves what this process has begun to others, as if it had not been begun; keeps watch no more."""
        table, leases = tables.candidates, tables.leases
        with self.database.writing() as connection:
            connection.execute(
                sa.update(table)
                .where(self._mine)
                .values(state="waiting", owner=None, until=None, begun=table.c.begun - 1)
            )
            connection.execute(
                sa.delete(leases).where(leases.c.study_id == self.study, leases.c.owner == self.owner)
            )

    def renew(self) -> None:
        """Lengthens the leases of this process."""
        leases = tables.leases
        with self.database.writing() as connection:
            until = self.database.now(connection) + self._lease_seconds
            connection.execute(sa.update(tables.candidates).where(self._mine).values(until=until))
            connection.execute(
                sa.update(leases)
                .where(leases.c.study_id == self.study, leases.c.owner == self.owner)
                .values(until=until)
            )

    @contextmanager
    def renewing(self) -> Iterator[None]:
        """Keeps the leases of this process while what is inside works."""
        stop = Event()

        def beat() -> None:
            while not stop.wait(self._lease_seconds / 4):
                # the worst is that another process takes the arch; what is handed in tells what is wrong
                with suppress(StudyUnavailable):
                    self.renew()

        thread = Thread(target=beat, daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def settle(self, name: str, content: str) -> str:
        """What holds for all processes under `name`: the first `content` that one of them gave."""
        table = tables.facts
        with self.database.writing() as connection:
            asked = sa.select(table.c.content).where(table.c.study_id == self.study, table.c.name == name)
            known = connection.execute(asked).scalar()
            if known is None:
                connection.execute(sa.insert(table).values(study_id=self.study, name=name, content=content))
            return content if known is None else str(known)

    def settled(self, name: str) -> str | None:
        """What holds for all processes under `name`; None before one of them has settled it."""
        table = tables.facts
        asked = sa.select(table.c.content).where(table.c.study_id == self.study, table.c.name == name)
        with self.database.reading() as connection:
            known = connection.execute(asked).scalar()
        return None if known is None else str(known)

    def amend(self, name: str, content: str, *, before: str) -> str:
        """What holds under `name`: `content` in place of `before`, or what another process put there."""
        table = tables.facts
        with self.database.writing() as connection:
            where = (table.c.study_id == self.study, table.c.name == name)
            connection.execute(
                sa.update(table).where(*where, table.c.content == before).values(content=content)
            )
            known = connection.execute(sa.select(table.c.content).where(*where)).scalar()
            return content if known is None else str(known)

    def _todo(self, connection: sa.Connection, trials: int) -> Task | Proposing | Standing:
        now = self.database.now(connection)
        rows = self._open(connection, now)
        done = self._count(connection, tables.candidates.c.state == "done")
        free = [row for row in rows if row.state != "running"]
        pending = [Arch.from_json(row.arch) for row in rows if row.state == "running"]
        if done >= trials:
            return Standing(done=True)
        if done + len(pending) >= trials:
            return Standing(done=False)
        if free:
            first = free[0]
            lease = {"state": "running", "owner": self.owner, "until": now + self._lease_seconds}
            note_watch(connection, self.study, first.position, watch=self._watch(connection, now))
            self._update(connection, first.position, **lease, begun=first.begun + 1)
            return Task(first.position, Arch.from_json(first.arch))
        if not self._take(connection, PROPOSING, now):
            return Standing(done=False)
        return Proposing(self._count(connection), tuple(pending))

    def _hand_in(self, connection: sa.Connection, task: Task, trial: Trial) -> None:
        """Makes `trial` the outcome of `task`, unless another process has handed one in before."""
        if self._update(connection, task.position, state="done", owner=None, until=None):
            self.record.add(connection, trial)

    def _end_turn(self, connection: sa.Connection) -> bool:
        """Ends this process's turn to propose: whether it was still its own."""
        table = tables.leases
        mine = sa.and_(table.c.study_id == self.study, table.c.name == PROPOSING, table.c.owner == self.owner)
        return bool(connection.execute(sa.delete(table).where(mine)).rowcount)

    def _open(self, connection: sa.Connection, now: float) -> Sequence[sa.Row[Any]]:
        """The candidates that are not done, in order, once those are free whose process was lost."""
        table = tables.candidates
        mine = sa.and_(table.c.study_id == self.study, table.c.state != "done")
        asked = sa.select(table).where(mine).order_by(table.c.position)
        rows = connection.execute(asked).all()
        lost = [row for row in rows if row.state == "running" and self._is_lost(row.owner, row.until, now)]
        for row in lost:
            self._free(connection, row, watch=self._watch(connection, now))
        return connection.execute(asked).all() if lost else rows

    def _free(self, connection: sa.Connection, row: sa.Row[Any], *, watch: str) -> None:
        """Lets others have the candidate, whose process was lost; or gives it up, where that is too often."""
        losses = losses_of(connection, row, watch=watch)
        note_losses(connection, self.study, row.position, watch=watch, unseen=losses.unseen)
        if losses.reason:
            failed = Trial(0, Arch.from_json(row.arch), {}, "failed", losses.reason)
            self._hand_in(connection, Task(row.position, failed.arch), failed)
            return
        self._update(connection, row.position, state="waiting", owner=None, until=None, begun=losses.begun)

    def _update(self, connection: sa.Connection, position: int, **values: Any) -> bool:
        """Sets columns of the candidate at `position`, unless it is done: whether it was not."""
        table = tables.candidates
        one = sa.and_(table.c.study_id == self.study, table.c.position == position, table.c.state != "done")
        return bool(connection.execute(sa.update(table).where(one).values(**values)).rowcount)

    def _append(self, connection: sa.Connection, archs: Iterable[Arch], *, state: str) -> None:
        table = tables.candidates
        wanted = {arch.key: arch for arch in archs}
        if not wanted:
            return
        known = set(
            connection.execute(sa.select(table.c.arch_key).where(table.c.study_id == self.study)).scalars()
        )
        first = len(known)
        rows = [
            {
                "study_id": self.study,
                "position": position,
                "arch_key": arch.key,
                "arch": arch.to_json(),
                "state": state,
                "begun": 0,
            }
            for position, arch in enumerate((a for k, a in wanted.items() if k not in known), first)
        ]
        if rows:
            connection.execute(sa.insert(table), rows)

    def _watch(self, connection: sa.Connection, now: float) -> str:
        """Who keeps watch: this process, where nobody does."""
        if self._take(connection, WATCHING, now):
            return self.owner
        table = tables.leases
        asked = sa.select(table.c.owner).where(table.c.study_id == self.study, table.c.name == WATCHING)
        return str(connection.execute(asked).scalar_one())

    def _take(self, connection: sa.Connection, name: str, now: float) -> bool:
        """Whether the lease `name` is this process's from now on."""
        table = tables.leases
        row = connection.execute(
            sa.select(table).where(table.c.study_id == self.study, table.c.name == name)
        ).first()
        if row is not None and row.owner != self.owner and not self._is_lost(row.owner, row.until, now):
            return False
        self._give(connection, name, now)
        return True

    def _give(self, connection: sa.Connection, name: str, now: float) -> None:
        """Makes the lease `name` this process's from now on, whosever it was."""
        table = tables.leases
        connection.execute(sa.delete(table).where(table.c.study_id == self.study, table.c.name == name))
        until = now + self._lease_seconds
        connection.execute(
            sa.insert(table).values(study_id=self.study, name=name, owner=self.owner, until=until)
        )

    def _is_lost(self, owner: str, until: float, now: float) -> bool:
        return until < now or (owner != self.owner and self._gone(owner))

    def _count(self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
        """How many candidates there are, or how many that meet the conditions."""
        mine = tables.candidates.c.study_id == self.study
        return int(connection.execute(sa.select(sa.func.count()).where(mine, *conditions)).scalar_one())
