"""What the control process's desks share: the pure tables, the journal, and answers that wait for the commit."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..serialization.codec import encode_fields, pack
from ..serialization.errors import FaultError
from ..serialization.jobmessages import START_FEATURE
from ..serialization.messages import (
    INLINE_BYTES,
    CommitRef,
    Fault,
    GatherId,
    JobId,
    Message,
    PayloadId,
    PayloadRef,
    Welcome,
)
from .bounds import Bounds, Figure
from .jobs import Jobs
from .journal import EventRow, Journal
from .ledger import Ledger, Limits
from .payloads import PayloadTable
from .quota import Quota
from .sessions import Session, Sessions, Timing
from .spool import Spool

__all__ = ["BODY_BUDGET", "TRIM_SHARE", "BrokerState", "Settings", "batches", "weigh"]

T = TypeVar("T")

#: What lists may take of a message's body of 64 KiB; the rest is for its other fields.
BODY_BUDGET = 56 * 1024
#: A job's oldest events go when so many more than it may have (a part of those) are there: each time is a transaction.
TRIM_SHARE = 50


@dataclass(frozen=True, slots=True)
class Settings:
    """What the control process is told; sizes in bytes, times in seconds."""

    timing: Timing = field(default_factory=Timing)
    limits: Limits = field(default_factory=Limits)
    data_endpoint: str = ""
    chunk_bytes: int = 1024 * 1024
    window: int = 8
    integrity: Literal["digest", "size"] = "digest"
    trust_local: bool = False
    start_s: float = 30.0  # how long a claimed job's process has to say Hello
    quota_bytes: int = 0  # of all payloads together; 0: no bound
    site_bytes: int = 0  # of the results of one site in the spool; 0: no bound
    max_turns: int = 10_000  # uploads that wait for room in the spool and keep their turn
    journal_bytes: int = 16 * 1024**3  # of the database; over it no new job is taken, and no event
    max_jobs: int = 10_000  # the oldest that have ended are forgotten
    max_crashes: int = 5  # of a job's process since the last commit
    max_events: int = 50_000  # a job's; the oldest go, half of them kept for what scripts log if they log so much
    max_event_bytes: int = 32 * 1024  # of one event; a longer text is cut, larger data left out
    max_late: int = 10_000  # rounds of a job whose late results are counted
    max_held: int = 100_000  # attempts that an executor may say it holds
    max_meta_bytes: int = 32 * 1024  # of a submission
    max_config_bytes: int = 40 * 1024  # of a gather
    max_result_meta_bytes: int = 60 * 1024  # of one result
    max_loose: int = 4096  # answers a turn to connections without a session; more are not given
    small_cache_bytes: int = 8 * 1024**2  # of small payloads kept in memory
    data_outbox_messages: int = 65536  # for the data process; the oldest go, since each is asked for again
    log_lines_per_s: int = 200  # of one kind; more are counted and not written


class BrokerState:
    """Tables, journal and spool; ``reply`` holds answers back until the turn is committed."""

    def __init__(self, settings: Settings, journal: Journal, spool: Spool, epoch: str, seed: int | None = None) -> None:
        self.settings = settings
        self.journal = journal
        self.spool = spool
        self.epoch = epoch
        self.ledger = Ledger(settings.limits, seed)
        self.bounds = Bounds()
        self.jobs = Jobs(settings.start_s, settings.max_jobs, settings.max_crashes, settings.timing.lost_s)
        self.sessions = Sessions(settings.timing)
        self.payloads = PayloadTable()
        self.quota = Quota(
            settings.quota_bytes,
            self.payloads,
            self.jobs,
            self.ledger,
            self.bounds,
            site_bytes=settings.site_bytes,
            max_turns=settings.max_turns,
        )
        #: what the data process said last of its own bounds
        self.data_figures: dict[str, Figure] = {}
        self.data_outbox = 0  # messages that wait for the data process
        self.journal_full = False
        #: tasks and payloads whose half-finished uploads are not wanted any more
        self.abandoned: set[str] = set()
        self.events: list[EventRow] = []
        self.records: list[tuple[JobId, int, CommitRef]] = []
        self.replies: list[tuple[Session | bytes, Message, bytes]] = []
        self.data_replies: list[Message] = []
        self.counters: Counter[str] = Counter()
        self._small: OrderedDict[PayloadId, bytes] = OrderedDict()
        self.small_bytes = 0

    # ------------------------------------------------------------ answers

    def reply(self, to: Session | bytes, message: Message, tail: bytes = b"") -> None:
        """Send after the commit, to a session or (before there is one) to a connection."""
        if isinstance(to, Session) or len(self.replies) < self.settings.max_loose:
            self.replies.append((to, message, tail))
        else:
            self.bounds.reached("max_loose")

    def fault(
        self, to: Session | bytes, error: FaultError, ref: int = 0, about: int = 0, *, fatal: bool = False
    ) -> None:
        """Send a typed fault after the commit."""
        self.counters[f"fault.{error.code}"] += 1
        if error.bound:
            self.bounds.reached(error.bound)
        self.reply(to, Fault(error.code[:256], str(error)[:4096], ref, about, fatal))

    def welcome(self, session: Session) -> Welcome:
        """The session's Welcome, for its peer and for the data process."""
        settings = self.settings
        return Welcome(
            session=session.id,
            epoch=self.epoch,
            ping_s=settings.timing.ping_s,
            dead_s=settings.timing.dead_s,
            data_endpoint=settings.data_endpoint,
            chunk_bytes=settings.chunk_bytes,
            window=settings.window,
            spool_dir=str(self.spool.root) if settings.trust_local else "",
            spool_token=self.spool.token if settings.trust_local else "",
            integrity=settings.integrity,
            features=(START_FEATURE,),
        )

    # ------------------------------------------------------------ records

    def event(
        self, job: JobId, kind: str, now: float, *, site: str = "", text: str = "", data: dict[str, Any] | None = None
    ) -> None:
        """Keep an event about a job."""
        if job not in self.jobs.jobs:
            return
        text, data = self._cut(text, data or {})
        seq = self.journal.event_seq.get(job, 0) + 1
        self.journal.event_seq[job] = seq
        self.events.append(EventRow(job, seq, now, kind, site, text, data))

    def _cut(self, text: str, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """What is kept of an event: the end of its text, and its data where that fits beside it."""
        most = self.settings.max_event_bytes
        size = len(text.encode())
        if size > most:
            self.bounds.reached("max_event_bytes")
            text = text.encode()[-most:].decode(errors="ignore")
        if data and min(size, most) + len(pack(data)) > most:
            self.bounds.reached("max_event_bytes")
            data = {"left_out": f"data of more than {most} bytes (max_event_bytes)"}
        return text, data

    def events_kept(self, job: JobId) -> int:
        """How many events of a job the journal has at most: the oldest go some at a time."""
        most = self.settings.max_events
        return min(self.journal.event_seq.get(job, 0), most + most // TRIM_SHARE)

    def check_journal(self) -> None:
        """Refuse what only adds to a full journal.

        Raises:
            FaultError: ``journal_full``.
        """
        if self.journal_full:
            most = self.settings.journal_bytes
            text = f"the journal has {self.journal.size()} bytes; at most {most} (journal_bytes): raise it"
            raise FaultError("journal_full", text, bound="journal_bytes")

    def late(self, job_id: JobId, gather: GatherId, count: int) -> int:
        """Count results that were refused into their round's number; returns the round, -1 where nobody knows it."""
        job = self.jobs.jobs.get(job_id)
        known = self.ledger.gathers.get(gather)
        round_ = known.spec.round if known else self.ledger.past.get(gather, -1)
        if job is not None and count:
            if str(round_) in job.late or len(job.late) < self.settings.max_late:
                self.jobs.refused(job, round_, count)
            else:
                self.bounds.reached("max_late")
        return round_

    def require(self, *refs: PayloadRef | None) -> None:
        """Payloads that a request refers to must be here.

        Raises:
            FaultError: ``unknown_payload``.
        """
        for ref in refs:
            if ref is not None and not self.payloads.has(ref):
                raise FaultError("unknown_payload", f"payload {ref.id} of {ref.size} bytes is not here: put it first")

    def small(self, ref: PayloadRef) -> bytes | None:
        """The bytes of a payload that fits inline, from a small cache or the spool; None where it is larger or gone."""
        if ref.size > INLINE_BYTES:
            return None
        if ref.id in self._small:
            self._small.move_to_end(ref.id)
            return self._small[ref.id]
        data = self.spool.read(ref.id, INLINE_BYTES)
        if data is not None:
            self._small[ref.id] = data
            self.small_bytes += len(data)
            while self.small_bytes > self.settings.small_cache_bytes:
                self.bounds.reached("small_cache_bytes")
                self.small_bytes -= len(self._small.popitem(last=False)[1])
        return data

    def forget_small(self, payload: PayloadId) -> None:
        """The payload is gone."""
        data = self._small.pop(payload, None)
        if data is not None:
            self.small_bytes -= len(data)


def weigh(item: Any) -> int:
    """The bytes of a dataclass in a message's list."""
    return len(pack(encode_fields(item))) + 4


def batches(
    items: Sequence[T], weight: Callable[[T], int], budget: int = BODY_BUDGET, most: int = 256
) -> Iterator[tuple[T, ...]]:
    """Cut a list so that each part fits into one message."""
    batch: list[T] = []
    used = 0
    for item in items:
        size = weight(item)
        if batch and (used + size > budget or len(batch) >= most):
            yield tuple(batch)
            batch, used = [], 0
        batch.append(item)
        used += size
    if batch:
        yield tuple(batch)
