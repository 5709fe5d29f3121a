from __future__ import annotations

import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from nestling.owners import this_owner
from nestling.profile import StoreError
from nestling.profile.leases import Job, Lease, LeaseQueue

JOB = Job("file", "class", "settings")
OTHER = Job("other", "class", "settings")
BOARDS = ("a", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> LeaseQueue:
    return LeaseQueue(tmp_path / "leases.db", clock=clock)


def taken(queue: LeaseQueue, job: Job | None = JOB, boards: tuple[str, ...] = BOARDS) -> Lease:
    lease = queue.take(job, boards)
    assert lease is not None
    return lease


def outcomes(queue: LeaseQueue) -> list[str | None]:
    return [attempt.outcome for attempt in queue.attempts()]


def test_a_file_is_measured_on_one_board_at_a_time_and_a_board_measures_one(queue: LeaseQueue) -> None:
    first = taken(queue)
    assert first.board == "a"
    assert queue.take(JOB, BOARDS) is None
    second = taken(queue, OTHER)
    assert second.board == "b"
    assert queue.take(Job("third", "class", "settings"), BOARDS) is None
    assert queue.take(None, BOARDS) is None
    queue.finish(first, "content")
    assert taken(queue, None).board == "a"


def test_what_was_brought_in_time_counts_and_is_kept(queue: LeaseQueue) -> None:
    assert queue.state(JOB).content is None
    assert queue.finish(taken(queue), "content")
    assert LeaseQueue(queue.path).state(JOB).content == "content"
    assert outcomes(queue) == ["measured"]


def test_who_did_not_know_that_a_job_was_done_gets_no_lease_on_it(queue: LeaseQueue) -> None:
    queue.finish(taken(queue), "first")
    assert queue.take(JOB, BOARDS) is None
    again = queue.take(JOB, BOARDS, before="first")
    assert again is not None
    assert queue.finish(again, "second")
    assert queue.state(JOB).content == "second"


def test_a_lease_that_ran_out_goes_to_another_and_the_late_answer_does_not_count(
    queue: LeaseQueue, clock: Clock
) -> None:
    slow = taken(queue)
    clock.now += queue.seconds + 1
    quick = taken(queue)
    assert quick.board == "a"
    assert queue.finish(quick, "quick")
    assert not queue.finish(slow, "slow")
    assert queue.state(JOB).content == "quick"
    assert outcomes(queue) == ["late", "measured"]


def test_a_renewed_lease_does_not_run_out_and_a_lost_one_cannot_be_renewed(
    queue: LeaseQueue, clock: Clock
) -> None:
    first = taken(queue)
    for _ in range(3):
        clock.now += queue.seconds * 0.9
        queue.renew([first])
    assert queue.take(JOB, BOARDS) is None
    clock.now += queue.seconds + 1
    second = taken(queue)
    queue.renew([first])
    assert not queue.finish(first, "late")
    assert queue.finish(second, "second")


def test_strikes_add_up_until_something_counts(queue: LeaseQueue) -> None:
    assert queue.fail(taken(queue), "lost", "SIGSEGV", strike=True) == 1
    assert queue.fail(taken(queue), "cut", "the line was lost") == 1
    assert queue.fail(taken(queue), "lost", "hung", strike=True) == 2
    assert (queue.state(JOB).strikes, queue.state(JOB).cause) == (2, "hung")
    queue.finish(taken(queue), "content")
    assert (queue.state(JOB).strikes, queue.state(JOB).cause) == (0, None)
    assert [(a.outcome, a.cause) for a in queue.attempts()] == [
        ("lost", "SIGSEGV"),
        ("cut", "the line was lost"),
        ("lost", "hung"),
        ("measured", None),
    ]


def test_a_worker_lost_by_who_had_lost_the_lease_does_not_speak_against_the_job(
    queue: LeaseQueue, clock: Clock
) -> None:
    stopped = taken(queue)
    clock.now += queue.seconds + 1
    queue.finish(taken(queue), "content")
    assert queue.fail(stopped, "lost", "hung", strike=True) == 0
    state = queue.state(JOB)
    assert (state.content, state.strikes, state.cause) == ("content", 0, None)
    assert [(a.outcome, a.cause) for a in queue.attempts()] == [("late", "hung"), ("measured", None)]


def test_a_job_that_was_too_slow_may_be_tried_with_more_time(queue: LeaseQueue) -> None:
    queue.fail(taken(queue), "lost", "SIGSEGV", strike=True)
    for count, limit in enumerate((10.0, 20.0), 2):
        queue.fail(taken(queue), "lost", f"no answer within {limit}", strike=True, limit_seconds=limit)
        assert queue.state(JOB).strikes == count
    assert [queue.state(JOB, limit_seconds=limit).strikes for limit in (10, 15, 20, 21)] == [3, 2, 2, 1]
    queue.finish(taken(queue), "content")
    assert queue.state(JOB).strikes == 0


def test_a_queue_from_before_limits_were_kept_goes_on(queue: LeaseQueue) -> None:
    with sqlite3.connect(queue.path) as connection:
        connection.execute("DROP TABLE timeout")
        connection.execute("DELETE FROM job")
    connection.close()
    again = LeaseQueue(queue.path, clock=queue.clock)
    again.fail(taken(again), "lost", "late", strike=True, limit_seconds=1.0)
    assert (again.state(JOB).strikes, again.state(JOB, limit_seconds=2.0).strikes) == (1, 0)


TAKER = """
import sys, time
from pathlib import Path
from nestling.profile.leases import Job, LeaseQueue
LeaseQueue(Path(sys.argv[1])).take(Job("file", "class", "settings"), ["a"])
print("taken", flush=True)
time.sleep(60)
"""


def test_the_lease_of_a_process_that_was_killed_is_void_at_once(tmp_path: Path) -> None:
    queue = LeaseQueue(tmp_path / "leases.db")
    with subprocess.Popen(
        [sys.executable, "-c", TAKER, str(queue.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        assert queue.take(JOB, BOARDS) is None
        process.send_signal(signal.SIGKILL)
    assert taken(queue).board == "a"
    [first, _] = queue.attempts()
    assert first.outcome == "abandoned"
    assert first.cause is not None
    assert first.cause == f"process {process.pid} on {socket.gethostname()} is gone"


def test_the_lease_of_a_process_of_another_container_with_this_name_is_kept(
    queue: LeaseQueue, clock: Clock
) -> None:
    other = LeaseQueue(queue.path, clock=clock)
    host, _, start, _, number = this_owner().rsplit(":", 4)
    other.owner = f"{host}:{2**30}:{start}:another-place:{number}"
    assert other.take(JOB, BOARDS) is not None
    assert queue.take(JOB, BOARDS) is None


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_job_counts_once_and_no_board_has_two(
    seed: int, tmp_path: Path, clock: Clock
) -> None:
    queue, rng = LeaseQueue(tmp_path / "leases.db", clock=clock, seconds=10), random.Random(seed)
    held: list[tuple[Lease, float]] = []
    counted: Counter[str] = Counter()
    jobs = [Job(str(number), "class", "settings") for number in range(6)]
    for step in range(40):
        clock.now += rng.uniform(0, 4)
        wanted = [job for job in jobs if queue.state(job).content is None]
        act = rng.random()
        if act < 0.5 and wanted:
            lease = queue.take(rng.choice(wanted), BOARDS)
            if lease is not None:
                alive = [old.board for old, until in held if until > clock.now]
                assert lease.board not in alive
                held.append((lease, clock.now + 10))
        elif held:
            lease, until = held.pop(rng.randrange(len(held)))
            if act < 0.8:
                if queue.finish(lease, str(step)):
                    assert lease.job is not None
                    counted[lease.job.file] += 1
                else:
                    assert until <= clock.now
            else:
                queue.fail(lease, "lost", "SIGSEGV", strike=True)
    assert counted
    assert set(counted.values()) == {1}
    assert outcomes(queue).count("measured") == sum(counted.values())


def test_many_threads_take_each_job_once(tmp_path: Path) -> None:
    queue = LeaseQueue(tmp_path / "leases.db")
    counted: list[str] = []

    def work() -> None:
        left = [Job(str(number), "class", "settings") for number in range(6)]
        while left:
            job = left.pop(0)
            if queue.state(job).content is not None:
                continue
            lease = queue.take(job, ["a", "b", "c", "d"])
            if lease is None:
                left.append(job)
            elif queue.finish(lease, "content"):
                counted.append(job.file)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == [str(number) for number in range(6)]


def test_a_file_that_is_no_queue_is_named(tmp_path: Path) -> None:
    path = tmp_path / "leases.db"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match=r"lease queue .*leases\.db.*not a database"):
        LeaseQueue(path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StoreError, match="version 2; this program reads 1"):
        LeaseQueue(path)
