"""A payload's way over a data link, as two plain state machines: no sockets, no clock, no disk.

The receiver drives. A grant is absolute: everything before ``next`` is here, chunks below ``limit`` may be sent. One
message is acknowledgement, credit and resume point, so a late, lost or repeated one does no harm. Chunks are taken in
order only: a link keeps order, a gap arises at a reconnect alone, and nothing needs to be put together again in memory.

The sender goes back only on a newer epoch (the receiver was restarted, or answered a repeated `Put`), or when no grant
has advanced for its resend time. The receiver grants after every half window, on every duplicate, gap or corrupt chunk,
on the last chunk, and after a second of silence, which heals a lost grant.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from .checksum import crc32 as crc32_of
from .envelope import Buffer

#: A receiver that has heard nothing for so long repeats its grant.
SILENCE_S = 1.0
#: A sender's resend time doubles at each fruitless resend up to this many times its start.
RESEND_BACKOFF = 8


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How ``size`` bytes are cut into chunks of ``chunk_bytes``; the last may be shorter, no bytes are no chunks."""

    size: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.chunk_bytes < 1:
            raise ValueError(f"{self.size} bytes in chunks of {self.chunk_bytes}: sizes of at least 0 and 1 are needed")

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return -(-self.size // self.chunk_bytes)

    def span(self, index: int) -> tuple[int, int]:
        """Where chunk ``index`` lies: its first byte, and the one after its last.

        Raises:
            IndexError: there is no such chunk.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"chunk {index} of {self.count}")
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size)

    def whole_chunks(self, size: int) -> int:
        """How many chunks from the start lie within the first ``size`` bytes."""
        return self.count if size >= self.size else size // self.chunk_bytes


class GrantFields(NamedTuple):
    """What a `Grant` says, without the stream's id: ``Grant(stream, *receiver.grant())``."""

    epoch: int
    next: int
    limit: int


class Sender:
    """The side that has the bytes: says which chunk to send now.

    Args:
        plan: how the payload is cut.
        resend_s: how long no grant may advance, with chunks on their way, before they are sent again. It doubles with
            each fruitless resend, up to 8 times itself.
    """

    def __init__(self, plan: ChunkPlan, resend_s: float = 5.0) -> None:
        self.plan = plan
        self.resend_s = resend_s
        #: Everything before this chunk has arrived.
        self.acked = 0
        #: The next chunk to send.
        self.cursor = 0
        self.limit = 0
        #: How often the sender went back because no grant advanced.
        self.resends = 0
        self._epoch = -1
        self._wait_s = resend_s
        self._progress_at = 0.0

    def start(self, next: int, limit: int, now: float) -> None:
        """Begin (again) where a `Get` says; the grants that follow may carry any epoch."""
        self._epoch = -1
        self.acked = self.cursor = min(max(0, next), self.plan.count)
        self.limit = min(limit, self.plan.count)
        self._advanced(now)

    def on_grant(self, epoch: int, next: int, limit: int, now: float) -> None:
        """Take in a grant. Older epochs, and what was granted before, change nothing."""
        if epoch < self._epoch or not 0 <= next <= self.plan.count:
            return
        limit = min(limit, self.plan.count)
        if epoch > self._epoch and self._epoch >= 0:
            self.acked = self.cursor = next
            self.limit = limit
            self._advanced(now)
        elif next > self.acked or limit > self.limit:
            self.acked = max(self.acked, next)
            self.cursor = max(self.cursor, self.acked)
            self.limit = max(self.limit, limit)
            self._advanced(now)
        self._epoch = epoch

    def next_chunk(self, now: float) -> int | None:
        """The index of the chunk to send now, which counts as sent with this call; None when there is none."""
        if self.cursor > self.acked and now >= self._progress_at + self._wait_s:
            self.cursor = self.acked
            self.resends += 1
            self._wait_s = min(self._wait_s * 2, self.resend_s * RESEND_BACKOFF)
            self._progress_at = now
        if self.cursor >= self.limit:
            return None
        if self.cursor == self.acked:
            self._progress_at = now  # the clock of a resend starts with the first chunk on its way
        self.cursor += 1
        return self.cursor - 1

    @property
    def sent_all(self) -> bool:
        """Every chunk is on its way: `Finish` may follow, since a link keeps order."""
        return self.cursor >= self.plan.count

    @property
    def done(self) -> bool:
        """Every chunk has arrived."""
        return self.acked >= self.plan.count

    @property
    def deadline(self) -> float | None:
        """When `next_chunk` is to be asked again although no grant came; None: only a grant helps."""
        return self._progress_at + self._wait_s if self.cursor > self.acked else None

    @property
    def progress_at(self) -> float:
        """When a grant last advanced, or the first chunk behind it was sent."""
        return self._progress_at

    def _advanced(self, now: float) -> None:
        self._progress_at = now
        self._wait_s = self.resend_s


class Outcome(enum.Enum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    GAP = "gap"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk's outcome; ``start`` is where its bytes belong if it was accepted, ``grant`` asks for a `Grant` now."""

    outcome: Outcome
    grant: bool
    start: int = 0

    @property
    def accepted(self) -> bool:
        """The bytes are new, whole and next in order: keep them."""
        return self.outcome is Outcome.ACCEPTED


class Receiver:
    """The side that wants the bytes: accepts each chunk once, in order, and hands out grants.

    Args:
        plan: how the payload is cut.
        window: how many chunks beyond ``next`` may be on their way; at least 1.
        epoch: a number that rises with each restart of this side; below 2^32.
        start: the watermark: chunks before it are here already.
        stall_s: see `stalled`.
        now: when it begins; without it the silence and stall timers begin when they are first asked.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        window: int,
        epoch: int,
        start: int = 0,
        *,
        stall_s: float = 30.0,
        now: float | None = None,
    ) -> None:
        if window < 1 or not 0 <= start <= plan.count:
            raise ValueError(f"window {window}, start {start} of {plan.count} chunks")
        self.plan = plan
        self.window = window
        self.epoch = epoch
        self.stall_s = stall_s
        #: The watermark: the chunk that is accepted next.
        self.next = start
        #: Chunks that no grant covered, or of the wrong length or index: the sender breaks the protocol.
        self.strikes = 0
        #: Chunks whose bytes did not match their checksum, in a row.
        self.corrupt = 0
        self._limit = min(start + window, plan.count)
        self._since_grant = 0
        self._heard_at = now
        self._progress_at = now

    def grant(self, now: float | None = None) -> GrantFields:
        """What to grant now. The limit never falls. With ``now`` the second of silence starts anew."""
        if now is not None:
            self._heard_at = now
        self._limit = max(self._limit, min(self.next + self.window, self.plan.count))
        self._since_grant = 0
        return GrantFields(self.epoch, self.next, self._limit)

    def resume(self, epoch: int, now: float) -> GrantFields:
        """The grant that answers a repeated `Put`: under its newer epoch the sender goes back to the watermark."""
        self.epoch = epoch
        self._heard_at = self._progress_at = now
        return self.grant()

    def on_chunk(self, index: int, data: Buffer, crc32: int, now: float) -> Arrival:
        """Judge a chunk; when it is accepted the watermark has moved behind it."""
        self._heard_at = now
        if index < self.next:
            return Arrival(Outcome.DUPLICATE, grant=True)
        if index > self.next:
            self.strikes += index >= self._limit
            return Arrival(Outcome.GAP, grant=True)
        if index >= self._limit:
            self.strikes += 1
            return Arrival(Outcome.GAP, grant=True)
        start, stop = self.plan.span(index)
        if len(data) != stop - start:
            self.strikes += 1
            return Arrival(Outcome.CORRUPT, grant=True)
        if crc32_of(data) != crc32:
            self.corrupt += 1
            return Arrival(Outcome.CORRUPT, grant=True)
        self.corrupt = 0
        self.next += 1
        self._since_grant += 1
        self._progress_at = now
        return Arrival(Outcome.ACCEPTED, self.complete or self._since_grant >= max(1, self.window // 2), start)

    @property
    def granted(self) -> int:
        """How many chunks may be on their way."""
        return self._limit - self.next

    @property
    def complete(self) -> bool:
        """Every chunk is here."""
        return self.next >= self.plan.count

    def due(self, now: float) -> bool:
        """A second of silence has passed: a grant should be sent (again). Says so once, then waits another second."""
        if self._heard_at is None:
            self._heard_at = now
        if self.complete or now < self._heard_at + SILENCE_S:
            return False
        self._heard_at = now
        return True

    @property
    def deadline(self) -> float | None:
        """When `due` becomes true if nothing comes before; None once complete, or before `due` was ever asked."""
        return None if self.complete or self._heard_at is None else self._heard_at + SILENCE_S

    def stalled(self, now: float) -> bool:
        """No new chunk for ``stall_s``, although there is always leave to send at least one."""
        if self._progress_at is None:
            self._progress_at = now
        return not self.complete and now >= self._progress_at + self.stall_s
