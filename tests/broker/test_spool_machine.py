"""Random histories of the spool: who holds which payload, which file lies where, what the quota lets in, and crashes.

The broker is the real one, from its messages down to its files and rows. The data process is played: it asks, brings
files and reports them. The model beside it is a map of who should hold what: jobs, gathers and commits hold what the
tables say they consist of, and what waits for its use (put, task, part, submit) is counted here.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import structlog
from fedloom.broker.payloads import SUBMIT_KEEP_S
from fedloom.serialization.messages import (
    Answer,
    Checkpoint,
    Claimed,
    ClaimJob,
    Commit,
    Done,
    DoneItem,
    EndJob,
    PayloadId,
    PayloadRef,
    Receipt,
    TaskRef,
)
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lengths import long, short
from siblings import load

world = load(__file__, "spool_world")
SITES = world.SITES
UNIT = world.UNIT
POINTS = world.POINTS
Coming = world.Coming
JobSide = world.JobSide
tools = world.tools


CRASH = st.sampled_from(("", "", "", "", *POINTS))
OLD_S = SUBMIT_KEEP_S + 300.0


class SpoolMachine(world.SpoolWorld, RuleBasedStateMachine):  # type: ignore[misc]
    """A broker with a quota, two jobs at a time, and one pool of executors."""

    @initialize(quota=st.sampled_from((24, 30, 45, 80)), last=st.sampled_from(("", *POINTS)), folding=st.booleans())
    def begin(self, quota: int, last: str, folding: bool) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        self.folder = Path(tempfile.mkdtemp(prefix="spool"))
        self.world = tools.World(self.folder, quota_bytes=quota * UNIT)
        self.total = quota * UNIT
        self.last = last  # where the broker dies once more in the end
        self.folding = folding  # whether the executors fold in the end
        self.loose: dict[str, dict[str, float]] = {}  # holder: payload, since; of what waits to be used
        self.lost: set[tuple[str, str]] = set()  # holders, and what the disk took from them
        self.coming: dict[str, Coming] = {}
        self.landed: set[str] = set()  # files that are whole, and not reported yet
        self.jobs: list[JobSide] = []
        self.attempts: dict[str, int] = {}
        self.tasks: dict[str, tuple[Any, TaskRef, str]] = {}
        self.count = 0
        self.pool = self.world.executor(*SITES, node="pool/p", capacity=2 * len(SITES))
        self.controller = self.world.peer("controller", "controller/c")

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exception() is None:
                self.end_fairly()
        finally:
            self.world.journal.close()
            shutil.rmtree(self.folder)

    # ------------------------------------------------------------ rules: what comes

    @rule(size=st.integers(1, 20), point=CRASH)
    def a_client_puts(self, size: int, point: str) -> None:
        self.count += 1
        self.ask(PayloadRef(PayloadId(f"b3-{self.count}"), size * UNIT), {}, point)

    @precondition(lambda self: self.coming)
    @rule(at=st.integers(0, 20), point=CRASH)
    def something_lands(self, at: int, point: str) -> None:
        ready = list(self.coming.values())
        coming = ready[at % len(ready)]
        if coming.ref.id in self.landed:
            self.report(coming, point)
        elif coming.admitted:
            self.land(coming, point)
        else:
            self.ask(coming.ref, coming.owner, point)

    @precondition(lambda self: any(c.admitted for c in self.coming.values()))
    @rule(at=st.integers(0, 20))
    def a_file_lands_and_all_dies(self, at: int) -> None:
        """Between the file and its report: a file without a row, which the start removes."""
        ready = [c for c in self.coming.values() if c.admitted and c.ref.id not in self.landed]
        if ready:
            path = self.state.spool.path(ready[at % len(ready)].ref.id)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x" * ready[at % len(ready)].ref.size)
        self.restart()

    # ------------------------------------------------------------ rules: jobs

    @precondition(lambda self: len(self.jobs) < 2)
    @rule(model=st.sampled_from((1, 2, 3)))
    def a_job_starts(self, model: int) -> None:
        self.count += 1
        token = f"t{self.count}"
        before = set(self.state.jobs.jobs)
        client = self.world.client()
        try:
            client.put(b"archive of " + token.encode())
        except AssertionError:
            return  # the quota is taken
        self.take({}, next(iter(self.state.payloads.held_by("submit") - set(self.loose.get("submit", {})))))
        archive = self.state.payloads.rows[list(self.loose["submit"])[-1]]
        client.send(tools.SubmitJob(client.ref(), token, "j", archive, meta={"state_bytes": UNIT}))
        assert client.one(Answer).data["job_id"] not in before
        self.drop("submit", archive.id)
        self.controller.send(ClaimJob(self.controller.ref()))
        self.world.pass_time(1.0)
        self.jobs.append(JobSide(self.world.process(self.controller.one(Claimed)), self.count, model * UNIT))
        self.world.disconnect(client)

    def job_at(self, at: int) -> JobSide:
        return self.jobs[at % len(self.jobs)]

    def model(self, job: JobSide) -> PayloadRef:
        return PayloadRef(PayloadId(f"b3-m{job.number}.{job.round}"), job.model_bytes)

    @precondition(lambda self: self.jobs)
    @rule(at=st.integers(0, 1), point=CRASH)
    def a_round_opens(self, at: int, point: str) -> None:
        job = self.job_at(at)
        if job.gather or not self.own(job, self.model(job), point) or job not in self.jobs:
            return
        message, tail = tools.opening(
            job.peer, sites=SITES, min_clients=len(SITES), payload=self.model(job), round=job.round, partials=True,
            max_attempts=1000,
        )  # fmt: skip
        self.act(point, lambda: job.peer.send(message, tail))
        job.gather = next((g.id for g in self.state.ledger.gathers_of(job.id)), "")
        job.peer.take(Receipt)

    @precondition(lambda self: self.tasks)
    @rule(at=st.integers(0, 20), done=st.booleans(), point=CRASH)
    def a_result(self, at: int, done: bool, point: str) -> None:
        """An executor puts a result, or sends the Done of what it has put."""
        task = list(self.tasks.values())[at % len(self.tasks)]
        assign, ref, site = task
        name = PayloadId(f"r-{ref.task}.{ref.attempt}")
        payload = PayloadRef(name, assign.payload.size)
        if not self.state.payloads.has(payload):
            coming = self.ask(payload, {"job": assign.job, "task": ref.task, "attempt": ref.attempt}, point)
            if coming is not None and coming.admitted and done:
                self.land(coming)
        elif done:
            message = Done(assign.job, assign.gather, (DoneItem(ref.task, ref.attempt, site, payload),))
            self.act(point, lambda: self.pool.send(message), lambda: self.drop(f"task:{ref.task}"))

    @precondition(lambda self: any(task[0].partials for task in self.tasks.values()))
    @rule(point=CRASH, keep=st.booleans())
    def a_partial(self, point: str, keep: bool) -> None:
        """All tasks of one gather that are left, as one payload; without ``keep`` its Done conflicts and is refused."""
        self.partial(next(assign.gather for assign, _, _ in self.tasks.values() if assign.partials), point, keep)

    def partial(self, gather: str, point: str = "", keep: bool = True) -> None:
        mine = [task for task in self.tasks.values() if task[0].gather == gather]
        assign = mine[0][0]
        self.count += 1
        waiting = (c.ref for c in self.coming.values() if c.waited and c.owner == {"job": assign.job})
        payload = next(waiting, PayloadRef(PayloadId(f"p-{self.count}"), 2 * assign.payload.size))
        coming = self.ask(payload, {"job": assign.job})
        if coming is None or not coming.admitted or not self.land(coming, point):
            return
        attempts = [(ref.task, ref.attempt if keep else ref.attempt + 1, site) for _, ref, site in mine]
        items = tuple(DoneItem(task, attempt, site) for task, attempt, site in attempts)

        def effect() -> None:
            self.drop(f"part:{assign.job}", payload.id)
            for task, _, _ in attempts if keep else ():
                self.drop(f"task:{task}")

        self.act(point, lambda: self.pool.send(Done(assign.job, assign.gather, items, payload)), effect)

    @precondition(lambda self: self.jobs)
    @rule(at=st.integers(0, 1), point=CRASH)
    def a_checkpoint(self, at: int, point: str) -> None:
        self.checkpoint(self.job_at(at), point)

    def checkpoint(self, job: JobSide, point: str = "") -> bool:
        gather = self.state.ledger.gathers.get(job.gather)
        if gather is None or len(gather.results) == gather.covered:
            return False
        self.count += 1
        put = [payload for payload in self.loose.get(f"put:{job.id}", {}) if payload.startswith("p-")]
        name = put[-1] if put else f"p-{self.count}"  # what the broker died over is said again, not put anew
        ref = PayloadRef(PayloadId(name), 2 * job.model_bytes)
        if not self.own(job, ref):
            return False
        message = Checkpoint(job.peer.ref(), job.id, job.owner["claim"], job.gather, ref, len(gather.results))
        self.act(point, lambda: job.peer.send(message), lambda: self.drop(f"put:{job.id}", ref.id))
        return True

    @precondition(lambda self: self.jobs)
    @rule(at=st.integers(0, 1), best=st.booleans(), state=st.booleans(), point=CRASH)
    def a_commit(self, at: int, best: bool, state: bool, point: str) -> None:
        self.commit(self.job_at(at), best, state, point)

    def commit(self, job: JobSide, best: bool, state: bool, point: str = "") -> bool:
        gather = self.state.ledger.gathers.get(job.gather)
        if gather is None or gather.live:
            return False
        new = PayloadRef(PayloadId(f"b3-m{job.number}.{job.round + 1}"), job.model_bytes)
        extra = PayloadRef(PayloadId(f"b3-s{job.number}.{job.round + 1}"), UNIT) if state else None
        if not self.own(job, new) or (extra is not None and not self.own(job, extra)):
            return False
        message = Commit(job.peer.ref(), job.id, job.owner["claim"], job.round, new, extra, best=best)

        def effect() -> None:
            self.drop(f"put:{job.id}")
            self.drop(f"part:{job.id}")
            job.round += 1
            job.gather = ""

        self.act(point, lambda: job.peer.send(message), effect)
        return True

    @precondition(lambda self: self.jobs)
    @rule(at=st.integers(0, 1), point=CRASH)
    def a_job_ends(self, at: int, point: str) -> None:
        job = self.job_at(at)
        message = EndJob(job.peer.ref(), job.id, job.owner["claim"], "FINISHED:COMPLETED")
        self.act(point, lambda: job.peer.send(message))

    # ------------------------------------------------------------ rules: what goes wrong

    @rule(keep=st.booleans())
    def the_executors_come_back(self, keep: bool) -> None:
        """Without ``keep`` with nothing: their tasks are given out again, as the next attempts."""
        held = tuple(ref for _, ref, _ in self.tasks.values()) if keep else ()
        self.act("", lambda: self.pool.connect(held=held))

    @precondition(lambda self: self.state.payloads.rows)
    @rule(at=st.integers(0, 30), short=st.booleans())
    def a_file_is_lost(self, at: int, short: bool) -> None:
        """The disk forgot a payload, or its end, over a restart: whatever needed it is healed or failed."""
        ids = sorted(self.state.payloads.rows)
        payload = ids[at % len(ids)]
        path = self.state.spool.path(payload)
        if short and path.stat().st_size:
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.unlink()
        for holder, held in self.held().items():
            if payload in held and holder not in self.loose:
                self.lost.add((holder, payload))
            elif payload in held:
                self.drop(holder, payload)
        self.restart()
        for job in self.jobs:
            if (gather := self.state.ledger.gathers.get(job.gather)) is not None and gather.blocked:
                job.gather = ""

    @rule(seconds=st.sampled_from((5.0, 700.0, OLD_S)))
    def time_passes(self, seconds: float) -> None:
        step = max(1.0, seconds / 20)
        self.world.pass_time(seconds, step)
        for holder in [h for h in self.loose if h == "submit" or h.startswith("part:")]:
            kept = self.state.payloads.held_by(holder)
            for payload, at in list(self.loose[holder].items()):
                age = self.world.now - at
                if payload not in kept:
                    assert age > SUBMIT_KEEP_S, "a client's payload, or a partial, is kept for an hour"
                    self.drop(holder, payload)
                else:
                    assert age <= SUBMIT_KEEP_S + step + 60.0, "and not for longer"
        if seconds > 600:
            for coming in list(self.coming.values()):
                coming.admitted = False
        self.catch_up()

    # ------------------------------------------------------------ what always holds

    def held(self) -> dict[str, set[str]]:
        """Who should hold what."""
        out: dict[str, set[str]] = {holder: set(held) for holder, held in self.loose.items() if held}
        for job in self.state.jobs.jobs.values():
            out[f"job:{job.id}"] = {job.archive.id}
            if job.commit is not None:
                out[f"commit:{job.id}"] = {ref.id for ref in (job.commit.model, job.commit.state) if ref}
                out[f"best:{job.id}"] = {job.commit.best.id} if job.commit.best else set()
        for gather in self.state.ledger.gathers.values():
            held = {ref.id for ref in (gather.spec.payload, gather.spec.fold) if ref}
            for result in gather.results[gather.covered :]:
                ref = gather.partials[result.partial].payload if result.partial else result.payload
                held.add(ref.id)
            out[f"gather:{gather.id}"] = held
            out[f"checkpoint:{gather.id}"] = {gather.checkpoint.id} if gather.checkpoint else set()
        return {holder: held for holder, held in out.items() if held}

    @invariant()
    def a_payload_lives_while_somebody_holds_it(self) -> None:
        table = self.state.payloads
        expected = self.held()
        actual: dict[str, set[str]] = {}
        for payload, holders in table.holds.items():
            assert holders, f"{payload} is held by nobody"
            for holder in holders:
                actual.setdefault(holder, set()).add(payload)
        for holder, payload in self.lost:
            gather = self.state.ledger.gathers.get(holder.removeprefix("gather:"))
            if gather is None or gather.blocked:  # else it was put again, and the gather opened with it
                expected.get(holder, set()).discard(payload)
        assert actual == {holder: held for holder, held in expected.items() if held}

    @invariant()
    def files_are_rows(self) -> None:
        rows = {row.id: row.size for row in self.state.payloads.rows.values()}
        files = {path.name: path.stat().st_size for path in self.state.spool._payload_files()}
        assert {name: size for name, size in files.items() if name not in self.landed or name in rows} == rows
        assert self.state.payloads.used_bytes == sum(rows.values())

    @invariant()
    def the_quota_holds(self) -> None:
        quota = self.state.quota
        admitted = {c.ref.id: c.ref.size for c in self.coming.values() if c.admitted}
        assert {a.payload.id: a.payload.size for a in quota.admitted.values()} == admitted
        assert quota.used == self.state.payloads.used_bytes + sum(admitted.values())
        assert quota.used <= self.total
        assert quota.used + quota.reserved <= self.total, "what is kept for the running jobs can be had"

    # ------------------------------------------------------------ the end

    def end_fairly(self) -> None:
        """Every job comes to its end, however full the spool is, and what waited gets in."""
        self.time_passes(OLD_S)
        for _ in range(3):
            for job in list(self.jobs):
                self.finish_round(job)
        for _ in list(self.jobs):
            self.a_job_ends(0, "")
        assert not self.jobs
        self.time_passes(700.0)  # turns that nobody asks for any more are given on
        for coming in list(self.coming.values()):
            room = self.total - self.state.quota.used
            answered = self.ask(coming.ref, coming.owner)
            assert answered is None or coming.admitted == (coming.ref.size <= room), "it waited, and there is room"
            if answered is not None and not coming.admitted:
                break  # those behind it wait for it
        self.files_are_rows()

    def check(self) -> None:
        """The invariants, in between."""
        self.a_payload_lives_while_somebody_holds_it()
        self.files_are_rows()
        self.the_quota_holds()

    def finish_round(self, job: JobSide) -> None:
        """Its results come, checkpoints where there is no room for them, and the commit; within a bounded time."""
        for _ in range(40):
            self.check()
            point, best = self.last, job.round % 2 == 0
            if job not in self.jobs or (done := self.commit(job, best, False, point)):
                self.last = "" if job in self.jobs and done else point
                self.check()
                return
            gather = self.state.ledger.gathers.get(job.gather)
            if gather is None:
                if not self.started(job):
                    return
                continue
            before = len(gather.results)
            self.results_come(gather.id)
            gather = self.state.ledger.gathers.get(job.gather, gather)  # another object after a crash
            stuck = len(gather.results) == before
            if stuck and gather.live:  # the others' processes see as well that uploads wait
                for other in [other for other in self.jobs if other is not job]:
                    self.results_come(other.gather)
                    self.checkpoint(other)
            if (stuck or job.round % 2) and not self.checkpoint(job) and stuck and gather.live:
                self.world.pass_time(1.0)
                self.catch_up()
        raise AssertionError("a running job cannot go on")

    def results_come(self, gather: str) -> None:
        """One by one, or all as one partial where the gather takes those."""
        mine = [assign for assign, _, _ in self.tasks.values() if assign.gather == gather]
        if self.folding and mine and mine[0].partials:
            self.partial(gather)
            return
        for tid in [tid for tid, task in self.tasks.items() if task[0].gather == gather]:
            for _ in range(2):
                if tid in self.tasks:
                    self.a_result(list(self.tasks).index(tid), True, "")

    def started(self, job: JobSide) -> bool:
        """Open the job's round; False where the quota has no room for a model more (beside another job's)."""
        self.a_round_opens(self.jobs.index(job), "")
        return bool(job.gather)


SHORT = short(45, 40, suppress_health_check=[HealthCheck.too_slow])

TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = SHORT


@pytest.mark.proof
@pytest.mark.timeout(1500)
def test_many_spools() -> None:
    """The long form."""
    run_state_machine_as_test(SpoolMachine, settings=long(600, 60, SHORT))
