"""What `test_spool_machine` drives: the broker's core, a played data process, and a model of who holds what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fedloom.broker.quota import Needs
from fedloom.serialization import faultpoints
from fedloom.serialization.messages import (
    Abort,
    Grant,
    PayloadRef,
    Put,
    Stored,
)
from siblings import load

tools = load(__file__, "conftest")

SITES = ("site-0", "site-1", "site-2")
#: Sizes are in these, so that a job's archive of a few bytes is next to nothing.
UNIT = 1000
#: Where the broker may die, and whether the turn was committed then.
POINTS = {
    "control.before_commit": False,
    "journal.before_commit": False,
    "journal.after_commit": True,
    "control.after_commit_before_send": True,
}


class Killed(BaseException):
    """The broker died at a named point."""


def die(_pid: int, _signal: int) -> None:
    raise Killed


@contextlib.contextmanager
def killed_at(point: str) -> Iterator[None]:
    """Within this the broker's process dies when it comes to the point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", die)
        faultpoints.arm(f"{point}:1" if point else "")
        try:
            yield
        finally:
            faultpoints.arm("")


@dataclass(eq=False)
class Coming:
    """A payload on its way, as the data process knows it."""

    ref: PayloadRef
    owner: dict[str, Any]
    stream: str
    admitted: bool = False
    waited: bool = False


@dataclass(eq=False)
class JobSide:
    """A job's process: what it has stored for itself, and its open gather."""

    peer: Any
    number: int
    model_bytes: int
    round: int = 0
    puts: int = 0
    gather: str = ""
    best: bool = False

    @property
    def id(self) -> str:
        return self.peer.hello.job

    @property
    def owner(self) -> dict[str, Any]:
        return {"job": self.id, "claim": self.peer.hello.claim}


class SpoolWorld:
    """The broker's core over a folder, a played data process, and the model; the machine adds what happens to them."""

    # ------------------------------------------------------------ doing things, with a crash or without

    @property
    def state(self) -> Any:
        return self.world.core.state

    def act(self, point: str, do: Callable[[], Any], effect: Callable[[], None] = lambda: None) -> Any:
        """Do what ends in one commit. The model follows if that was made; None: the broker died."""
        try:
            with killed_at(point):
                result = do()
        except Killed:
            if POINTS[point]:
                effect()
            self.restart()
            return None
        effect()
        self.catch_up()
        return result

    def restart(self) -> None:
        """Kill -9 of the broker, both processes: memory is gone, so is what was said, and everybody comes back."""
        self.landed.clear()
        for coming in self.coming.values():
            coming.admitted = False
        self.world.restart()
        self.catch_up()
        known = {row[0]: row[1] for row in self.world.journal._db.execute("SELECT id, size FROM payloads")}
        assert known == {row.id: row.size for row in self.state.payloads.rows.values()}, "rows as journaled"
        holds = {tuple(row) for row in self.world.journal._db.execute("SELECT payload, holder FROM holds")}
        assert holds == {(p, h) for p, holders in self.state.payloads.holds.items() for h in holders}
        self.controller.connect()
        self.pool.connect(held=tuple(ref for _, ref, _ in self.tasks.values()))
        for job in self.jobs:
            job.peer.connect()
        self.catch_up()

    def catch_up(self) -> None:
        """Follow the ledger: attempts that were given on, jobs and rounds that ended."""
        for task in tools.work(self.pool):
            self.tasks[task[1].task] = task
        ledger = self.state.ledger
        for tid, task in ledger.tasks.items():
            if task.attempt > max(1, self.attempts.get(tid, 0)):
                self.loose.pop(f"task:{tid}", None)
                self.leave(lambda c, tid=tid: c.owner.get("task") == tid)
            self.attempts[tid] = task.attempt
        for tid in [tid for tid in self.tasks if tid not in ledger.tasks or ledger.tasks[tid].ended]:
            del self.tasks[tid]
        for tid in [tid for tid in self.attempts if tid not in ledger.tasks]:
            del self.attempts[tid]
            self.loose.pop(f"task:{tid}", None)
            self.leave(lambda c, tid=tid: c.owner.get("task") == tid)
        for job in [job for job in self.jobs if self.state.jobs.jobs[job.id].ended]:
            self.jobs.remove(job)
            for holder in ("put", "part"):
                self.loose.pop(f"{holder}:{job.id}", None)
            self.leave(lambda c, job=job: c.owner.get("job") == job.id and not c.owner.get("task"))

    def leave(self, which: Callable[[Coming], bool]) -> None:
        """What is not wanted any more is not on its way."""
        for coming in [c for c in self.coming.values() if which(c)]:
            coming.admitted = False
            if coming.ref.id not in self.landed:
                del self.coming[coming.ref.id]

    # ------------------------------------------------------------ uploads

    def ask(self, ref: PayloadRef, owner: dict[str, Any], point: str = "") -> Coming | None:
        """The data process asks whether it may come."""
        self.count += 1
        coming = self.coming.setdefault(ref.id, Coming(ref, owner, f"{self.count:032x}"))
        coming.owner = owner
        quota = self.state.quota
        taken = (
            quota.used + quota.reserved + sum(turn.size for payload, turn in quota.turns.items() if payload != ref.id)
        )
        answer = self.act(point, lambda: self.world.data(Put(ref, coming.stream, **owner)))
        match answer:
            case None:
                return None
            case [Grant()]:
                coming.admitted = True
            case [Stored()]:
                del self.coming[ref.id]
                self.take(owner, ref.id)
                return None
            case [Abort(code="quota", retry_after_s=float(retry_s))] if retry_s > 0:
                coming.waited = True
                assert taken + self.round_bytes(ref, owner) > self.total, "refused although there is room"
            case [Abort() as abort]:
                assert abort.code in ("quota", "stale", "closed", "fenced", "late", "conflict")
                del self.coming[ref.id]
                return None
            case other:
                raise AssertionError(other)
        return coming

    def round_bytes(self, ref: PayloadRef, owner: dict[str, Any]) -> int:
        """What there must be room for: a job's first model comes in only where its round will fit as well.

        Room for the largest result is left to results: by clients, and by models of further jobs.
        """
        quota = self.state.quota
        if "job" not in owner:
            return ref.size + quota.result_bytes
        job = self.state.jobs.jobs.get(owner["job"])
        if job is None or "claim" not in owner or quota.model_bytes(job):
            return ref.size
        return Needs.of(job.meta, ref.size).round + max(0, quota.result_bytes - ref.size)

    def land(self, coming: Coming, point: str = "") -> bool:
        """Its file is whole and in place, and it is reported; whether its row was made."""
        path = self.state.spool.path(coming.ref.id)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(coming.ref.size)
        self.landed.add(coming.ref.id)
        return self.report(coming, point)

    def report(self, coming: Coming, point: str) -> bool:
        wanted = self.wanted(coming.owner)

        def effect() -> None:
            self.landed.discard(coming.ref.id)
            self.coming.pop(coming.ref.id, None)
            if wanted:
                self.take(coming.owner, coming.ref.id)

        put = Put(coming.ref, coming.stream, local="landed", **coming.owner)
        answer = self.act(point, lambda: self.world.data(put), effect)
        if answer is None:
            return False
        assert isinstance(answer[0], Stored if wanted else Abort), answer
        return wanted

    def wanted(self, owner: dict[str, Any]) -> bool:
        """Whether whoever put it may still."""
        if "task" in owner:
            return owner["task"] in self.tasks and self.attempts[owner["task"]] == owner["attempt"]
        if "job" not in owner:
            return True
        return any(job.id == owner["job"] and owner.get("claim") in (None, job.owner["claim"]) for job in self.jobs)

    def take(self, owner: dict[str, Any], payload: str) -> None:
        """It is held until it is used."""
        if "task" in owner:
            holder = f"task:{owner['task']}"
        elif "claim" in owner:
            holder = f"put:{owner['job']}"
        else:
            holder = f"part:{owner['job']}" if "job" in owner else "submit"
        self.loose.setdefault(holder, {}).setdefault(payload, self.world.now)

    def drop(self, holder: str, payload: str = "") -> None:
        """The holder lets go of one payload, or of all."""
        held = self.loose.get(holder, {})
        held.pop(payload, None)
        if not payload or not held:
            self.loose.pop(holder, None)

    def own(self, job: JobSide, ref: PayloadRef, point: str = "") -> bool:
        """A job's process stores something; whether it is there."""
        if self.state.payloads.has(ref):
            owner = job.owner
            self.act("", lambda: self.world.data(Put(ref, "f" * 32, **owner)), lambda: self.take(owner, ref.id))
            return True
        coming = self.ask(ref, job.owner)
        return coming is not None and coming.admitted and self.land(coming, point)
