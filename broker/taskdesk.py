"""What executors ask and are told: leases, results, failures, and the tasks they are given."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ..serialization.codec import CodecError, check_plain, pack
from ..serialization.messages import (
    Accept,
    Assign,
    AssignItem,
    Cancel,
    Decline,
    Done,
    Fail,
    GatherId,
    JobId,
    PayloadId,
    Progress,
    Refusal,
    Stored,
    TaskId,
    TaskRef,
)
from .gathers import Gather, Task
from .sessions import Session
from .settle import settle
from .state import BODY_BUDGET, BrokerState, batches, weigh

__all__ = ["TaskDesk"]

_MAX_CANCELS = 256
_SLICE = 256
#: References that fit into one message, each of up to 100 bytes.
_MAX_REFS = 256
#: What one item takes in a message: keys and numbers, a task id, and text of at most four bytes a character.
_ITEM_BYTES = 200
_TOLD_ENDED = 64
#: A round's record holds a result's metrics deeper than its Done does, inside of a commit.
_RECORD_DEPTH = 6


class TaskDesk:
    """Between executors' sessions and the ledger."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._ended: list[JobId] = []
        self.more = False  #: whether `pump` has left something for the next turn

    def recover(self) -> None:
        """After a restart: the jobs that ended last, so that executors that missed it are told."""
        ended = [job for job in self._state.jobs.jobs.values() if job.ended]
        ended.sort(key=lambda job: job.ended_at or 0.0)
        self._ended = [job.id for job in ended[-_TOLD_ENDED:]]

    # ------------------------------------------------------------ sessions

    def arrived(self, session: Session, held: list[TaskRef], now: float) -> None:
        """An executor said Hello: its sites are up, the leases it holds go on, those it does not hold are given on."""
        ledger = self._state.ledger
        ledger.owner_up(session.node, session.sites, session.hello.capacity, now)
        ledger.adopt(session.node, held, now)
        for job in self._ended[-_TOLD_ENDED:]:
            self._state.reply(session, Cancel(job, reason="the job has ended", ended=True))

    def gone(self, session: Session, now: float, *, polite: bool) -> None:
        """An executor's session is over."""
        self._state.ledger.owner_gone(session.node, now, polite=polite)

    def job_ended(self, job: JobId, reason: str) -> None:
        """Tell every executor that the job is over: its scripts may stop and its files may go."""
        self._ended = [*self._ended[-_TOLD_ENDED:], job]
        for session in self._state.sessions.by_id.values():
            if session.role == "executor":
                self._state.reply(session, Cancel(job, reason=reason[:512], ended=True))

    # ------------------------------------------------------------ messages

    def accept(self, session: Session, message: Accept, now: float) -> None:
        """Work on these has begun."""
        self._state.ledger.accept(session.node, message.tasks, now)

    def progress(self, session: Session, message: Progress) -> None:
        """A task moves: shown to whoever watches. The lease is renewed by any traffic."""
        task = self._state.ledger.current(session.node, TaskRef(message.task, message.attempt))
        if task is not None:
            self._state.ledger.moved(task, message.done)

    def decline(self, session: Session, message: Decline, now: float) -> None:
        """These will not be worked on."""
        self._state.ledger.decline(session.node, message.tasks, message.retry_after_s, now)

    def fail(self, session: Session, message: Fail, now: float) -> None:
        """An attempt failed. Answered with Stored, so that the executor may stop repeating it."""
        ref = TaskRef(message.task, message.attempt)
        if self._state.ledger.fail(session.node, message, now):
            self._state.counters["failed.killed" if message.killed else "failed"] += 1
            self._state.payloads.release_all(f"task:{message.task}")
        self._state.reply(session, Stored(tasks=(ref,)))

    def done(self, session: Session, message: Done, tail: bytes, now: float) -> None:
        """Results. Answered with Stored: what is committed, and what was refused and why.

        Raises:
            CodecError: sizes that do not add up.
        """
        state = self._state
        unfit = "" if self._all_fit(message) else next((t for i in message.items if (t := self._unfit(i.meta))), "")
        if unfit:
            self._refuse_all(session, message, unfit, now)
            return
        try:
            outcome = settle(state.ledger, session.node, message, tail, state.payloads.has, now)
        except CodecError:
            state.counters["done.malformed"] += 1
            raise
        keep: set[PayloadId] = set(outcome.kept)
        for payload in outcome.kept:
            state.payloads.hold(payload, f"gather:{message.gather}", now)
        for ref in outcome.stored:
            state.payloads.release_all(f"task:{ref.task}")
        for item in message.items:
            if item.payload is not None and item.payload.id in outcome.unused and self._mine(session, item.task):
                # only its own: another attempt's result may wait for its Done under the same holder
                state.payloads.release(item.payload.id, f"task:{item.task}")
        for payload in [*outcome.unused, *keep]:
            state.payloads.release(payload, f"part:{message.job}")
        recorded = [r for r in outcome.refused if r.code != "conflict"]
        round_ = state.late(message.job, message.gather, sum(not r.requeued for r in recorded))
        for refusal in outcome.refused:
            state.counters[f"refused.{refusal.code}"] += 1
        served = state.sessions.by_site
        sites = {item.task: item.site for item in message.items if served.get(item.site) is session} if recorded else {}
        for refusal in recorded:
            site = sites.get(refusal.task, "")
            data = {"task": refusal.task, "attempt": refusal.attempt, "code": refusal.code, "round": round_}
            state.event(message.job, "result_refused", now, site=site, text=refusal.reason, data=data)
        self._stored(session, outcome.stored, outcome.refused)

    def _all_fit(self, message: Done) -> bool:
        """Whether the metadata of all items together fits: then each does, which needs no look of its own."""
        metas = [item.meta for item in message.items if item.meta]
        try:
            check_plain(metas, _RECORD_DEPTH - 1)
        except CodecError:
            return False
        return len(pack(metas)) <= self._state.settings.max_result_meta_bytes

    def _unfit(self, meta: dict[str, Any]) -> str:
        """Why no message to the job, and no record of its round, can hold a result's metadata; "" where they can."""
        if not meta:
            return ""
        most = self._state.settings.max_result_meta_bytes
        if len(pack(meta)) > most:  # what comes in must fit into the message that goes on, with its number
            self._state.bounds.reached("max_result_meta_bytes")
            return f"the result's metadata is over {most} bytes (max_result_meta_bytes): put large values into params"
        try:
            check_plain(meta, _RECORD_DEPTH)
        except CodecError as error:
            return f"the result's metadata: {error}"
        return ""

    def _refuse_all(self, session: Session, message: Done, text: str, now: float) -> None:
        """Results whose metadata does not fit are their tasks' failures, and so said."""
        refused: list[Refusal] = []
        for item in message.items:
            if self._state.ledger.fail(session.node, Fail(item.task, item.attempt, "too_large", text), now):
                self._state.payloads.release_all(f"task:{item.task}")
            refused.append(Refusal(item.task, item.attempt, "too_large", text))
        self._stored(session, [], refused)

    def _mine(self, session: Session, task_id: str) -> bool:
        """Whether a task is not another executor's now, whose payload may wait for its Done."""
        task = self._state.ledger.tasks.get(TaskId(task_id))
        return task is None or task.ended or task.owner == session.node

    def _stored(self, session: Session, stored: list[TaskRef], refused: list[Refusal]) -> None:
        for start in range(0, len(stored), _MAX_REFS):
            self._state.reply(session, Stored(tasks=tuple(stored[start : start + _MAX_REFS])))
        for refusals in batches(refused, weigh):
            self._state.reply(session, Stored(refused=refusals))

    # ------------------------------------------------------------ what executors are told

    def pump(self, now: float) -> None:
        """Lease queued tasks to executors with room, and tell owners of attempts that are stale."""
        self._cancel()
        self.more = False
        ledger = self._state.ledger
        for node in list(ledger.eager):
            owner = ledger.owners.get(node)
            if owner is None or not owner.ready:
                del ledger.eager[node]
                continue
            if owner.room <= 0:
                continue
            session = self._state.sessions.by_node.get(node)
            if session is None or session.lost_at is not None or not session.room:
                continue
            messages = 0
            while messages < session.timing.outbox_messages // 4 and (tasks := ledger.assign(node, _SLICE, now)):
                messages += self._give(session, tasks)
                if not owner.ready:
                    break
            self.more = self.more or bool(owner.ready and owner.room > 0)

    def _give(self, session: Session, tasks: list[Task]) -> int:
        """Send freshly leased tasks; the number of messages."""
        by_gather: defaultdict[GatherId, list[Task]] = defaultdict(list)
        for task in tasks:
            by_gather[task.gather].append(task)
            if task.attempt > 1:  # what an attempt before this one has uploaded will never be settled
                self._state.payloads.release_all(f"task:{task.id}")
                if self._state.quota.forget(tasks=frozenset((task.id,))):
                    self._state.abandoned.add(task.id)
        return sum(self._assign(session, self._state.ledger.gathers[gid], some) for gid, some in by_gather.items())

    def _assign(self, session: Session, gather: Gather, tasks: list[Task]) -> int:
        state, spec = self._state, gather.spec
        job = state.jobs.jobs.get(gather.job)
        messages = 0
        tail = (state.small(spec.payload) if spec.payload else None) or b""
        items = [
            AssignItem(
                t.id, t.attempt, t.site, state=t.base, settled=state.ledger.site_state(gather.job, t.site).settled
            )
            for t in tasks
        ]
        for part in batches(
            items,
            lambda i: _ITEM_BYTES + len(f"{i.site}{i.state}".encode()),
            max(1024, BODY_BUDGET - len(pack(spec.config))),
        ):
            message = Assign(
                job=gather.job, gather=gather.id, round=spec.round, step=spec.step, name=spec.name, items=part,
                lease_s=spec.lease_s, archive=job.archive if job else None, payload=spec.payload, fold=spec.fold,
                config=spec.config, partials=spec.partials, seed=spec.seed, redo=spec.redo,
            )  # fmt: skip
            state.reply(session, message, tail)
            messages += 1
        return messages

    def _cancel(self) -> None:
        ledger = self._state.ledger
        if not ledger.cancels:
            return
        groups: defaultdict[tuple[str, JobId], list[TaskRef]] = defaultdict(list)
        for node, job, ref in ledger.cancels:
            groups[node, job].append(ref)
        ledger.cancels.clear()
        for (node, job), refs in groups.items():
            session = self._state.sessions.by_node.get(node)
            if session is not None:
                for start in range(0, len(refs), _MAX_CANCELS):
                    part = tuple(refs[start : start + _MAX_CANCELS])
                    self._state.reply(session, Cancel(job, part, "not wanted any more"))
