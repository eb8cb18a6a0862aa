"""Payloads as the control process sees them: small ones come whole, large ones are admitted and reported by the data
process, and a row is journaled before anybody hears that a payload is stored."""

from __future__ import annotations

import time

from ..serialization.digest import digest_buffers
from ..serialization.errors import FaultError, FencedError, PayloadError
from ..serialization.faultpoints import fault_point
from ..serialization.messages import INLINE_BYTES, Abort, Get, Grant, Message, PayloadRef, Put, Stored
from .sessions import Session
from .state import BrokerState

__all__ = ["PayloadDesk"]

_LANDED = "landed"
#: Refusals that are about who asks: the payload may still come from another.
_ASKERS = ("forbidden", "payload_id")
_RETRY_S = 1.0
#: An upload that was admitted and not written to for so long has no room kept any more.
_IDLE_S = 600.0


class PayloadDesk:
    """Admits payloads and journals their rows."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state

    def put(self, session: Session, message: Put, tail: bytes, now: float) -> None:
        """A whole small payload on the control link.

        Raises:
            FaultError: too large, another payload of that id, a digest that does not hold, a stale attempt.
        """
        ref = message.payload
        self._check_own(session, message)
        if not self._state.payloads.has(ref):
            if ref.size > INLINE_BYTES or len(tail) != ref.size:
                raise FaultError(
                    "size", f"{len(tail)} bytes for payload {ref.id} of {ref.size}; at most {INLINE_BYTES} come whole,"
                    " larger ones on the data link"
                )  # fmt: skip
            digest = digest_buffers([tail])
            if (ref.digest and ref.digest != digest) or (ref.id.startswith("b3-") and ref.id != f"b3-{digest}"):
                raise FaultError("digest", f"payload {ref.id} arrived damaged: its digest is {digest}")
            holder = self._holder(message, session.role)
            quota = self._state.quota
            if session.role != "job" and quota.total and ref.size > quota.spare:
                quota.refused += 1
                text = (
                    f"{quota.used} bytes of the spool's quota of {quota.total} (quota_bytes) are taken: try again later"
                )
                raise FaultError("quota", text, bound="quota_bytes")
            ref = PayloadRef(ref.id, ref.size, digest, ref.type)
            try:
                self._state.spool.store(ref.id, [tail])
            except PayloadError as error:
                raise FaultError("payload_id", str(error)) from None
            fault_point("control.after_file_before_row")
            self._state.payloads.add(ref, holder, now)
            quota.landed(ref.id)
        else:
            self._state.payloads.hold(ref.id, self._holder(message, session.role), now)
        self._state.reply(session, Stored(message.stream, message.ref, self._state.payloads.rows[ref.id]))

    def get(self, session: Session, message: Get) -> None:
        """A small payload's bytes on the control link.

        Raises:
            FaultError: ``unknown_payload``, or ``size`` where it must be streamed.
        """
        row = self._state.payloads.rows.get(message.payload)
        if row is None:
            raise FaultError("unknown_payload", f"payload {message.payload} is not here")
        data = self._state.small(row)
        if data is None:
            raise FaultError("size", f"payload {row.id} has {row.size} bytes: get it on the data link")
        self._state.reply(session, Stored(message.stream, message.ref, row), data)

    def from_data(self, message: Put, now: float, session_id: str = "") -> Message | None:
        """The data process asks whether a payload may come, or says that it has landed; the answer goes to it.

        Args:
            session_id: whose payload it is, when it asks.
        """
        ref = message.payload
        payloads = self._state.payloads
        session = self._state.sessions.by_id.get(session_id)
        try:
            if session is not None:
                self._check_own(session, message)
            elif session_id:
                return Abort(message.stream, "session", "the session of this Put is over: say Hello again", _RETRY_S)
            if payloads.has(ref):
                payloads.hold(ref.id, self._holder(message, "executor" if message.task else ""), now)
                return Stored(message.stream, payload=payloads.rows[ref.id])
            known = payloads.rows.get(ref.id)
            if known is not None:
                return Abort(message.stream, "conflict", f"payload {ref.id} is here with {known.size} bytes")
            holder = self._holder(message, "")
            if message.local != _LANDED:
                own = bool(message.claim) and not message.task
                wait_s = self._state.quota.admit(ref, now, job=message.job, task=message.task, own=own)
                if wait_s is not None:
                    quota = self._state.quota
                    text = f"{quota.used} bytes of the spool's quota of {quota.total} are taken: wait for your turn"
                    return Abort(message.stream, "quota", text, wait_s)
                return Grant(message.stream, 0, 0, 0)
            if not self._state.spool.exists(ref.id, ref.size):
                return Abort(message.stream, "lost", f"payload {ref.id} is not in the spool: put it again", 0.1)
        except (FaultError, PayloadError) as error:
            code = error.code if isinstance(error, FaultError) else "payload_id"
            self._state.counters[f"put.{code}"] += 1
            if isinstance(error, FaultError) and error.bound:
                self._state.bounds.reached(error.bound)
            if code not in _ASKERS:
                self._state.quota.refuse(ref.id)
            return Abort(message.stream, code, str(error)[:1024])
        payloads.add(ref, holder, now)
        self._state.quota.landed(ref.id)
        return Stored(message.stream, payload=ref)

    def expire_admissions(self, now: float) -> None:
        """Uploads that were begun and left: their bytes are given to others."""
        state = self._state
        for payload, admission in list(state.quota.admitted.items()):
            if now - admission.at < _IDLE_S:
                continue
            written = state.spool.incoming_since(payload)
            if written is not None and time.time() - written < _IDLE_S:
                continue
            state.quota.refuse(payload)
            if written is not None:
                state.abandoned.add(payload)

    def _check_own(self, session: Session, message: Put) -> None:
        """Only an attempt's owner puts its result, only a claim's process puts for its job; ids are not forged.

        Raises:
            FaultError: ``forbidden``, ``payload_id``.
        """
        ref = message.payload
        if ref.id.startswith("r-") and ref.id != f"r-{message.task}.{message.attempt}":
            raise FaultError("payload_id", f"payload id {ref.id} is kept for the result of that attempt")
        if message.task:
            task = self._state.ledger.tasks.get(message.task)
            current = task is not None and task.attempt == message.attempt and not task.ended
            if session.role != "executor" or (current and task is not None and task.owner != session.node):
                raise FaultError("forbidden", f"{session.node} does not work on task {message.task}")
        elif message.claim:
            self._state.jobs.get(message.job)
            if (session.hello.job, session.hello.claim) != (message.job, message.claim):
                raise FaultError("forbidden", f"{session.node} does not run job {message.job} under {message.claim}")
        elif message.job and session.role != "executor":
            raise FaultError("forbidden", f"a {session.role} puts a job's payload under its claim, or without a job")

    def _holder(self, message: Put, role: str) -> str:
        """Who holds a payload until it is used.

        Raises:
            FaultError: the attempt or the claim that it belongs to is not current.
        """
        if message.task:
            task = self._state.ledger.tasks.get(message.task)
            if task is None or (task.ended and task.status != "done"):
                raise FaultError("closed", f"task {message.task} is over: its result is not wanted")
            if task.attempt != message.attempt:
                raise FaultError(
                    "stale", f"attempt {message.attempt} of task {message.task}: {task.attempt} is current"
                )
            if task.status == "done":
                return f"gather:{task.gather}" if self._is_result(message) else self._refuse_late(message)
            return f"task:{message.task}"
        if message.claim:
            job = self._state.jobs.check(message.job, message.claim)
            return f"put:{job.id}"
        if message.job:
            job = self._state.jobs.get(message.job)
            if job.ended:
                raise FencedError("closed", f"job {job.id} is {job.status}")
            return f"part:{job.id}"
        if role == "executor":
            raise FaultError("job", "a payload of an executor names its job")
        return "submit"

    def _is_result(self, message: Put) -> bool:
        task = self._state.ledger.tasks[message.task]
        gather = self._state.ledger.gathers[task.gather]
        return any(r.task == task.id and r.payload and r.payload.id == message.payload.id for r in gather.results)

    @staticmethod
    def _refuse_late(message: Put) -> str:
        raise FaultError("late", f"task {message.task} has its result")
