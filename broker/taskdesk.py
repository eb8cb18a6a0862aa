"""What executors ask and are told: leases, results, failures, and the tasks they are given."""

from __future__ import annotations

from collections import defaultdict

from ..serialization.codec import CodecError, pack
from ..serialization.messages import (
    Accept,
    Assign,
    AssignItem,
    Cancel,
    Decline,
    Done,
    Fail,
    JobId,
    PayloadId,
    Progress,
    Refusal,
    Stored,
    TaskRef,
)
from .gathers import Gather, Task
from .sessions import Session
from .settle import settle
from .state import BODY_BUDGET, BrokerState, batches, weigh

__all__ = ["TaskDesk"]

_MAX_CANCELS = 256
_TOLD_ENDED = 64


class TaskDesk:
    """Between executors' sessions and the ledger."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._ended: list[JobId] = []

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
            task.progress = message.done

    def decline(self, session: Session, message: Decline, now: float) -> None:
        """These will not be worked on."""
        self._state.ledger.decline(session.node, message.tasks, message.retry_after_s, now)

    def fail(self, session: Session, message: Fail, now: float) -> None:
        """An attempt failed. Answered with Stored, so that the executor may stop repeating it."""
        ref = TaskRef(message.task, message.attempt)
        if self._state.ledger.fail(session.node, message, now):
            self._state.payloads.release_all(f"task:{message.task}")
        self._state.reply(session, Stored(tasks=(ref,)))

    def done(self, session: Session, message: Done, tail: bytes, now: float) -> None:
        """Results. Answered with Stored: what is committed, and what was refused and why.

        Raises:
            CodecError: sizes that do not add up.
        """
        state = self._state
        try:
            outcome = settle(state.ledger, session.node, message, tail, state.payloads.has, now)
        except CodecError:
            state.counters["done.malformed"] += 1
            raise
        keep: set[PayloadId] = set(outcome.kept)
        for payload in outcome.kept:
            state.payloads.hold(payload, f"gather:{message.gather}", now)
        for item in message.items:
            state.payloads.release_all(f"task:{item.task}")
        for payload in [*outcome.unused, *keep]:
            state.payloads.release(payload, f"put:{message.job}")
        for refusal in outcome.refused:
            state.counters[f"refused.{refusal.code}"] += 1
            if refusal.code != "conflict":
                site = next((i.site for i in message.items if i.task == refusal.task), "")
                data = {"task": refusal.task, "attempt": refusal.attempt, "code": refusal.code}
                state.event(message.job, "result_refused", now, site=site, text=refusal.reason, data=data)
        self._stored(session, outcome.stored, outcome.refused)

    def _stored(self, session: Session, stored: list[TaskRef], refused: list[Refusal]) -> None:
        for tasks in batches(stored, weigh):
            self._state.reply(session, Stored(tasks=tasks))
        for refusals in batches(refused, weigh):
            self._state.reply(session, Stored(refused=refusals))

    # ------------------------------------------------------------ what executors are told

    def pump(self, now: float) -> None:
        """Lease queued tasks to executors with room, and tell owners of attempts that are stale."""
        self._cancel()
        ledger = self._state.ledger
        for node, owner in ledger.owners.items():
            if not owner.ready or owner.room <= 0:
                continue
            session = self._state.sessions.by_node.get(node)
            if session is None or session.lost_at is not None or not session.room:
                continue
            by_gather: defaultdict[str, list[Task]] = defaultdict(list)
            for task in ledger.assign(node, owner.room, now):
                by_gather[task.gather].append(task)
                if task.attempt > 1:  # what an attempt before this one has uploaded will never be settled
                    self._state.payloads.release_all(f"task:{task.id}")
            for tasks in by_gather.values():
                self._assign(session, ledger.gathers[tasks[0].gather], tasks)

    def _assign(self, session: Session, gather: Gather, tasks: list[Task]) -> None:
        state, spec = self._state, gather.spec
        job = state.jobs.jobs.get(gather.job)
        tail = (state.small(spec.payload) if spec.payload else None) or b""
        items = [
            AssignItem(
                t.id, t.attempt, t.site, state=t.base, settled=state.ledger.site_state(gather.job, t.site).settled
            )
            for t in tasks
        ]
        for part in batches(items, weigh, max(1024, BODY_BUDGET - len(pack(spec.config)))):
            message = Assign(
                job=gather.job, gather=gather.id, round=spec.round, step=spec.step, name=spec.name, items=part,
                lease_s=spec.lease_s, archive=job.archive if job else None, payload=spec.payload, fold=spec.fold,
                config=spec.config, partials=spec.partials, seed=spec.seed,
            )  # fmt: skip
            state.reply(session, message, tail)

    def _cancel(self) -> None:
        ledger = self._state.ledger
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
