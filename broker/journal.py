"""What the broker must not forget, in SQLite: one transaction a poll turn, before anything of it is acknowledged.

WAL, one writer. ``durability="power"`` syncs each commit (an acknowledged result survives a power cut), ``"process"``
leaves that to the system (only the process can die, as in `sim`). Rows are the current state, not a log of events:
`Journal.load` gives back ledger, jobs and payloads as they were at the last commit.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..serialization.codec import pack
from ..serialization.errors import CodecError, StorageError
from ..serialization.faultpoints import fault_point
from ..serialization.jobmessages import POINTS_KIND
from ..serialization.messages import CommitRef, GatherId, JobId, PayloadRef, Site
from . import rows
from .gathers import FreshResult, Task
from .jobs import Jobs
from .ledger import Ledger, SiteState
from .payloads import Hold, PayloadTable
from .recent import RecentResults, StoredResult

__all__ = ["SCHEMA", "EventRow", "Journal", "StoredResult"]

SCHEMA = 1
_TASK_COLUMNS = "id, gather, site, ordinal, status, attempt, owner, tries, killed, base, code, text"

_TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs(id TEXT PRIMARY KEY, ordinal INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE commits(job TEXT, ordinal INTEGER, round INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY(job, ordinal))
    WITHOUT ROWID;
CREATE TABLE gathers(id TEXT PRIMARY KEY, job TEXT NOT NULL, opened_at REAL NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tasks(gather TEXT, ordinal INTEGER, id TEXT NOT NULL, site TEXT NOT NULL, status TEXT NOT NULL,
    attempt INTEGER NOT NULL, owner TEXT NOT NULL, tries INTEGER NOT NULL, killed INTEGER NOT NULL, base TEXT NOT NULL,
    code TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY(gather, ordinal)) WITHOUT ROWID;
CREATE TABLE results(gather TEXT, idx INTEGER, item BLOB NOT NULL, inline BLOB, partial BLOB, PRIMARY KEY(gather, idx));
CREATE TABLE payloads(id TEXT PRIMARY KEY, size INTEGER NOT NULL, digest TEXT NOT NULL, type TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE holds(payload TEXT, holder TEXT, at REAL NOT NULL, PRIMARY KEY(payload, holder)) WITHOUT ROWID;
CREATE TABLE sites(job TEXT, site TEXT, version TEXT NOT NULL, settled INTEGER NOT NULL, last TEXT NOT NULL,
    attempt TEXT NOT NULL, PRIMARY KEY(job, site)) WITHOUT ROWID;
CREATE TABLE events(job TEXT, seq INTEGER, at REAL NOT NULL, kind TEXT NOT NULL, site TEXT NOT NULL, text TEXT NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY(job, seq)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event kept about a job."""

    job: JobId
    seq: int
    at: float
    kind: str
    site: str
    text: str
    data: dict[str, Any]


class Journal:
    """The broker's database; every write goes through `save`, which is one transaction."""

    def __init__(self, path: Path | str, durability: Literal["power", "process"] = "power") -> None:
        """Open or make the database.

        Raises:
            StorageError: it is damaged, of another schema, or cannot be written.
        """
        self.path = str(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
            self._db.execute("PRAGMA busy_timeout=5000")
            self._db.execute("PRAGMA wal_autocheckpoint=2000")
            self._prepare()
        except sqlite3.Error as error:
            raise StorageError(f"journal {self.path}: {error}") from None
        self.event_seq: dict[JobId, int] = {}
        self._recent = RecentResults()
        self.rewind()

    def _prepare(self) -> None:
        tables = self._db.execute("SELECT count(*) FROM sqlite_master WHERE name='meta'").fetchone()[0]
        if not tables:
            with self._transaction():
                for statement in _TABLES.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES('schema', ?)", (str(SCHEMA),))
        found = self._db.execute("SELECT value FROM meta WHERE key='schema'").fetchone()
        if found is None or found[0] != str(SCHEMA):
            seen = found[0] if found else "none"
            raise StorageError(
                f"journal {self.path} has schema {seen}, this fedloom writes {SCHEMA}: use the version that made it, or"
                " another --store"
            )

    def rewind(self) -> None:
        """Number events from the last one that was committed, and go by the rows alone."""
        self._recent.clear()
        found = self._db.execute("SELECT job, max(seq) FROM events GROUP BY job")
        self.event_seq = {JobId(job): seq for job, seq in found}

    def close(self) -> None:
        """Close the database; what was committed is there."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ------------------------------------------------------------ writing

    def save(
        self,
        ledger: Ledger,
        jobs: Jobs,
        payloads: PayloadTable,
        events: Iterable[EventRow] = (),
        records: Iterable[tuple[JobId, int, CommitRef]] = (),
    ) -> bool:
        """Write all that has changed in one transaction and empty the lists of changes; False where nothing had.

        Raises:
            StorageError: the disk refused. What is in memory is ahead of it then: the broker must stop.
        """
        events, records = list(events), list(records)
        changed = (
            ledger.dirty_tasks or ledger.dirty_gathers or ledger.dirty_sites or ledger.fresh or ledger.released
            or ledger.rewrites or ledger.forgotten
            or jobs.dirty or jobs.gone or payloads.ops or events or records
        )  # fmt: skip
        if not changed:
            return False
        try:
            with self._transaction():
                self._save_payloads(payloads)
                self._save_jobs(jobs, records)
                written = self._save_ledger(ledger)
                self._save_events(events)
                fault_point("journal.before_commit")
        except sqlite3.Error as error:
            raise StorageError(f"journal {self.path}: {error}: is the disk full?") from error
        fault_point("journal.after_commit")
        if ledger.released or ledger.rewrites:
            self._recent.clear()
        self._recent.add(written)
        for changes in (
            ledger.dirty_tasks,
            ledger.dirty_gathers,
            ledger.dirty_sites,
            ledger.fresh,
            ledger.released,
            ledger.rewrites,
            ledger.forgotten,
        ):
            changes.clear()
        jobs.dirty.clear()
        jobs.gone.clear()
        jobs.copied.clear()
        payloads.ops.clear()
        return True

    def _write(self, statement: str, values: Sequence[tuple[Any, ...]]) -> None:
        if values:  # most turns have something for one or two tables
            self._db.executemany(statement, values)

    def _save_payloads(self, payloads: PayloadTable) -> None:
        for op in payloads.ops:
            match op.add, op.row:
                case True, PayloadRef(id=id_, size=size, digest=digest, type=type_):
                    self._db.execute("INSERT OR REPLACE INTO payloads VALUES(?,?,?,?)", (id_, size, digest, type_))
                case False, PayloadRef(id=id_):
                    self._db.execute("DELETE FROM payloads WHERE id=?", (id_,))
                case True, Hold(payload=id_, holder=holder, at=at):
                    self._db.execute("INSERT OR REPLACE INTO holds VALUES(?,?,?)", (id_, holder, at))
                case _, Hold(payload=id_, holder=holder):
                    self._db.execute("DELETE FROM holds WHERE payload=? AND holder=?", (id_, holder))

    def _save_jobs(self, jobs: Jobs, records: Iterable[tuple[JobId, int, CommitRef]]) -> None:
        for job in jobs.dirty.values():
            self._db.execute(
                "INSERT INTO jobs VALUES(?, (SELECT coalesce(max(ordinal), 0) + 1 FROM jobs), ?)"
                " ON CONFLICT(id) DO UPDATE SET data=excluded.data",
                (job.id, rows.job_row(job)),
            )
        self._write(
            "INSERT OR REPLACE INTO commits VALUES(?,?,?,?)",
            [(job, ordinal, commit.round, pack(commit.record)) for job, ordinal, commit in records],
        )
        for before, job in jobs.copied:
            self._db.execute(
                "INSERT INTO commits SELECT ?, ordinal, round, record FROM commits WHERE job=?", (job, before)
            )
        for job in jobs.gone:
            self.event_seq.pop(job, None)
            for table, key in (("jobs", "id"), ("commits", "job"), ("events", "job"), ("sites", "job")):
                self._db.execute(f"DELETE FROM {table} WHERE {key}=?", (job,))  # noqa: S608 - names of our own

    def _save_ledger(self, ledger: Ledger) -> list[tuple[FreshResult, rows.ResultRow]]:
        """Returns the results among it."""
        gone = [(gid,) for gid in ledger.released]
        for table, key in (("results", "gather"), ("tasks", "gather"), ("gathers", "id")):
            self._write(f"DELETE FROM {table} WHERE {key}=?", gone)  # noqa: S608 - names of our own
        self._write(
            "INSERT OR REPLACE INTO gathers VALUES(?,?,?,?)",
            [(g.id, g.job, g.opened_at, rows.gather_row(g)) for g in ledger.dirty_gathers.values()],
        )
        self._write(
            "INSERT OR REPLACE INTO tasks VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
            [
                (
                    t.gather,
                    t.ordinal,
                    t.id,
                    t.site,
                    t.status,
                    t.attempt,
                    t.owner,
                    t.tries,
                    t.killed,
                    t.base,
                    t.code,
                    t.text,
                )
                for t in ledger.dirty_tasks.values()
            ],
        )
        for gid, kept in ledger.rewrites:
            self._rewrite_results(gid, kept)
        results = [rows.result_row(fresh) for fresh in ledger.fresh]
        self._write("INSERT OR REPLACE INTO results VALUES(?,?,?,?,?)", results)
        # first, as all that is dirty came behind it
        self._write("DELETE FROM sites WHERE job=?", [(job,) for job in ledger.forgotten])
        self._write(
            "INSERT OR REPLACE INTO sites VALUES(?,?,?,?,?,?)",
            [
                (job, site, state.version, state.settled, state.last, state.attempt)
                for (job, site) in ledger.dirty_sites
                if (state := ledger.site_states.get((job, site)))
            ],
        )
        return list(zip(ledger.fresh, results, strict=True))

    def _save_events(self, events: Iterable[EventRow]) -> None:
        self._write(
            "INSERT OR REPLACE INTO events VALUES(?,?,?,?,?,?,?)",
            [(e.job, e.seq, e.at, e.kind, e.site, e.text, pack(e.data)) for e in events],
        )

    def trim_events(self, job: JobId, keep: int) -> int:
        """Drop all but ``keep`` of a job's events, the oldest first; how many went.

        Points that scripts log (`POINTS_KIND`) and all others push out only their own as long as they have less than
        half: a script that logs much must not take the place of what says how the job went, nor the other way round.
        """
        kinds = ("kind = ?", "kind != ?")
        with self._transaction():
            count = "SELECT count(*) FROM events WHERE job=? AND "
            points, others = (self._db.execute(count + kind, (job, POINTS_KIND)).fetchone()[0] for kind in kinds)
            over = max(0, points + others - keep)
            of_points = min(over, max(0, points - keep // 2))
            for kind, number in zip(kinds, (of_points, over - of_points), strict=True):
                oldest = f"SELECT seq FROM events WHERE job=? AND {kind} ORDER BY seq LIMIT ?"  # noqa: S608 - of two kinds above
                delete = f"DELETE FROM events WHERE job=? AND seq IN ({oldest})"  # noqa: S608 - the line before
                self._db.execute(delete, (job, job, POINTS_KIND, number))
        return over

    def _rewrite_results(self, gather: GatherId, kept: Iterable[int]) -> None:
        """After a loss: keep only these of a gather's results, numbered anew from 0."""
        query = "SELECT item, inline, partial FROM results WHERE gather=? AND idx=?"
        found = [self._db.execute(query, (gather, index)).fetchone() for index in kept]
        self._db.execute("DELETE FROM results WHERE gather=?", (gather,))
        self._db.executemany(
            "INSERT INTO results VALUES(?,?,?,?,?)", [(gather, new, *row) for new, row in enumerate(found)]
        )

    # ------------------------------------------------------------ reading

    def load(self, ledger: Ledger, jobs: Jobs, payloads: PayloadTable, now: float) -> None:
        """Fill empty objects with the state of the last commit. Leases start again at ``now``.

        Raises:
            StorageError: a row cannot be read.
        """
        try:
            jobs.load((rows.job(data) for (data,) in self._rows("jobs", "data", "ordinal")), now)
            payloads.load(
                (PayloadRef(*row) for row in self._rows("payloads", "id, size, digest, type", "id")),
                (Hold(*row) for row in self._rows("holds", "payload, holder, at", "payload")),
            )
            for job, site, *state in self._rows("sites", "job, site, version, settled, last, attempt", "job"):
                ledger.site_states[JobId(job), Site(site)] = SiteState(*state)
            for gid, data in self._rows("gathers", "id, data", "opened_at, id"):
                ledger.adopt_gather(rows.gather(GatherId(gid), data, now), now)
            for row in self._rows("tasks", _TASK_COLUMNS, "gather, ordinal"):
                self._load_task(ledger, Task(*row), now)
            for gid, index, item, inline, partial in self._rows(
                "results", "gather, idx, item, inline IS NOT NULL, partial", "gather, idx"
            ):
                rows.add_result(ledger.gathers[gid], index, rows.item(item), bool(inline), rows.ref(partial))
        except (KeyError, TypeError, ValueError, CodecError, sqlite3.Error) as error:
            raise StorageError(f"journal {self.path} cannot be read: {error!r}") from error

    def _rows(self, table: str, columns: str, order: str) -> Iterator[tuple[Any, ...]]:
        return iter(self._db.execute(f"SELECT {columns} FROM {table} ORDER BY {order}"))  # noqa: S608 - names of our own

    @staticmethod
    def _load_task(ledger: Ledger, task: Task, now: float) -> None:
        gather = ledger.gathers[task.gather]
        task.until = now + gather.spec.lease_s
        task.accepted = task.status == "leased"
        if task.given_up:
            gather.failed.append(task.id)
        ledger.adopt_task(gather, task, now)

    def results(self, gather: GatherId, start: int, count: int) -> list[StoredResult]:
        """A gather's results from ``start`` on, at most ``count``: fewer than there are, but not none of those."""
        recent = self._recent.of(gather, start, count)
        if recent:
            return recent
        found = self._db.execute(
            "SELECT item, inline, partial FROM results WHERE gather=? AND idx>=? ORDER BY idx LIMIT ?",
            (gather, start, count),
        )
        return [StoredResult(rows.item(item), inline, rows.ref(partial), item) for item, inline, partial in found]

    def partial_bytes(self, gather: GatherId, first: int) -> bytes:
        """The inline bytes of the partial whose first result this is."""
        row = self._db.execute("SELECT inline FROM results WHERE gather=? AND idx=?", (gather, first)).fetchone()
        return bytes(row[0]) if row and row[0] is not None else b""

    def records(self, job: JobId, after: int, limit: int) -> list[tuple[int, int, dict[str, Any]]]:
        """A job's commits behind the first ``after``: (ordinal from 1, round, record)."""
        found = self._db.execute(
            "SELECT ordinal, round, record FROM commits WHERE job=? AND ordinal>? ORDER BY ordinal LIMIT ?",
            (job, after, limit),
        )
        return [(ordinal, round_, rows.plain(record)) for ordinal, round_, record in found]

    def events(self, job: JobId, after: int, limit: int) -> list[EventRow]:
        """A job's events with a sequence number above ``after``."""
        found = self._db.execute(
            "SELECT job, seq, at, kind, site, text, data FROM events WHERE job=? AND seq>? ORDER BY seq LIMIT ?",
            (job, after, limit),
        )
        return [
            EventRow(j, seq, at, kind, site, text, rows.plain(data)) for j, seq, at, kind, site, text, data in found
        ]

    def marks(self, job: JobId, kinds: Sequence[str], after: int) -> Iterator[EventRow]:
        """A job's events of these kinds above ``after``, without their texts."""
        wanted = ", ".join("?" * len(kinds))
        query = f"SELECT seq, at, kind, site, data FROM events WHERE job=? AND seq>? AND kind IN ({wanted})"  # noqa: S608 - marks
        for seq, at, kind, site, data in self._db.execute(f"{query} ORDER BY seq", (job, after, *kinds)):
            yield EventRow(job, seq, at, kind, site, "", rows.plain(data))

    def size(self) -> int:
        """The bytes of what the database holds; what was deleted is used again and does not count."""
        pages, free, page_bytes = (
            int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * page_bytes

    def check(self) -> str:
        """SQLite's own integrity check: "ok", or what is wrong."""
        return str(self._db.execute("PRAGMA integrity_check").fetchone()[0])
