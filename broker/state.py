"""What the control process's desks share: the pure tables, the journal, and answers that wait for the commit."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..serialization.codec import encode_fields, pack
from ..serialization.errors import FaultError
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
from .jobs import Jobs
from .journal import EventRow, Journal
from .ledger import Ledger, Limits
from .payloads import PayloadTable
from .quota import Quota
from .sessions import Session, Sessions, Timing
from .spool import Spool

__all__ = ["BODY_BUDGET", "BrokerState", "Settings", "batches", "weigh"]

T = TypeVar("T")

#: What lists may take of a message's body of 64 KiB; the rest is for its other fields.
BODY_BUDGET = 56 * 1024
_CACHED_BYTES = 8 * 1024 * 1024
_MAX_LOOSE = 4096
_MAX_LATE = 10_000


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
    max_jobs: int = 10_000
    max_events: int = 50_000  # a job's; the oldest go
    quota_bytes: int = 0  # of all payloads together; 0: no bound
    max_meta_bytes: int = 32 * 1024  # of a submission


class BrokerState:
    """Tables, journal and spool; ``reply`` holds answers back until the turn is committed."""

    def __init__(self, settings: Settings, journal: Journal, spool: Spool, epoch: str, seed: int | None = None) -> None:
        self.settings = settings
        self.journal = journal
        self.spool = spool
        self.epoch = epoch
        self.ledger = Ledger(settings.limits, seed)
        self.jobs = Jobs(settings.start_s, settings.max_jobs)
        self.sessions = Sessions(settings.timing)
        self.payloads = PayloadTable()
        self.quota = Quota(settings.quota_bytes, self.payloads, self.jobs, self.ledger)
        #: tasks and payloads whose half-finished uploads are not wanted any more
        self.abandoned: set[str] = set()
        self.events: list[EventRow] = []
        self.records: list[tuple[JobId, int, CommitRef]] = []
        self.replies: list[tuple[Session | bytes, Message, bytes]] = []
        self.data_replies: list[Message] = []
        self.counters: Counter[str] = Counter()
        self._small: OrderedDict[PayloadId, bytes] = OrderedDict()
        self._small_bytes = 0

    # ------------------------------------------------------------ answers

    def reply(self, to: Session | bytes, message: Message, tail: bytes = b"") -> None:
        """Send after the commit, to a session or (before there is one) to a connection."""
        if isinstance(to, Session) or len(self.replies) < _MAX_LOOSE:
            self.replies.append((to, message, tail))

    def fault(
        self, to: Session | bytes, error: FaultError, ref: int = 0, about: int = 0, *, fatal: bool = False
    ) -> None:
        """Send a typed fault after the commit."""
        self.counters[f"fault.{error.code}"] += 1
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
        )

    # ------------------------------------------------------------ records

    def event(
        self, job: JobId, kind: str, now: float, *, site: str = "", text: str = "", data: dict[str, Any] | None = None
    ) -> None:
        """Keep an event about a job."""
        if job not in self.jobs.jobs:
            return
        seq = self.journal.event_seq.get(job, 0) + 1
        self.journal.event_seq[job] = seq
        self.events.append(EventRow(job, seq, now, kind, site, text, data or {}))

    def late(self, job_id: JobId, gather: GatherId, count: int) -> int:
        """Count results that were refused into their round's number; returns the round, -1 where nobody knows it."""
        job = self.jobs.jobs.get(job_id)
        known = self.ledger.gathers.get(gather)
        round_ = known.spec.round if known else self.ledger.past.get(gather, -1)
        if job is not None and count and len(job.late) < _MAX_LATE:
            self.jobs.refused(job, round_, count)
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
            self._small_bytes += len(data)
            while self._small_bytes > _CACHED_BYTES:
                self._small_bytes -= len(self._small.popitem(last=False)[1])
        return data

    def forget_small(self, payload: PayloadId) -> None:
        """The payload is gone."""
        data = self._small.pop(payload, None)
        if data is not None:
            self._small_bytes -= len(data)


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
