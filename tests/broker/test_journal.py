"""The journal: transactions, replays, damage, and the payload table behind it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker import journal as journal_module
from fedloom.broker.jobs import Jobs
from fedloom.broker.journal import EventRow, Journal
from fedloom.broker.ledger import Ledger
from fedloom.broker.payloads import PayloadTable
from fedloom.broker.settle import settle
from fedloom.serialization.errors import StorageError
from fedloom.serialization.messages import (
    CloseRule,
    Commit,
    Done,
    DoneItem,
    JobId,
    OpenGather,
    PayloadId,
    PayloadRef,
    SubmitJob,
)

JOB = JobId("job")


class Tables:
    """A journal and what it is about."""

    def __init__(self, path: Path, durability: Any = "process") -> None:
        self.journal = Journal(path, durability)
        self.ledger, self.jobs, self.payloads = Ledger(seed=1), Jobs(), PayloadTable()
        self.journal.load(self.ledger, self.jobs, self.payloads, 0.0)

    def save(self, **extra: Any) -> bool:
        return self.journal.save(self.ledger, self.jobs, self.payloads, **extra)


@pytest.fixture(name="tables")
def tables_fixture(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], Tables]:
    path = tmp_path / "journal.db"
    made: list[Tables] = []

    def make() -> Tables:
        for old in made:
            old.journal.close()
        made.append(Tables(path))
        return made[-1]

    request.addfinalizer(lambda: [t.journal.close() for t in made])
    return make


def ref(n: int) -> PayloadRef:
    return PayloadRef(PayloadId(f"b3-{n}"), n, f"{n:064x}")


def filled(tables: Tables) -> None:
    tables.payloads.add(ref(1), "job:job", 1.0)
    tables.jobs.submit(SubmitJob(1, "t", "demo", ref(1), JOB, {"num_rounds": 3, "deep": {"a": [1, {"b": 2.5}]}}), 5.0)
    tables.jobs.claim("controller/x", "boot", 7, 6.0)
    tables.jobs.add_sites(tables.jobs.jobs[JOB], ["a", "b"])
    tables.ledger.owner_up("e", ["a", "b"], 2, 6.0)
    config = {"lr": 0.1, "nested": {"x": [1, 2]}}
    opening = OpenGather(1, JOB, 1, 0, 0, "train", CloseRule(2, 60.0, 5.0), ref(1), None, config, sample=0, seed=9)
    gather = tables.ledger.open(opening, ["a", "b"], 6.0)
    task = tables.ledger.assign("e", 2, 6.0)[0]
    item = DoneItem(task.id, 1, task.site, None, 4, {"metrics": {"loss": 0.5}}, "v1", True, 1.5)
    settle(tables.ledger, "e", Done(JOB, gather.id, (item,)), b"data", lambda r: True, 7.0)


def test_everything_comes_back(tables: Callable[[], Tables]) -> None:
    first = tables()
    filled(first)
    assert first.save() is True
    assert first.save() is False, "nothing has changed since"
    again = tables()
    job = again.jobs.jobs[JOB]
    assert (job.status, job.claim, job.claimed_by, job.sites) == ("RUNNING", 1, ("controller/x", "boot", 7), ("a", "b"))
    assert job.meta == {"num_rounds": 3, "deep": {"a": [1, {"b": 2.5}]}} and job.archive == ref(1)
    (gather,) = again.ledger.gathers.values()
    (before,) = first.ledger.gathers.values()
    assert (gather.spec, gather.digest, gather.requested) == (before.spec, before.digest, before.requested)
    assert gather.results == before.results and gather.left == 1
    (stored,) = again.journal.results(gather.id, 0, 10)
    assert first.journal.results(gather.id, 0, 10) == [stored], "what is in memory is what the rows say"
    assert stored.inline == b"data" and stored.item.meta == {"metrics": {"loss": 0.5}} and stored.item.index == 0
    assert (stored.item.state, stored.item.restarted, stored.item.run_s) == ("v1", True, 1.5)
    assert again.ledger.site_state(JOB, stored.item.site).version == "v1"
    assert again.payloads.held_by("job:job") == {ref(1).id} and again.payloads.rows[ref(1).id] == ref(1)


def test_what_was_not_saved_is_gone_as_a_whole(tables: Callable[[], Tables]) -> None:
    filled(tables())
    again = tables()
    assert not again.jobs.jobs and not again.ledger.gathers and not again.payloads.rows


def test_a_failed_transaction_leaves_nothing(tables: Callable[[], Tables], monkeypatch: pytest.MonkeyPatch) -> None:
    first = tables()
    filled(first)

    def full(point: str) -> None:
        if point == "journal.before_commit":
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal_module, "fault_point", full)
    with pytest.raises(StorageError, match="disk full"):
        first.save()
    monkeypatch.undo()
    assert first.ledger.dirty_tasks, "what was not written is still to be written"
    again = tables()
    assert not again.jobs.jobs and not again.payloads.rows


def test_released_gathers_leave_no_rows(tables: Callable[[], Tables]) -> None:
    first = tables()
    filled(first)
    first.save()
    job = first.jobs.commit(Commit(1, JOB, 1, 0, record={"weight_sum": 3}))[0]
    assert job.commit is not None
    first.ledger.release(JOB, 0)
    first.save(records=[(JOB, 1, job.commit)])
    again = tables()
    assert not again.ledger.gathers and not again.ledger.tasks
    for table in ("gathers", "tasks", "results"):
        with sqlite3.connect(again.journal.path) as db:
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        db.close()
    assert again.journal.records(JOB, 0, 10) == [(1, 0, {"weight_sum": 3})]
    assert again.jobs.jobs[JOB].commits == 1
    assert again.ledger.site_states, "site state outlives the round"


def test_events_are_paged_and_trimmed(tables: Callable[[], Tables]) -> None:
    first = tables()
    first.save(events=[EventRow(JOB, n, float(n), "log", "a", f"line {n}", {"n": n}) for n in range(1, 101)])
    page = first.journal.events(JOB, 90, 5)
    assert [e.seq for e in page] == [91, 92, 93, 94, 95] and page[0].data == {"n": 91} and page[0].text == "line 91"
    first.journal.trim_events(JOB, 10)
    assert [e.seq for e in first.journal.events(JOB, 0, 1000)] == list(range(91, 101))
    assert tables().journal.event_seq == {JOB: 100}


def test_what_scripts_log_pushes_out_its_own_kind_alone(tables: Callable[[], Tables]) -> None:
    """And the other way round: each keeps half of the room, and all of it where the other has none."""

    def left(points: list[int], others: list[int], keep: int) -> tuple[list[int], list[int], int]:
        world = tables()
        world.journal._db.execute("DELETE FROM events")
        rows = [EventRow(JOB, n, 0.0, "metric" if n in points else "log", "", "", {}) for n in sorted(points + others)]
        world.save(events=rows)
        gone = world.journal.trim_events(JOB, keep)
        kept = world.journal.events(JOB, 0, 1000)
        return [e.seq for e in kept if e.kind == "metric"], [e.seq for e in kept if e.kind != "metric"], gone

    odd, even = list(range(1, 41, 2)), list(range(2, 41, 2))
    assert left(odd, even, 50) == (odd, even, 0)
    assert left(odd, even, 10) == (odd[-5:], even[-5:], 30)
    assert left(odd, [2, 4], 10) == (odd[-8:], [2, 4], 12), "logged points do not push out the others"
    assert left([1, 3], even, 10) == ([1, 3], even[-8:], 12), "nor the others the points"
    assert left(odd, [], 7) == (odd[-7:], [], 13)


def test_job_order_survives(tables: Callable[[], Tables]) -> None:
    first = tables()
    for token in ("c", "a", "b"):
        first.jobs.submit(SubmitJob(1, token, token, ref(1), JobId(token)), 0.0)
        first.save()
    first.jobs.claim("x", "y", 1, 0.0)
    first.save()
    assert list(tables().jobs.jobs) == ["c", "a", "b"]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path).close()
    db = sqlite3.connect(path)
    db.execute("UPDATE meta SET value='99'")
    db.commit()
    db.close()
    with pytest.raises(StorageError, match="schema 99"):
        Journal(path)


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(StorageError, match=r"journal\.db"):
        Journal(path)


@pytest.mark.parametrize(("durability", "level"), [("power", 2), ("process", 1)])
def test_durability(tmp_path: Path, durability: Any, level: int) -> None:
    journal = Journal(tmp_path / "journal.db", durability)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (level,)  # pyright: ignore[reportPrivateUsage]
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)  # pyright: ignore[reportPrivateUsage]
    journal.close()


# ---------------------------------------------------------------- the payload table


def test_a_payload_lives_while_a_holder_does(tables: Callable[[], Tables]) -> None:
    first = tables()
    payloads = first.payloads
    payloads.add(ref(1), "put:job", 0.0)
    payloads.hold(ref(1).id, "gather:g", 0.0)
    payloads.release_all("put:job")
    assert not payloads.doomed
    payloads.release(ref(1).id, "put:job")
    payloads.release(ref(1).id, "gather:g")
    assert list(payloads.doomed) == [ref(1).id] and not payloads.rows
    payloads.add(ref(1), "put:job", 0.0)
    assert not payloads.doomed, "it landed again before the file went"
    first.save()
    assert tables().payloads.held_by("put:job") == {ref(1).id}


def test_release_all_keeps_what_it_is_told_to() -> None:
    payloads = PayloadTable()
    for n in (1, 2, 3):
        payloads.add(ref(n), "commit:job", 0.0)
    payloads.release_all("commit:job", keep={ref(2).id})
    assert payloads.held_by("commit:job") == {ref(2).id} and list(payloads.doomed) == [ref(1).id, ref(3).id]
    assert payloads.used_bytes == 2


def test_has_compares_size_and_digest() -> None:
    payloads = PayloadTable()
    payloads.add(ref(5), "submit", 0.0)
    assert payloads.has(ref(5)) and payloads.has(PayloadRef(ref(5).id, 5))
    assert not payloads.has(PayloadRef(ref(5).id, 6)) and not payloads.has(PayloadRef(ref(5).id, 5, "f" * 64))


def test_expiry() -> None:
    payloads = PayloadTable()
    payloads.add(ref(1), "submit", 10.0)
    payloads.add(ref(2), "submit", 20.0)
    payloads.hold(ref(1).id, "job:x", 15.0)
    payloads.expire("submit", 15.0)
    assert payloads.held_by("submit") == {ref(2).id} and set(payloads.rows) == {ref(1).id, ref(2).id}
