"""The control process without its sockets: messages in, messages out, one journal transaction a turn in between.

A turn is ``handle`` for each message, ``tick``, ``commit``, then what lies in the sessions' outboxes may be sent.
Nothing that a turn has changed is said to anybody before its commit: answers wait in ``BrokerState.replies``.
"""

from __future__ import annotations

from typing import Any, cast

import structlog

from ..serialization.codec import CodecError, unpack
from ..serialization.envelope import MAX_TAIL_BYTES
from ..serialization.errors import FaultError, FencedError, NondeterministicError, WireError
from ..serialization.faultpoints import fault_point
from ..serialization.messages import (
    Accept,
    Answer,
    Ask,
    Bye,
    Checkpoint,
    Claimed,
    ClaimJob,
    CloseGather,
    Commit,
    Decline,
    Done,
    EndJob,
    Event,
    Fail,
    Get,
    Hello,
    Message,
    OpenGather,
    Packet,
    Ping,
    Pong,
    Progress,
    Put,
    SubmitJob,
    TaskId,
    TaskRef,
)
from .answers import answer
from .bounds import figures_of
from .jobdesk import JobDesk, names_in
from .journal import Journal
from .letters import order, post
from .payloaddesk import PayloadDesk
from .payloads import SUBMIT_KEEP_S
from .recovery import recover
from .sessions import Session
from .spool import Spool
from .state import TRIM_SHARE, BrokerState, Settings
from .streams import Streams
from .strikes import StrikeLimits, Strikes
from .taskdesk import TaskDesk

__all__ = ["ControlCore"]

log = structlog.get_logger(__name__)

#: Faults after which a peer is not to connect again.
_FATAL = frozenset({"name_taken", "unknown_claim", "penalty"})
_EXPIRE_S = 60.0
_SCAN_S = 0.1

_EXECUTOR, _CONTROLLER, _JOB, _CLIENT = "executor", "controller", "job", "client"
#: What follows when one of them is gone without a goodbye.
_NEXT = {
    _EXECUTOR: "its tasks are given out again, unless it comes back with them",
    _CONTROLLER: "its jobs are given to the next controller",
    _JOB: "its claim lapses: the next process goes on from the last commit",
    _CLIENT: "nothing was waiting for it",
}
_ANYONE = frozenset({_EXECUTOR, _CONTROLLER, _JOB, _CLIENT})
#: Who may say what; a message that is not here belongs to the broker's side or to the data link.
ROLES: dict[type[Any], frozenset[str]] = {
    Ping: _ANYONE,
    Bye: _ANYONE,
    Put: _ANYONE,
    Get: _ANYONE,
    Ask: _ANYONE,
    Event: _ANYONE,
    Accept: frozenset({_EXECUTOR}),
    Decline: frozenset({_EXECUTOR}),
    Progress: frozenset({_EXECUTOR}),
    Done: frozenset({_EXECUTOR}),
    Fail: frozenset({_EXECUTOR}),
    SubmitJob: frozenset({_CLIENT}),
    ClaimJob: frozenset({_CONTROLLER, _JOB}),
    OpenGather: frozenset({_JOB}),
    CloseGather: frozenset({_JOB}),
    Checkpoint: frozenset({_JOB}),
    Commit: frozenset({_JOB}),
    EndJob: frozenset({_JOB}),
}


class ControlCore:
    """Dispatch, role checks and the turn.

    Args:
        settings: bounds, times, and what Welcome says.
        journal: the database; read here, once.
        spool: payload files; those without a row are removed here.
        epoch: this broker process's random name.
        now: the time; wall-like and never going back while the process lives.
        seed: of the backoff's jitter, for tests.

    Raises:
        StorageError: the journal or the spool cannot be read.
    """

    def __init__(
        self, settings: Settings, journal: Journal, spool: Spool, epoch: str, now: float, seed: int | None = None
    ) -> None:
        self.state = BrokerState(settings, journal, spool, epoch, seed)
        self.streams = Streams(self.state.ledger, journal)
        self.tasks = TaskDesk(self.state)
        self.jobs = JobDesk(self.state, self.streams, self.tasks.job_ended)
        self.payloads = PayloadDesk(self.state)
        #: connections and node names that sent too much that cannot be read
        self.strikes: Strikes[bytes | str] = Strikes(StrikeLimits(settings.timing.max_strikes))
        #: what may be sent beside the outboxes: to connections without a session, and to the data process
        self.loose: list[tuple[bytes, Message, bytes]] = []
        self.data_out: list[Message] = []
        self._expired_at = now
        self._scanned_at = 0.0
        for job in recover(self.state, now):
            self.jobs.finished(job, now)
        self.tasks.recover()

    # ------------------------------------------------------------ messages

    def handle(self, peer: bytes, packet: Packet, now: float) -> None:
        """A message off the control link. Bad input is answered with a typed fault and never raises."""
        message = packet.message
        session = self.state.sessions.of(peer)
        if session is not None:
            self.state.sessions.heard(session, now)
            self.state.ledger.renew(session.node, now)
            if not isinstance(message, Hello) and not self._in_order(session, packet.sequence, now):
                return
        elif self._boxed(peer, now):
            return
        target = session or peer
        # a session fault is about the link, not about the request: that is repeated in the next session
        ref = cast("int", getattr(message, "ref", 0)) if session is not None else 0
        try:
            if isinstance(message, Hello):
                self._hello(peer, message, bytes(packet.tail), now, packet.sequence)
            elif session is None:
                raise FaultError("session", f"{type(message).__name__} without a session: say Hello first")
            else:
                self._dispatch(session, packet, now)
        except (FencedError, NondeterministicError) as error:
            self.state.fault(target, error, ref, packet.sequence, fatal=True)
        except FaultError as error:
            self.state.fault(target, error, ref, packet.sequence, fatal=error.code in _FATAL)
        except WireError as error:
            self._strike(target, error, ref, packet.sequence, now)

    def _in_order(self, session: Session, sequence: int, now: float) -> bool:
        missing = session.in_order(sequence)
        if missing < 0:
            self.state.counters["repeated"] += 1
        elif missing:
            log.warning("messages_lost", node=session.node, count=missing)
            self.state.fault(session.peer, FaultError("session", f"{missing} messages were lost: say Hello again"))
            self.state.sessions.detach(session, now)
            self.streams.drop(session)
        return not missing

    def malformed(self, peer: bytes, error: WireError, now: float) -> None:
        """Frames that are no message."""
        session = self.state.sessions.of(peer)
        if session is not None or not self._boxed(peer, now):
            self._strike(session or peer, error, 0, 0, now)

    def _boxed(self, peer: bytes, now: float) -> bool:
        """Whether nothing is taken from this connection, which has no session: it gets no answers either."""
        boxed = self.strikes.boxed(peer, now) > 0
        self.state.counters["boxed"] += boxed
        return boxed

    def _strike(self, target: Session | bytes, error: WireError, ref: int, about: int, now: float) -> None:
        session = target if isinstance(target, Session) else None
        node = session.node if session is not None else ""
        log.warning("malformed", node=node, error=str(error)[:500])
        if not self.strikes.strike(node or cast("bytes", target), now):
            self.state.fault(target, FaultError("malformed", str(error)), ref, about)
            return
        limits = self.strikes.limits
        text = f"{error}; {limits.strikes} such messages: nothing more is taken from it for {limits.box_s:g} s"
        log.warning("boxed", node=node, strikes=limits.strikes, box_s=limits.box_s)
        self.state.bounds.reached("max_strikes")
        self.state.fault(session.peer if session else cast("bytes", target), FaultError("malformed", text), ref, about,
                         fatal=True)  # fmt: skip
        if session is not None:
            self.strikes.box(session.peer, now)
            self.end_session(session, now, polite=False)

    def _dispatch(self, session: Session, packet: Packet, now: float) -> None:
        message = packet.message
        if session.role not in ROLES.get(type(message), frozenset()):
            raise FaultError("forbidden", f"a {session.role} may not send {type(message).__name__} on the control link")
        tail = bytes(packet.tail)
        match message:
            case Ping():
                owner = self.state.ledger.owners.get(session.node)
                if owner is not None:
                    owner.report(message.free)
                self.state.reply(session, Pong())
            case Bye():
                self.end_session(session, now, polite=True)
            case Put():
                self.payloads.put(session, message, tail, now)
            case Get():
                self.payloads.get(session, message)
            case Accept():
                self.tasks.accept(session, message, now)
            case Decline():
                self.tasks.decline(session, message, now)
            case Done():
                self.tasks.done(session, message, tail, now)
            case Fail():
                self.tasks.fail(session, message, now)
            case Progress():
                self.tasks.progress(session, message)
            case SubmitJob():
                self.jobs.submit(session, message, now)
            case ClaimJob():
                self.jobs.claim(session, message, now)
            case OpenGather():
                self.jobs.open_gather(session, message, tail, now)
            case CloseGather():
                self.jobs.close_gather(session, message, now)
            case Checkpoint():
                self.jobs.checkpoint(session, message, now)
            case Commit():
                self.jobs.commit(session, message, now)
            case EndJob():
                self.jobs.end(session, message, now)
            case Event():
                self.jobs.event(session, message, now)
            case Ask(what="abort"):
                if session.role != _CLIENT:
                    raise FaultError("forbidden", f"a {session.role} may not abort a job; a client may")
                job = self.state.jobs.get(message.job)
                self.jobs.abort(job, f"aborted by {session.node}", now)
                self.state.reply(session, Answer(message.ref, {"status": job.status}))
            case Ask(what="retry" | "drop"):
                if session.role != _CLIENT:
                    raise FaultError("forbidden", f"a {session.role} may not {message.what} a letter; a client may")
                self.state.reply(session, Answer(message.ref, order(self.state, message, session.node, now)))
            case Ask():
                self.state.reply(session, *answer(self.state, message))
            case _:
                raise AssertionError(message)

    # ------------------------------------------------------------ sessions

    def _hello(self, peer: bytes, hello: Hello, tail: bytes, now: float, sequence: int = 0) -> None:
        sites, held = names_in(tail, "sites"), _held(tail, self.state.settings.max_held)  # before anything is changed
        left = self.strikes.boxed(hello.node, now)
        if left:
            text = f"{hello.node} has sent too much that cannot be read: it may say Hello again in {left:.0f} s"
            raise FaultError("penalty", text)
        named = f"job/{hello.job}/{hello.claim}"
        if hello.role == _JOB:
            self.state.jobs.check(hello.job, hello.claim)
        if (hello.node != named) if hello.role == _JOB else hello.node.startswith("job/"):
            # one session a claim: a second process under another name would work beside the first
            raise FaultError("hello", f"node {hello.node!r} of a {hello.role}; job/ID/CLAIM is its job process's alone")
        arrival = self.state.sessions.hello(peer, hello, sites, now, tail)
        session = arrival.session
        if session is None:
            return  # a rival may be dying: decided in tick
        session.heard_sequence = sequence
        for old in arrival.ended:
            self._say_dead(old, "another has come in its place", now)
            if old.node == session.node and old.role == session.role == _EXECUTOR:
                self._tell_ended(old)  # its leases go to the new boot, or back, with what that holds
            else:
                self._ended(old, now, polite=False)
        self.streams.drop(session)
        welcome = self.state.welcome(session)
        self.state.data_replies.append(welcome)
        self.state.reply(session, welcome)
        if session.role == _EXECUTOR:
            self.tasks.arrived(session, held, now)
        elif session.role == _JOB:
            self.state.jobs.session_up(hello.job, hello.claim)
        if arrival.state == "again":
            self.state.counters[f"again.{session.role}"] += 1
        log.info("session_up", node=session.node, role=session.role, again=arrival.state == "again", sites=len(sites))

    def _say_dead(self, session: Session, why: str, now: float) -> None:
        """The one line and the count of a peer that is gone without a goodbye."""
        self.state.counters[f"dead.{session.role}"] += 1
        silent_s = round(now - session.seen, 1)
        log.warning("session_dead", node=session.node, reason=why, silent_s=silent_s, next=_NEXT[session.role])

    def end_session(self, session: Session, now: float, *, polite: bool) -> None:
        """A session is over: its peer said so, or is dead."""
        self.state.sessions.end(session)
        self._ended(session, now, polite=polite)

    def _ended(self, session: Session, now: float, *, polite: bool) -> None:
        self._tell_ended(session)
        if session.role == _EXECUTOR:
            self.tasks.gone(session, now, polite=polite)
        else:
            self.jobs.gone(session, now)
        log.info("session_ended", node=session.node, role=session.role, polite=polite)

    def _tell_ended(self, session: Session) -> None:
        self.state.data_replies.append(Bye(session.id))

    def unreachable(self, session: Session, now: float) -> None:
        """A send failed because the connection is closed. The session waits for the peer's return."""
        for message, _ in session.outbox:
            if isinstance(message, Claimed):
                self.jobs.unsent(session, message, now)
        self.state.sessions.unreachable(session, now)
        self.streams.drop(session)

    # ------------------------------------------------------------ the data process

    def handle_data(self, packet: Packet, now: float) -> None:
        """A message off the internal channel; answers are in ``data_out`` after the commit."""
        match packet.message:
            case Hello():
                # it was started anew, or asks because it does not know a session: tell it of all
                sessions = self.state.sessions.by_id.values()
                self.state.data_replies.extend(self.state.welcome(session) for session in sessions)
            case Ping():
                self.state.data_replies.append(Pong())
            case Event(kind="bounds") as message:
                self.state.data_figures = figures_of(message.data)
            case Put() as message:
                answer_ = self.payloads.from_data(message, now, bytes(packet.tail).decode("ascii", "replace"))
                if answer_ is not None:
                    self.state.data_replies.append(answer_)
            case message:
                log.warning("unexpected_from_data", kind=type(message).__name__)

    # ------------------------------------------------------------ the turn

    def tick(self, now: float) -> None:
        """Everything that time brings, then work for whoever has room."""
        state = self.state
        state.ledger.tick(now)
        if now - self._scanned_at >= _SCAN_S:
            self._scanned_at = now
            self._scan(now)
        self._settle_arrivals(now)
        self.jobs.pump(now)
        self.tasks.pump(now)
        self._note(now)
        state.bounds.tick(now)

    def _scan(self, now: float) -> None:
        """The sessions, for those that are dead or silent."""
        state = self.state
        for session in state.sessions.dead(now):
            why = "outbox full" if session.overflowed else "silent"
            if session.overflowed:
                by_count = len(session.outbox) >= session.timing.outbox_messages
                state.bounds.reached("outbox_messages" if by_count else "outbox_bytes")
            self._say_dead(session, why, now)
            self.end_session(session, now, polite=False)
        for session in state.sessions.to_probe(now):
            state.reply(session, Pong())
        if now - self._expired_at >= _EXPIRE_S:
            self._expired_at = now
            state.payloads.expire("submit", now - SUBMIT_KEEP_S)
            for job in state.jobs.active():  # partials whose executors died before their Done
                state.payloads.expire(f"part:{job.id}", now - SUBMIT_KEEP_S)
            self.payloads.expire_admissions(now)
            state.journal_full = state.journal.size() > state.settings.journal_bytes

    def _settle_arrivals(self, now: float) -> None:
        """Hellos that waited for a rival's death."""
        state = self.state
        for peer, hello, _, tail, fault in state.sessions.settle_arrivals(now):
            if fault is not None:
                state.fault(peer, fault, fatal=True)
                continue
            try:
                self._hello(peer, hello, cast("bytes", tail), now)
            except FaultError as error:
                state.fault(peer, error, fatal=True)

    def _note(self, now: float) -> None:
        """What the ledger brought about by itself and the job's record should have."""
        state = self.state
        for task in state.ledger.bad_ends:
            post(state, task, now)
        state.ledger.bad_ends.clear()
        for gather in state.ledger.dirty_gathers.values():
            job = state.jobs.jobs.get(gather.job)
            if job is not None:
                state.jobs.add_sites(job, (task.site for task in gather.tasks.values()))

    def commit(self) -> None:
        """One transaction for the turn, then its answers go into the outboxes and freed files to `doomed`.

        Raises:
            StorageError: the disk refused: this process must end, since memory is ahead of the journal.
        """
        state = self.state
        fault_point("control.before_commit")
        state.journal.save(state.ledger, state.jobs, state.payloads, state.events, state.records)
        fault_point("control.after_commit_before_send")
        if state.events:
            most = state.settings.max_events
            full = {e.job for e in state.events if e.seq > most and e.seq % max(1, most // TRIM_SHARE) == 0}
            for job in full:
                state.bounds.reached("max_events", state.journal.trim_events(job, most))
            state.events.clear()
        state.records.clear()
        if state.payloads.doomed:
            for payload in state.payloads.doomed:
                state.forget_small(payload)
                state.spool.delete(payload)
            state.payloads.doomed.clear()
        if state.abandoned:
            state.spool.drop_incoming(state.abandoned)
            state.abandoned.clear()
        for to, message, tail in state.replies:
            if isinstance(to, Session):
                if to.lost_at is None:
                    to.push(message, tail)
                elif isinstance(message, Claimed):
                    self.jobs.unsent(to, message, to.lost_at)
            else:
                self.loose.append((to, message, tail))
        state.replies.clear()
        self.data_out.extend(state.data_replies)
        state.data_replies.clear()
        self.streams.pump(state.sessions.by_id)

    def next_at(self, now: float) -> float:
        """When `tick` is needed at the latest, if no message comes."""
        timing = self.state.settings.timing
        if self.tasks.more:
            return now
        soonest = now + (0.05 if self.state.sessions.waiting else min(1.0, timing.ping_s / 2))
        due = self.state.ledger.next_at
        return soonest if due is None else max(now, min(soonest, due))


def _held(tail: bytes, most: int) -> list[TaskRef]:
    """The attempts that an executor holds, out of Hello's tail.

    Raises:
        CodecError: not a list of [task, attempt]. FaultError: ``too_many``.
    """
    if not tail:
        return []
    values: dict[str, Any] = unpack(tail, max_bytes=MAX_TAIL_BYTES)
    pairs: Any = values.get("held", [])
    if not isinstance(pairs, list):
        raise CodecError("the tail has no list 'held'")
    pairs = cast("list[Any]", pairs)
    if len(pairs) > most:
        text = f"{len(pairs)} held attempts; at most {most} (max_held): serve fewer sites, or raise it"
        raise FaultError("too_many", text, bound="max_held")
    out: list[TaskRef] = []
    for pair in pairs:
        match pair:
            case [str() as task, int() as attempt] if 0 < attempt < 2**31 and len(task) <= 64:
                out.append(TaskRef(TaskId(task), attempt))
            case _:
                raise CodecError(f"held: {pair!r} is no [task, attempt]")
    return out
