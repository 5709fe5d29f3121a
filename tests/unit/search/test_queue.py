"""Processes that share a queue: who gets what, and what becomes of the work of one that is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from nestling.search import Metrics, Problem, Trial, tables
from nestling.search.database import Database
from nestling.search.lost import LOST, RETRIES, UNSEEN
from nestling.search.queue import Proposing, Queue, Standing, Task
from nestling.search.record import Record, begin_study
from nestling.space import Arch

Evaluate = Callable[[Arch], Metrics]


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Together:
    """Processes at one study, each with its own connection; `gone` are those that ended for sure."""

    def __init__(self, problem: Problem, file: Path) -> None:
        self.problem, self.file = problem, file
        self.clock, self.gone = Clock(), set[str]()
        self.databases: list[Database] = []

    def join(self, owner: str, *, lease_seconds: float = 60.0) -> Queue:
        database = Database(self.file, clock=self.clock)
        self.databases.append(database)
        begin_study(database, self.problem, "toy")
        record = Record(self.problem, database, "toy")
        return Queue(record, owner=owner, lease_seconds=lease_seconds, gone=self.gone.__contains__)


@pytest.fixture
def together(problem: Problem, file: Path) -> Iterator[Together]:
    together = Together(problem, file)
    yield together
    for database in together.databases:
        database.close()


def outcome(arch: Arch, top1: float = 0.5) -> Trial:
    return Trial(0, arch, {"top1": top1, "latency_ms": 1.0}, "complete")


def task(found: Task | Proposing | Standing) -> Task:
    assert isinstance(found, Task)
    return found


def test_two_processes_never_get_the_same_arch(together: Together) -> None:
    archs = together.problem.space.spread(4)
    first, second = together.join("a"), together.join("b")
    first.offer(archs)
    second.offer(archs)
    given = [task(queue.next(100)).arch for queue in (first, second, first, second)]
    assert given == archs


def test_no_more_archs_are_begun_than_are_wanted(together: Together) -> None:
    first, second = together.join("a"), together.join("b")
    first.offer(together.problem.space.spread(4))
    begun = task(first.next(1))
    assert second.next(1) == Standing(done=False)
    assert first.next(1, outcome=(begun, outcome(begun.arch))) == Standing(done=True)
    assert second.next(1) == Standing(done=True)


def test_one_process_proposes_while_the_others_wait(together: Together) -> None:
    first, second = together.join("a"), together.join("b")
    [arch, other, *_] = together.problem.space.spread(3)
    first.offer([arch])
    begun = task(first.next(9))
    assert second.next(9) == Proposing(position=1, pending=(arch,))
    assert together.join("c").next(9) == Standing(done=False)
    assert task(second.next(9, proposals=[arch, other])).arch == other
    assert first.next(9, outcome=(begun, outcome(arch))) == Proposing(position=2, pending=(other,))


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_what_a_lost_process_began_is_given_to_another(together: Together, how: str) -> None:
    first, second = together.join("a"), together.join("b")
    [arch, *_] = together.problem.space.spread(2)
    first.offer([arch])
    first.next(9)
    together.clock.now = 59.0
    assert isinstance(second.next(9), Proposing)
    if how == "silent":
        together.clock.now = 61.0
    else:
        together.gone.add("a")
    assert task(second.next(9)).arch == arch


def test_a_process_that_was_lost_while_it_proposed_is_followed_by_another(together: Together) -> None:
    first, second = together.join("a"), together.join("b")
    turn = first.next(9)
    assert isinstance(turn, Proposing)
    assert second.next(9) == Standing(done=False)
    together.clock.now = 61.0
    assert second.next(9) == turn
    late = first.next(9, proposals=[together.problem.space.largest])
    assert late == Standing(done=False)
    found = second.next(9, proposals=[together.problem.space.smallest])
    assert task(found).arch == together.problem.space.smallest


def test_a_lease_that_is_renewed_does_not_end(together: Together) -> None:
    first, second = together.join("a"), together.join("b")
    first.offer([together.problem.space.smallest])
    first.next(9)
    for minute in range(1, 5):
        together.clock.now = 50.0 * minute
        first.renew()
    assert isinstance(second.next(9), Proposing)


def test_the_first_outcome_of_an_arch_is_its_only_trial(together: Together) -> None:
    slow, fast = together.join("a"), together.join("b")
    slow.offer([together.problem.space.smallest])
    begun = task(slow.next(9))
    together.clock.now = 61.0
    again = task(fast.next(9))
    fast.next(9, outcome=(again, outcome(again.arch, top1=0.7)))
    slow.next(9, outcome=(begun, outcome(begun.arch, top1=0.6)))
    assert [trial.metrics["top1"] for trial in slow.record.trials] == [0.7]


def test_an_arch_whose_processes_are_lost_again_and_again_fails_with_its_cause(together: Together) -> None:
    survivor = together.join("h:1:2:3:4")
    [deadly, harmless, *_] = together.problem.space.spread(3)
    survivor.offer([deadly, harmless])
    survivor.keep_watch()
    for attempt in range(1 + RETRIES):
        owner = f"host:{attempt}:0:place:1"
        assert task(together.join(owner).next(9)).arch == deadly
        together.gone.add(owner)
    assert task(survivor.next(9)).arch == harmless
    [failed] = survivor.record.trials
    assert (failed.arch, failed.state) == (deadly, "failed")
    assert failed.reason == (
        "the process that evaluated it was lost 4 times, last process 3 on host: it was killed, or its "
        "machine was"
    )


def end_all(together: Together, arch: Arch, times: int) -> None:
    """The whole command, one process, is killed `times` times while it evaluates `arch`."""
    for attempt in range(times):
        owner = f"host:{attempt}:0:place:{len(together.gone)}"
        alone = together.join(owner)
        alone.offer([arch])
        assert task(alone.next(9)).arch == arch
        together.gone.add(owner)


def test_kills_of_the_whole_command_do_not_speak_against_what_it_evaluated(together: Together) -> None:
    arch = together.problem.space.smallest
    end_all(together, arch, UNSEEN - 1)
    alone = together.join("host:99:0:place:1")
    begun = task(alone.next(1))
    assert alone.next(1, outcome=(begun, outcome(arch))) == Standing(done=True)
    assert [trial.state for trial in alone.record.trials] == ["complete"]


def test_an_arch_with_which_the_whole_command_ends_is_not_tried_for_ever(together: Together) -> None:
    arch = together.problem.space.smallest
    end_all(together, arch, UNSEEN)
    alone = together.join("host:99:0:place:1")
    assert alone.next(1) == Standing(done=True)
    [failed] = alone.record.trials
    assert failed.reason.startswith(
        f"{LOST} {UNSEEN} times, each time with the whole search, last process 9 on"
    )


def test_an_arch_with_which_the_command_was_killed_often_is_suspected_until_it_is_done(
    together: Together,
) -> None:
    arch = together.problem.space.smallest
    end_all(together, arch, RETRIES)
    alone = together.join("host:98:0:place:1")
    assert alone.suspects() == 0
    alone.give_back()
    end_all(together, arch, 1)
    alone = together.join("host:99:0:place:1")
    assert alone.suspects() == 1
    begun = task(alone.next(1))
    alone.next(1, outcome=(begun, outcome(arch)))
    assert alone.suspects() == 0


def test_losses_count_again_once_somebody_else_keeps_watch(together: Together) -> None:
    arch = together.problem.space.smallest
    end_all(together, arch, RETRIES + 1)
    watcher = together.join("host:98:0:place:1")
    watcher.keep_watch()
    for attempt in range(RETRIES + 1):
        assert watcher.record.sync() == []
        owner = f"worker:{attempt}:0:place:1"
        assert task(together.join(owner).next(1)).arch == arch
        together.gone.add(owner)
    assert together.join("worker:9:0:place:1").next(1) == Standing(done=True)
    [failed] = watcher.record.sync()
    assert failed.reason.startswith(f"{LOST} {RETRIES + 1} times, last process 3 on worker")


def test_a_watch_that_was_lost_is_kept_by_another(together: Together) -> None:
    together.join("host:1:0:place:1").keep_watch()
    together.gone.add("host:1:0:place:1")
    arch, survivor = together.problem.space.smallest, together.join("host:2:0:place:1")
    survivor.offer([arch, together.problem.space.largest])
    survivor.next(9)  # it watches over all from now on
    for attempt in range(RETRIES + 1):
        assert isinstance(together.join(f"worker:{attempt}:0:place:1").next(9), Task)
        together.gone.add(f"worker:{attempt}:0:place:1")
    survivor.next(9)
    assert [trial.state for trial in survivor.record.trials] == ["failed"]


def test_what_is_given_back_counts_as_not_begun(together: Together) -> None:
    queue = together.join("a")
    queue.offer([together.problem.space.smallest])
    for _ in range(RETRIES + 2):
        assert isinstance(queue.next(9), Task)
        queue.give_back()
    assert isinstance(together.join("b").next(9), Task)


def test_the_first_word_on_a_fact_holds(together: Together) -> None:
    first, second = together.join("a"), together.join("b")
    assert first.settle("reference", "1.5") == "1.5"
    assert second.settle("reference", "2.5") == "1.5"


def test_leases_are_renewed_while_work_is_done(together: Together) -> None:
    queue = together.join("a", lease_seconds=0.04)
    queue.offer([together.problem.space.smallest])
    assert isinstance(queue.next(9), Task)
    asked = sa.select(tables.candidates.c.until)
    with queue.renewing():
        together.clock.now = 50.0
        until = 0.0
        while until < 50.0:  # the test's own time limit ends this
            with queue.database.reading() as connection:
                until = connection.execute(asked).scalar_one()
    assert until == 50.04
