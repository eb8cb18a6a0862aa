"""What each job process is told of its gathers: Receipts, and results in the order of their numbers.

Nothing is queued here. A subscription is a few numbers (how far this session was told), and the messages are read off
the ledger and the journal (which has its last rows in memory) when the session has room, so that a slow job process
costs no memory and nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..serialization.codec import encode_fields, pack
from ..serialization.messages import (
    INLINE_TOTAL_BYTES,
    Failure,
    GatherId,
    PackedDone,
    PayloadRef,
    Receipt,
)
from .gathers import Gather
from .journal import Journal, StoredResult
from .ledger import Ledger
from .sessions import Session
from .state import BODY_BUDGET, weigh

__all__ = ["Streams", "Subscription", "receipt"]

_READ = 64
_MAX_ITEMS = 256


@dataclass(slots=True)
class Subscription:
    """How far a session was told of a gather."""

    gather: GatherId
    ref: int
    cursor: int  # the next result to send
    told: str = ""  # the state that the last Receipt said
    failures: int = 0


class Streams:
    """The subscriptions of all job sessions."""

    def __init__(self, ledger: Ledger, journal: Journal) -> None:
        self._ledger = ledger
        self._journal = journal
        self._by_session: dict[str, dict[GatherId, Subscription]] = {}

    def open(self, session: Session, gather: Gather, ref: int, have: int) -> None:
        """The session asked for the gather and has its first ``have`` results."""
        self._by_session.setdefault(session.id, {})[gather.id] = Subscription(gather.id, ref, have)

    def drop(self, session: Session) -> None:
        """The session is over, or starts anew and will ask again."""
        self._by_session.pop(session.id, None)

    def pump(self, sessions: dict[str, Session]) -> None:
        """Move what there is to tell into the outboxes, as far as they have room. Only after the commit."""
        for session_id in list(self._by_session):
            session = sessions.get(session_id)
            if session is None:
                del self._by_session[session_id]
                continue
            subscriptions = self._by_session[session_id]
            for gid in list(subscriptions):
                gather = self._ledger.gathers.get(gid)
                if gather is None or self._tell(session, gather, subscriptions[gid]):
                    del subscriptions[gid]
            if not subscriptions:
                del self._by_session[session_id]

    def _tell(self, session: Session, gather: Gather, sub: Subscription) -> bool:
        """Push until all is told or the outbox is half full; whether the stream has come to its end."""
        while session.room:
            if not sub.told or sub.failures < len(gather.failed) or (sub.told == "waiting" != gather.state):
                self._tell_failures(session, gather, sub)
            elif sub.cursor < len(gather.results):
                if not self._tell_results(session, gather, sub):
                    return True
            elif sub.told != gather.state:
                session.push(receipt(gather, sub.ref, gather.state))
                sub.told = gather.state
            else:
                return not gather.live
        return False

    def _tell_failures(self, session: Session, gather: Gather, sub: Subscription) -> None:
        """A Receipt with the failures that were not told yet, or as many as fit. The end is told last."""
        batch: list[Failure] = []
        used = 0
        for tid in gather.failed[sub.failures :]:
            task = gather.tasks[tid]
            if task.given_up:  # else it was retried since
                failure = task.failure()
                used += weigh(failure)
                if batch and used > BODY_BUDGET:
                    break
                batch.append(failure)
            sub.failures += 1
        all_told = sub.failures == len(gather.failed)
        if sub.told in ("", "waiting"):
            opening = not sub.told and all_told
            sub.told = gather.state if opening or gather.live else "open"
        session.push(replace(receipt(gather, sub.ref, sub.told), failures=tuple(batch)))

    # ------------------------------------------------------------ results

    def _tell_results(self, session: Session, gather: Gather, sub: Subscription) -> bool:
        """One Done from the cursor on; False where the journal does not have the result (it was lost and is redone)."""
        at = sub.cursor
        if at < gather.covered and gather.checkpoint is not None:
            done, tail = self._group(gather, at, gather.covered, gather.checkpoint, b"")
        elif partial := gather.results[at].partial:
            info = gather.partials[partial]
            inline = self._journal.partial_bytes(gather.id, info.first) if info.inline else b""
            done, tail = self._group(gather, at, info.first + info.count, info.payload, inline)
        else:
            done, tail = self._singles(gather, at)
        if not done.items:
            return False
        sub.cursor += len(done.items)
        session.push(done, tail)
        return True

    def _group(
        self, gather: Gather, start: int, stop: int, payload: PayloadRef, inline: bytes
    ) -> tuple[PackedDone, bytes]:
        """Results that are one payload. More than one message holds: the next Done names the same payload again."""
        rows = self._journal.results(gather.id, start, min(stop - start, _MAX_ITEMS))
        items = tuple([_bare(row) for row in _fitting(rows)])
        return PackedDone(gather.job, gather.id, items, payload, len(inline)), inline

    def _singles(self, gather: Gather, start: int) -> tuple[PackedDone, bytes]:
        items: list[bytes] = []
        tail: list[bytes] = []
        for row in _fitting(self._journal.results(gather.id, start, _READ)):
            if row.partial is not None:
                break
            items.append(row.packed)
            if row.inline:
                tail.append(row.inline)
        return PackedDone(gather.job, gather.id, tuple(items)), b"".join(tail)


def receipt(gather: Gather, ref: int, state: str) -> Receipt:
    """The state of a gather for its job process."""
    assert state in ("waiting", "open", "closed", "failed")
    return Receipt(ref, gather.job, gather.id, state, len(gather.tasks), len(gather.results), gather.reason)


def _bare(row: StoredResult) -> bytes:
    """The item of a result whose bytes are those of a partial or a checkpoint."""
    if row.item.payload is None and not row.item.inline_bytes:
        return row.packed
    return pack(encode_fields(replace(row.item, payload=None, inline_bytes=0)))


def _fitting(rows: list[StoredResult]) -> list[StoredResult]:
    """The first rows that one message holds."""
    out: list[StoredResult] = []
    body = tail = 0
    for row in rows:
        body += len(row.packed)
        tail += len(row.inline or b"") if row.partial is None else 0
        if out and (body > BODY_BUDGET or tail > INLINE_TOTAL_BYTES):
            break
        out.append(row)
    return out
