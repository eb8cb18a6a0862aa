"""Tasks a second through the broker's ledger and journal, without sockets: in batches, and one by one.

A task's whole life counts: given out, accepted, done with a small result inline, committed before anything of it is
said, and handed on to the job's process. The reference is SQLite alone: the same rows in the same commits.
"""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from fedloom.broker.core import ControlCore
from fedloom.broker.journal import Journal
from fedloom.broker.spool import Spool
from fedloom.broker.state import Settings
from fedloom.serialization.codec import pack
from fedloom.serialization.digest import digest_buffers
from fedloom.serialization.messages import (
    Accept,
    Answer,
    Assign,
    Claimed,
    ClaimJob,
    CloseRule,
    Done,
    DoneItem,
    Hello,
    Message,
    OpenGather,
    PackedDone,
    Packet,
    PayloadId,
    PayloadRef,
    Put,
    SubmitJob,
    TaskRef,
)
from figures import Figure, Target

Durability = Literal["power", "process"]

_RESULT = bytes(100)
_BATCH = 200


def measure(*, quick: bool = False) -> list[Figure]:
    """Both durabilities; the targets are for the one that a simulation has."""
    out: list[Figure] = []
    for durability in ("process", "power"):
        for batch, tasks, target in ((_BATCH, 4000 if quick else 20_000, 20_000), (1, 1000 if quick else 4000, 5000)):
            with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
                rate = Core(Path(folder), durability).rate(tasks, batch)
                bare = bare_rate(Path(folder) / "bare.db", durability, tasks, batch)
            name = (
                f"ledger and journal, {'one by one' if batch == 1 else f'batches of {batch}'}, durability {durability}"
            )
            goal = Target(target, "high") if durability == "process" else None
            out.append(Figure(name, rate, "tasks/s", "the same rows in bare SQLite", bare, goal))
    return out


class Core:
    """A control core with one job and one executor of many sites, which are plain calls."""

    def __init__(self, folder: Path, durability: Durability) -> None:
        spool = Spool(folder / "store", durability)
        self._journal = Journal(folder / "store" / "journal.db", durability)
        self._now = time.time()
        self._core = ControlCore(Settings(), self._journal, spool, "epoch", self._now, seed=1)
        self._numbers: dict[bytes, itertools.count[int]] = {}
        self._refs = itertools.count(1)

    def rate(self, tasks: int, batch: int) -> float:
        """Tasks a second, with so many given out at a time."""
        sites = [f"site-{number}" for number in range(tasks)]
        client = self._peer(b"client", "client", "client/1")
        digest = digest_buffers([b"archive"])
        archive = PayloadRef(PayloadId(f"b3-{digest}"), 7, digest, "blob")
        self._send(client, Put(payload=archive, ref=next(self._refs)), b"archive")
        self._send(client, SubmitJob(next(self._refs), "token", "bench", archive))
        controller = self._peer(b"controller", "controller", "controller/1")
        self._send(controller, ClaimJob(next(self._refs)))
        (claimed,) = [message for message in self._take(controller) if isinstance(message, Claimed)]
        node = f"job/{claimed.job}/{claimed.claim}"
        job = self._peer(b"job", "job", node, job=claimed.job, claim=claimed.claim)
        executor = self._peer(b"executor", "executor", "pool/p", tail=pack({"sites": sites}), capacity=batch)
        rule = CloseRule(min_clients=tasks)
        opening = OpenGather(next(self._refs), claimed.job, claimed.claim, 0, 0, "train", rule)
        self._send(job, opening, pack({"sites": sites}))
        done, start = 0, time.perf_counter()
        while done < tasks:
            assigned = [message for message in self._take(executor) if isinstance(message, Assign)]
            if not assigned:
                raise RuntimeError(f"no task was given out after {done} of {tasks}")
            for assign in assigned:
                refs = tuple(TaskRef(item.task, item.attempt) for item in assign.items)
                self._send(executor, Accept(refs))
                items = tuple(
                    DoneItem(item.task, item.attempt, item.site, inline_bytes=len(_RESULT)) for item in assign.items
                )
                self._send(executor, Done(assign.job, assign.gather, items), _RESULT * len(items))
                done += len(items)
            self._take(job)
        seconds = time.perf_counter() - start
        self._journal.close()
        return tasks / seconds

    def _peer(self, address: bytes, role: Any, node: str, *, tail: bytes = b"", **fields: Any) -> bytes:
        self._numbers[address] = itertools.count(1)
        self._send(address, Hello(node=node, role=role, boot="b", **fields), tail or pack({"sites": []}))
        self._take(address)
        return address

    def _send(self, address: bytes, message: Message, tail: bytes = b"") -> None:
        """A message, and a turn as the control loop has it."""
        core, now = self._core, time.time()
        core.handle(address, Packet(message, tail, next(self._numbers[address])), now)
        core.tick(now)
        core.commit()
        core.data_out.clear()
        core.state.sessions.ready.clear()

    def _take(self, address: bytes) -> list[Message | PackedDone]:
        """What the core has for this peer."""
        session = self._core.state.sessions.of(address)
        assert session is not None, address
        out: list[Message | PackedDone] = []
        while session.outbox:
            out.append(session.pop()[0])
            if not session.outbox:
                self._core.streams.pump(self._core.state.sessions.by_id)
        faults = [message for message in out if isinstance(message, Answer) and message.data.get("error")]
        assert not faults, faults
        return out


def bare_rate(path: Path, durability: Durability, tasks: int, batch: int) -> float:
    """Tasks a second when only their rows are written: leased in one commit, done with a result in the next."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
    db.execute("PRAGMA wal_autocheckpoint=2000")
    db.execute(
        "CREATE TABLE tasks(gather TEXT, ordinal INTEGER, id TEXT, site TEXT, status TEXT, attempt INTEGER, owner TEXT,"
        " tries INTEGER, killed INTEGER, base TEXT, code TEXT, text TEXT, PRIMARY KEY(gather, ordinal)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE results(gather TEXT, idx INTEGER, item BLOB, inline BLOB, partial BLOB, PRIMARY KEY(gather, idx))"
    )
    gather, item = "g" * 64, bytes(150)

    def write(numbers: range, status: str, attempt: int) -> None:
        db.execute("BEGIN IMMEDIATE")
        rows = [(gather, n, f"{n:064x}", f"site-{n}", status, attempt, "pool/p", 0, 0, "", "", "") for n in numbers]
        db.executemany("INSERT OR REPLACE INTO tasks VALUES(?,?,?,?,?,?,?,?,?,?,?,?)", rows)
        if status == "done":
            results = [(gather, n, item, _RESULT, None) for n in numbers]
            db.executemany("INSERT OR REPLACE INTO results VALUES(?,?,?,?,?)", results)
        db.execute("COMMIT")

    write(range(tasks), "queued", 0)
    start = time.perf_counter()
    for first in range(0, tasks, batch):
        numbers = range(first, min(first + batch, tasks))
        write(numbers, "leased", 1)
        write(numbers, "done", 1)
    seconds = time.perf_counter() - start
    db.close()
    return tasks / seconds
