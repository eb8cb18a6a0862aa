"""What became of every result: from the executors' logs, the round records and the broker's journal."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedloom.broker import rows
from fedloom.broker.gathers import task_id


@dataclass(slots=True)
class Progress:
    """How far a job is, by the journal."""

    commits: int = 0
    accepted: int = 0  # results of the gathers that are not committed
    tasks: int = 0  # of those gathers

    @property
    def working(self) -> bool:
        """Whether a round is open that has not all its results."""
        return self.accepted < self.tasks


def progress(store: Path) -> Progress | None:
    """Read the journal as it is now; None: it cannot be read at the moment."""
    with contextlib.suppress(sqlite3.Error):
        db = sqlite3.connect(f"file:{store / 'journal.db'}?mode=ro", uri=True, timeout=0.2)
        with contextlib.closing(db):
            (commits,) = db.execute("SELECT count(*) FROM commits").fetchone()
            (accepted,) = db.execute("SELECT count(*) FROM results").fetchone()
            (tasks,) = db.execute("SELECT count(*) FROM tasks").fetchone()
            return Progress(commits, accepted, tasks)
    return None


def taken(store: Path) -> set[tuple[int, str]]:
    """The round and site of each task whose result the journal holds, of the gathers that are not committed."""
    db = sqlite3.connect(f"file:{store / 'journal.db'}?mode=ro", uri=True, timeout=5.0)
    with contextlib.closing(db):
        (commits,) = db.execute("SELECT count(*) FROM commits").fetchone()
        return {(commits, site) for (site,) in db.execute("SELECT site FROM tasks WHERE status = 'done'")}


def status(store: Path, job_id: str) -> str:
    """A job's status by the journal; "" while it cannot be read."""
    with contextlib.suppress(sqlite3.Error):
        db = sqlite3.connect(f"file:{store / 'journal.db'}?mode=ro", uri=True, timeout=0.2)
        with contextlib.closing(db):
            row = db.execute("SELECT data FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return rows.job(row[0]).status if row else ""
    return ""


@dataclass(slots=True)
class Account:
    """A run's figures, and what is wrong with it."""

    acknowledged: int = 0
    folded: int = 0
    lost: int = 0
    twice: int = 0
    late: int = 0
    refused: int = 0
    executions: int = 0
    tasks: int = 0
    payload_bytes: int = 0
    wrong: list[str] = field(default_factory=list[str])

    def __add__(self, other: Account) -> Account:
        return Account(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Account)))


def account(job: Any, job_id: str, records: list[dict[str, Any]], events: list[dict[str, Any]], fleet: Any) -> Account:
    """Compare what was acknowledged with what was folded."""
    out = Account(tasks=len(job.sites) * job.rounds)
    rounds = Counter(record["round"] for record in records)
    if sorted(rounds) != list(range(job.rounds)) or max(rounds.values(), default=0) > 1:
        out.wrong.append(f"rounds committed: {dict(rounds)}")
    folded: Counter[tuple[int, str]] = Counter()
    for record in records:
        folded.update((record["round"], site["name"]) for site in record["sites"])
        out.payload_bytes += record["bytes"]
    out.folded = sum(folded.values())
    out.twice = sum(count - 1 for count in folded.values())
    known = acknowledged(job, job_id, fleet)
    out.acknowledged = len(known)
    out.lost = len(known - set(folded))
    refused = [event for event in events if event.get("kind") == "result_refused"]
    out.refused = len(refused)
    out.late = sum((event.get("data") or {}).get("code") in ("late", "stale", "closed") for event in refused)
    out.executions = sum(count for line, count in job.runs().items() if line.startswith("begin "))
    if any(not event.get("text") for event in refused):
        out.wrong.append("a result was refused without a reason")
    if len(folded) != out.tasks:
        out.wrong.append(f"{len(folded)} results were folded, of {out.tasks}")
    return out


def acknowledged(job: Any, job_id: str, fleet: Any) -> set[tuple[int, str]]:
    """The round and site of each result whose executor has logged that it is stored."""
    names = {
        task_id(job_id, round_, step, "train", site, redo): (round_, site)
        for round_ in range(job.rounds) for step in range(2) for redo in range(2) for site in job.sites
    }  # fmt: skip
    out: set[tuple[int, str]] = set()
    for party in [name for name in fleet.all if name.startswith("site-")]:
        for line in fleet.log_lines(party):
            if line.get("event") == "results_stored":
                out.update(names[task] for task in line["tasks"] if task in names)
    return out


def read_records(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
