"""What clients, controllers and job processes ask: submissions, claims, gathers, checkpoints, commits, the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import structlog

from ..serialization.codec import CodecError, check_plain, encode_fields, pack, show, unpack
from ..serialization.envelope import MAX_TAIL_BYTES
from ..serialization.errors import FaultError
from ..serialization.messages import (
    Answer,
    Cancel,
    Checkpoint,
    Claimed,
    ClaimJob,
    CloseGather,
    Commit,
    CommitRef,
    EndJob,
    Event,
    JobId,
    OpenGather,
    SubmitJob,
)
from ..serialization.vocabulary import FOLDER
from .jobs import Job
from .letters import LETTER_KINDS
from .quota import Needs
from .sessions import Session
from .state import BODY_BUDGET, BrokerState
from .streams import Streams, receipt

__all__ = ["JobDesk", "names_in"]

log = structlog.get_logger(__name__)

_FOLDER = re.compile(FOLDER)

#: What users give goes on to others inside of lists and maps, where it must not be nested too deep.
_SPARE_DEPTH = 4


class JobDesk:
    """Between clients', controllers' and job processes' sessions and the tables."""

    def __init__(self, state: BrokerState, streams: Streams, ended: Callable[[JobId, str], None]) -> None:
        self._state = state
        self._streams = streams
        self._ended = ended  # tells the executors
        self._waiting: dict[str, int] = {}  # controllers that wait for a job: session, ref
        self._refused: dict[str, int] = {}  # the last Commit that a session was refused: its ref

    # ------------------------------------------------------------ submissions and claims

    def submit(self, session: Session, message: SubmitJob, now: float) -> None:
        """A new job, whose archive was put before."""
        state = self._state
        if not state.jobs.knows(message.token):
            state.require(message.archive)
            check_plain(message.meta, _SPARE_DEPTH)
            size = message.meta.get("model_bytes", 0)
            if isinstance(size, int) and size > 0:
                state.quota.check_fit(message.archive.size, Needs.of(dict(message.meta), size))
            self._check_bytes("meta of a submission", message.meta, "max_meta_bytes")
            state.check_journal()
        job, fresh = state.jobs.submit(message, now)
        if fresh:
            state.payloads.hold(job.archive.id, f"job:{job.id}", now)
            self._hold_commit(job, now)
            state.payloads.release(job.archive.id, "submit")
            self._forget_oldest()
            state.event(
                job.id, "submitted", now, text=job.name, data={"start": message.start} if message.start else None
            )
            log.info("job_submitted", job=job.id, name=job.name, start=message.start or None)
        state.reply(
            session, Answer(message.ref, {"job_id": job.id, "round": job.commit.round + 1 if job.commit else 0})
        )

    def _forget_oldest(self) -> None:
        """Room for a new job: the records, models and events of those that ended first go."""
        state = self._state
        for job in state.jobs.forget_oldest():
            state.bounds.reached("max_jobs")
            for holder in ("job", "commit", "best"):
                state.payloads.release_all(f"{holder}:{job.id}")
            log.info("job_forgotten", job=job.id, ended_at=job.ended_at)

    def claim(self, session: Session, message: ClaimJob, now: float) -> None:
        """A controller wants a job, or says that its job's process died; a job process wants to know its job."""
        state = self._state
        if session.role == "job":
            job = state.jobs.check(message.job, message.claim)
            if job.id != session.hello.job:
                raise FaultError("forbidden", f"this process runs job {session.hello.job}, not {job.id}")
            state.reply(session, claimed(job, message.ref))
        elif message.lost:
            held = state.jobs.get(message.job)
            if message.claim == held.claim and session.node != held.claimed_by[0]:
                raise FaultError("forbidden", f"claim {held.claim} to job {held.id} was not given to {session.node}")
            job = state.jobs.lost(message.job, message.claim, message.lost, now, stopped=message.stopped)
            state.event(job.id, "process_lost", now, text=message.lost, data={"claim": message.claim})
            if job.ended:
                state.bounds.reached(
                    "max_crashes", message.claim == job.claim and job.crashes >= state.jobs.max_crashes
                )
                self.finished(job, now)
            if message.ref:
                state.reply(session, Answer(message.ref, {"status": job.status}))
        elif (given := state.jobs.given(session.node, session.hello.boot, message.ref)) is not None:
            state.reply(session, claimed(given, message.ref))
        else:
            self._waiting[session.id] = message.ref

    def gone(self, session: Session, now: float) -> None:
        """A job's or a controller's session is over."""
        self._waiting.pop(session.id, None)
        self._refused.pop(session.id, None)
        self._streams.drop(session)
        if session.role == "job":
            self._state.jobs.session_down(session.hello.job, session.hello.claim, now)
        elif session.role == "controller":
            self._state.jobs.controller_gone(session.node, now)

    def unsent(self, session: Session, message: Claimed, now: float) -> None:
        """A Claimed never left: the claim lapses at once."""
        job = self._state.jobs.jobs.get(message.job)
        if session.role == "controller" and job is not None and job.claim == message.claim and not job.live:
            job.claim_until = now

    def pump(self, now: float) -> None:
        """Give jobs to the controllers that wait for one."""
        if not self._waiting or not self._state.jobs.tick(now):
            return
        for session_id, ref in list(self._waiting.items()):
            session = self._state.sessions.by_id.get(session_id)
            if session is None or session.lost_at is not None:
                continue
            job = self._state.jobs.claim(session.node, session.hello.boot, ref, now)
            if job is None:
                return
            del self._waiting[session_id]
            self._state.payloads.release_all(f"put:{job.id}")
            self._state.event(job.id, "claimed", now, text=session.node, data={"claim": job.claim})
            self._state.reply(session, claimed(job, ref))
            log.info("job_claimed", job=job.id, claim=job.claim, node=session.node)

    # ------------------------------------------------------------ gathers

    def open_gather(self, session: Session, message: OpenGather, tail: bytes, now: float) -> None:
        """Open a gather, or go on with the one of this key behind the results that the process has."""
        state = self._state
        job = self._own(session, message.job, message.claim)
        if message.behind and self._refused.get(session.id) == message.behind:
            text = f"round {message.round} was opened behind a commit that was refused: its model is nobody's"
            raise FaultError("uncommitted", text)
        self._check_bytes("config of a gather", message.config, "max_config_bytes")
        state.require(message.payload, message.fold)
        gather = state.ledger.open(message, names_in(tail, "sites"), now, partials=state.quota.takes_partials(job))
        for payload in gather.payload_ids() if gather.id in state.ledger.dirty_gathers else ():
            state.payloads.hold(payload, f"gather:{gather.id}", now)
        self._streams.open(session, gather, message.ref, message.have)

    def close_gather(self, session: Session, message: CloseGather, now: float) -> None:
        """Close a gather now; answered by its Receipt."""
        self._own(session, message.job, message.claim)
        gather = self._state.ledger.close(message.gather)
        if gather is None or gather.job != message.job:
            raise FaultError("unknown_gather", f"gather {message.gather} is not open: its round is committed")
        self._state.reply(session, receipt(gather, message.ref, gather.state))

    def checkpoint(self, session: Session, message: Checkpoint, now: float) -> None:
        """An aggregate takes the place of the results that it covers, whose payloads go."""
        state = self._state
        self._own(session, message.job, message.claim)
        state.require(message.payload)
        known = state.ledger.gathers.get(message.gather)
        if known is not None and known.job != message.job:
            raise FaultError("forbidden", f"gather {message.gather} is not one of job {message.job}")
        covered = known.covered if known else 0
        gather, before = state.ledger.set_checkpoint(message.gather, message.payload, message.covered)
        state.payloads.hold(message.payload.id, f"checkpoint:{gather.id}", now)
        state.payloads.release(message.payload.id, f"put:{message.job}")
        if before is not None and before.id != message.payload.id:
            state.payloads.release(before.id, f"checkpoint:{gather.id}")
        for result in gather.results[covered : gather.covered]:
            payload = gather.partials[result.partial].payload if result.partial else result.payload
            if payload is not None:
                state.payloads.release(payload.id, f"gather:{gather.id}")
        state.reply(session, Answer(message.ref, {"covered": gather.covered}))

    # ------------------------------------------------------------ rounds and the end

    def commit(self, session: Session, message: Commit, now: float) -> None:
        """A round is durable: its model, state and record become visible, its gathers and the models before go."""
        self._refused[session.id] = message.ref  # as long as this has not gone well
        state = self._state
        job = self._own(session, message.job, message.claim)
        check_plain(message.record, _SPARE_DEPTH)
        last = job.commit
        if last is None or last.round != message.round:
            state.require(message.model, message.state, message.best_model)
        job, _, fresh = state.jobs.commit(message)
        if fresh and (commit := job.commit) is not None:
            self._hold_commit(job, now)
            state.records.append((job.id, job.commits, commit))
            self._release(job, message.round)
            state.event(job.id, "committed", now, data={"round": message.round})
            log.info("round_committed", job=job.id, round=message.round, claim=job.claim)
        del self._refused[session.id]
        state.reply(session, Answer(message.ref, {"round": message.round}))

    def _hold_commit(self, job: Job, now: float) -> None:
        """Keep what a job's last commit names, and let go of what the one before named."""
        commit = job.commit or CommitRef(0)
        payloads = self._state.payloads
        for holder, refs in (
            (f"commit:{job.id}", (commit.model, commit.state)),
            (f"best:{job.id}", (commit.best,)),
        ):
            keep = {ref.id for ref in refs if ref is not None}
            for payload in sorted(keep):
                payloads.hold(payload, holder, now)
            payloads.release_all(holder, keep)

    def end(self, session: Session, message: EndJob, now: float) -> None:
        """The workflow returned or raised."""
        known = self._state.jobs.get(message.job)
        if known.ended and known.claim == message.claim and known.status == message.status:
            self._state.reply(session, Answer(message.ref, {"status": known.status}))
            return
        job = self._own(session, message.job, message.claim)
        self._state.jobs.finish(job, message.status, message.reason, now)
        self.finished(job, now)
        self._state.reply(session, Answer(message.ref, {"status": job.status}))

    def abort(self, job: Job, reason: str, now: float) -> None:
        """Somebody ends a job from outside; its process is told to leave."""
        if job.ended:
            return
        self._state.jobs.finish(job, "FINISHED:ABORTED", reason, now)
        self.finished(job, now)
        for session in self._state.sessions.by_id.values():
            if session.role == "job" and session.hello.job == job.id:
                self._state.reply(session, Cancel(job.id, reason=reason[:512], ended=True))

    def finished(self, job: Job, now: float) -> None:
        """A job has its final status: free what only its rounds needed, tell the executors."""
        self._release(job, None)
        self._state.event(job.id, "ended", now, text=job.reason, data={"status": job.status})
        self._ended(job.id, job.status)
        log.info("job_ended", job=job.id, status=job.status, reason=job.reason[-500:])

    def event(self, session: Session, message: Event, now: float) -> None:
        """Keep somebody's event; while the journal is full it is left out."""
        if self._state.journal_full:
            self._state.bounds.reached("journal_bytes")
            return
        if session.role == "executor" and message.site and message.site not in session.sites:
            raise FaultError("forbidden", f"{session.node} does not serve {message.site}: its events are another's")
        if message.kind in LETTER_KINDS:
            raise FaultError("forbidden", f"events of kind {message.kind} are the broker's own")
        check_plain(message.data, _SPARE_DEPTH)
        self._state.event(message.job, message.kind, now, site=message.site, text=message.text, data=message.data)

    def _release(self, job: Job, up_to_round: int | None) -> None:
        payloads = self._state.payloads
        ledger = self._state.ledger
        for gather in ledger.forget_job(job.id) if up_to_round is None else ledger.release(job.id, up_to_round):
            payloads.release_all(f"gather:{gather.id}")
            payloads.release_all(f"checkpoint:{gather.id}")
            for tid in gather.tasks:
                payloads.release_all(f"task:{tid}")
            self._state.abandoned.update(gather.tasks)
            self._state.quota.forget(tasks=frozenset(gather.tasks))
        payloads.release_all(f"put:{job.id}")
        payloads.release_all(f"part:{job.id}")
        if up_to_round is None:
            self._state.abandoned.update(self._state.quota.forget(job=job.id))

    def _check_bytes(self, what: str, values: dict[str, Any], bound: str) -> None:
        size, most = len(pack(values)), int(getattr(self._state.settings, bound))
        if size > most:
            text = f"{what} of {size} bytes; at most {most} ({bound}): send large values as a payload"
            raise FaultError("too_large", text, bound=bound)

    def _own(self, session: Session, job_id: str, claim: int) -> Job:
        """The job, if this session is its process and the claim is the current one."""
        job = self._state.jobs.check(job_id, claim)
        if session.hello.job != job_id or session.hello.claim != claim:
            raise FaultError("forbidden", f"{session.node} does not run job {job_id} under claim {claim}")
        return job


def claimed(job: Job, ref: int) -> Claimed:
    """What the holder of a claim needs; a commit's record that does not fit is left out (Ask "rounds" has it)."""
    message = Claimed(ref, job.id, job.claim, job.name, job.archive, dict(cast("dict[str, Any]", job.meta)), job.commit)
    if job.commit is not None and len(pack(encode_fields(message))) > BODY_BUDGET:
        message = replace(message, commit=replace(job.commit, record={}))
    return message


def names_in(tail: bytes, key: str) -> tuple[str, ...]:
    """A list of names out of a message's tail.

    Raises:
        CodecError: it is not one.
    """
    if not tail:
        return ()
    values = unpack(tail, max_bytes=MAX_TAIL_BYTES)
    names = cast("dict[str, Any]", values).get(key, []) if isinstance(values, dict) else None
    if not isinstance(names, list):
        raise CodecError(f"the tail has no list {key!r}")
    for name in cast("list[Any]", names):
        if not isinstance(name, str) or not 0 < len(name) <= 256 or not _FOLDER.fullmatch(name):
            # it goes on to others in fields that refuse it, and becomes a folder's name there
            raise CodecError(
                f"{key}: {show(name)} is no name; 1 to 256 characters, no '/', '\\\\' or control, no '.' first"
            )
    return tuple(cast("list[str]", names))
