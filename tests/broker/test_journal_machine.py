"""The ledger's machine with the journal behind it: the broker dies, and what it had saved is what there is."""

from __future__ import annotations

import copy
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fedloom.broker import journal as journal_module
from fedloom.broker.jobs import Jobs
from fedloom.broker.journal import EventRow, Journal
from fedloom.broker.ledger import Ledger
from fedloom.broker.payloads import PayloadTable
from fedloom.serialization.errors import StorageError
from fedloom.serialization.messages import Commit, Done, JobId, PayloadId, PayloadRef, SubmitJob
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from lengths import AS_FOUND, long, short
from siblings import load

machines = load(__file__, "test_ledger_machine")

JOB, LIMITS, NUMBER, pick = machines.JOB, machines.LIMITS, machines.NUMBER, machines.pick
SHORT, LONG = short(100, 50, phases=AS_FOUND), long(1200, 60, report_multiple_bugs=False)
#: What of a job is not journaled.
NOT_KEPT = ("live", "claim_until", "available_at")


class JournalMachine(machines.LedgerMachine):
    """Each change is one transaction; but several may come between two, and all of them are forgotten then."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.journal = Journal(Path(self.folder.name) / "journal.db", "process")
        self.jobs, self.payloads = Jobs(), PayloadTable()
        self.events: list[EventRow] = []
        self.records: list[tuple[Any, ...]] = []
        self.inline: dict[str, bytes | None] = {}  # by task, as acknowledged first: a repeat changes nothing
        self.rows: dict[str, Any] = {}  # all tables as they were saved last
        self.before: dict[str, Any] | None = None  # what a crash brings back, while changes are not saved
        self.save()

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    # ------------------------------------------------------------ the machine's ways to the tables

    def turn(self) -> None:
        super().turn()
        if self.before is None:
            self.save()

    def has(self, ref: PayloadRef) -> bool:
        return self.payloads.has(ref)

    def land(self, ref: PayloadRef, task: str) -> None:
        self.payloads.add(ref, f"task:{task}" if task else f"part:{JOB}", self.now)

    def used(self, done: Done, kept: list[str], unused: list[str]) -> None:
        for payload in kept:
            self.payloads.hold(PayloadId(payload), f"gather:{done.gather}", self.now)
        for payload in (*kept, *unused):
            self.payloads.release(PayloadId(payload), f"part:{JOB}")
        for item in done.items:
            self.payloads.release_all(f"task:{item.task}")
            if item.task in self.stored:
                self.inline.setdefault(item.task, b"abc" if item.inline_bytes else None)

    def tables(self) -> dict[str, Any]:
        """Jobs and payloads as the journal has them."""
        jobs = {
            job.id: {name: copy.copy(getattr(job, name)) for name in job.__slots__ if name not in NOT_KEPT}
            for job in self.jobs.jobs.values()
        }
        holds = {payload: dict(holders) for payload, holders in self.payloads.holds.items()}
        return {"jobs": jobs, "order": list(jobs), "payloads": dict(self.payloads.rows), "holds": holds,
                "events": dict(self.journal.event_seq)}  # fmt: skip

    def save(self) -> None:
        self.journal.save(self.ledger, self.jobs, self.payloads, self.events, self.records)
        self.events.clear()
        self.records.clear()
        self.payloads.doomed.clear()
        self.rows = self.tables()
        assert not self.journal.save(self.ledger, self.jobs, self.payloads), "nothing is left to be written"

    # ------------------------------------------------------------ jobs, and payloads of theirs

    @rule(n=st.integers(0, 3), what=st.sampled_from(["submit", "claim", "lost", "commit", "end", "event"]))
    def job(self, n: int, what: str) -> None:
        job = pick(self.jobs.jobs.values(), n)
        ref = PayloadRef(PayloadId(f"m-{n}"), n, f"{n:064x}")
        if what == "submit" or job is None:
            self.payloads.add(ref, "submit", self.now)
            self.jobs.submit(SubmitJob(1, f"token-{n}", f"demo {n}", ref, meta={"n": {"deep": [n]}}), self.now)
        elif what == "claim":
            self.jobs.tick(self.now)
            self.jobs.claim("controller/c", "boot", n, self.now)
        elif what == "lost":
            self.jobs.lost(job.id, job.claim, "it died", self.now)
        elif what == "commit" and not job.ended:
            commits = job.commits
            self.payloads.add(ref, f"commit:{job.id}", self.now)
            self.payloads.release_all(f"commit:{job.id}", {ref.id})
            message = Commit(1, job.id, job.claim, commits, model=ref, record={"round": commits}, best=n == 1)
            self.records.append((job.id, commits + 1, self.jobs.commit(message)[0].commit))
        elif what == "end" and n == 0:
            self.jobs.finish(job, "FINISHED:COMPLETED", "", self.now)
        elif what == "event":
            self.jobs.add_sites(job, [f"site-{n}"])
            self.jobs.refused(job, self.round, n)
            seq = self.journal.event_seq[job.id] = self.journal.event_seq.get(job.id, 0) + 1
            self.events.append(EventRow(JobId(job.id), seq, self.now, "log", "a", f"line {n}", {"n": n}))
        self.turn()

    # ------------------------------------------------------------ turns and crashes

    @precondition(lambda self: self.before is None)
    @rule()
    def hold_back(self) -> None:
        """From here on all belongs to one turn, whose transaction may never come."""
        kept = ("model", "round", "held", "said", "stored", "closed", "attempts", "inline")
        self.before = copy.deepcopy({name: getattr(self, name) for name in kept})

    @precondition(lambda self: self.before is not None)
    @rule()
    def save_at_last(self) -> None:
        self.before = None
        self.save()

    @rule(fails=st.booleans(), down_s=st.sampled_from([0.0, 3.0, 50.0]), lost=st.integers(0, 40), over=st.booleans())
    def crash_and_reload(self, fails: bool, down_s: float, lost: int, over: bool) -> None:
        """The process dies, perhaps within its transaction; the next one starts from the journal."""
        if fails and self.before is not None:
            self.fail_to_save()
        for name, value in (self.before or {}).items():
            setattr(self, name, value)
        self.before = None
        self.now += down_s
        self.restarts += 1
        self.same_results()  # as its memory has them
        self.journal.close()
        self.journal = Journal(self.journal.path, "process")
        self.ledger, self.jobs, self.payloads = Ledger(LIMITS, seed=1), Jobs(), PayloadTable()
        self.events, self.records = [], []
        self.ledger.started_at = self.now
        self.journal.load(self.ledger, self.jobs, self.payloads, self.now)
        self.model.restart(self.now)
        assert self.tables() == self.rows
        self.same_results()
        if lost < 8:
            self.lose_some(lost, over)
        for book, gather in [(book, self.ledger.gathers[gid]) for gid, book in self.model.books.items()]:
            self.ledger.check(gather, self.now)
            self.model.check(book, self.now)
        self.turn()

    def fail_to_save(self) -> None:
        def full(point: str) -> None:
            if point == "journal.before_commit":
                raise sqlite3.OperationalError("database or disk is full")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal_module, "fault_point", full)
            self.events.append(EventRow(JOB, 10**6, self.now, "log", "", "", {}))
            with pytest.raises(StorageError, match="disk full"):
                self.journal.save(self.ledger, self.jobs, self.payloads, self.events, self.records)

    def same_results(self) -> None:
        for gid, book in self.model.books.items():
            found = self.journal.results(gid, 0, 100)
            assert [(r.item.task, r.item.attempt, r.partial.id if r.partial else "") for r in found] == book.results
            for row in found:
                assert row.item.site == book.tasks[row.item.task].site
                assert row.partial is not None or row.inline == self.inline.get(row.item.task)

    def lose_some(self, n: int, over: bool) -> None:
        """The disk lost payloads: their results are tasks again; or (over) the job itself cannot go on."""
        book = pick([book for book in self.model.books.values() if book.results], n)
        if book is None:
            return
        unit = book.results[n % len(book.results)]
        gone = {at for at, r in enumerate(book.results) if r == unit or (unit[2] and r[2] == unit[2])}
        gather = self.ledger.gathers[book.id]
        if min(gone) < book.covered:
            gone |= set(range(book.covered))
            names = {book.results[at][2] for at in gone} - {""}
            assert all((r[2] in names) <= (at in gone) for at, r in enumerate(book.results)), "no partial is cut"
            gather.checkpoint, gather.covered, book.covered = None, 0, 0
        for tid in [tid for tid, promise in self.stored.items() if promise[0] == book.id]:
            del self.stored[tid]  # these promises are void: the disk broke its own
        for at in gone:
            self.inline.pop(book.results[at][0], None)
        self.closed.pop(book.id, None)
        self.ledger.lose_results(gather, gone, self.now)
        self.model.lose_results(book.id, gone, self.now)
        if over:
            self.ledger.forget_job(JOB)
            self.model.release(None)
            self.model.sites.clear()
            self.round += 1

    @precondition(lambda self: self.before is None)
    @rule()
    def database_is_whole(self) -> None:
        assert self.journal.check() == "ok"
        known = {gid for (gid,) in self.journal._db.execute("SELECT id FROM gathers")}
        for table in ("tasks", "results"):
            rows = {gid for (gid,) in self.journal._db.execute(f"SELECT gather FROM {table}")}
            assert rows <= known == set(self.model.books), "no rows of gathers that were released"


def test_a_restart_brings_back_what_was_saved() -> None:
    run_state_machine_as_test(JournalMachine, settings=SHORT)


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_a_restart_brings_back_what_was_saved_for_long() -> None:
    run_state_machine_as_test(JournalMachine, settings=LONG)


def test_a_job_may_end_in_the_turn_in_which_results_of_it_were_lost() -> None:
    """The disk lost a result and the job's model: the job fails at the start, and the broker starts."""
    tables = JournalMachine()
    try:
        tables.hello("e1", 0, "a", False)
        tables.open(0, 1, 0)
        tables.assign(0, 4, True)
        tables.partial(0, True, "")
        (gather,) = tables.ledger.gathers.values()
        assert len(gather.results) == 3
        tables.crash_and_reload(fails=False, down_s=1.0, lost=0, over=True)
        assert not tables.ledger.gathers
        tables.database_is_whole()
    finally:
        tables.teardown()


def test_a_job_may_end_in_the_turn_in_which_one_of_its_name_begins() -> None:
    """What the first one's sites remembered goes, and what the second one's do stays."""
    tables = JournalMachine()
    try:
        tables.begin(shape=0, sites=0)
        tables.hold_back()
        tables.good_partial(lost=False, n=0)
        tables.commit(chance=0)
        tables.open(redo=0, shape=0, step=0)
        tables.partial(n=0, several=False, twist="")
        assert tables.model.sites
        tables.save_at_last()
        tables.crash_and_reload(down_s=0.0, fails=False, lost=40, over=False)
        tables.ledger_and_model_agree()
    finally:
        tables.teardown()
