"""Which payloads exist and who holds them; a payload lives while a holder does. Pure: the journal and the spool follow.

Holders: ``commit:<job>`` and ``best:<job>`` (models and state of the last commit), ``job:<job>`` (its archive),
``gather:<id>`` (models, fold plans and results of gathers whose round is not committed), ``checkpoint:<id>``,
``task:<id>`` (a result that came before its Done), ``part:<job>`` (a partial that came before its Done; until the next
commit, for an hour at most), ``put:<job>`` (put by a job's process and not used yet; until its next commit or claim),
``submit`` (put by a client and not used yet; for an hour).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..serialization.messages import PayloadId, PayloadRef

__all__ = ["SUBMIT_KEEP_S", "Hold", "PayloadTable", "RowOp"]

SUBMIT_KEEP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Hold:
    """One holder's claim on one payload, since a time."""

    payload: PayloadId
    holder: str
    at: float


@dataclass(frozen=True, slots=True)
class RowOp:
    """A change for the journal: a payload's row or a reference's row comes or goes."""

    add: bool
    row: PayloadRef | Hold


class PayloadTable:
    """Payload rows and their holders; what has changed is in ``ops``, whose files may go is in ``doomed``."""

    def __init__(self) -> None:
        self.rows: dict[PayloadId, PayloadRef] = {}
        self.holds: dict[PayloadId, dict[str, float]] = {}
        self.ops: list[RowOp] = []
        self.doomed: dict[PayloadId, None] = {}
        self.used_bytes = 0
        self._by_holder: dict[str, set[PayloadId]] = {}

    def load(self, rows: Iterable[PayloadRef], holds: Iterable[Hold]) -> None:
        """Take journaled rows in, without noting them as changes."""
        for row in rows:
            self.rows[row.id] = row
            self.used_bytes += row.size
            self.holds.setdefault(row.id, {})
        for hold in holds:
            if hold.payload in self.rows:
                self.holds[hold.payload][hold.holder] = hold.at
                self._by_holder.setdefault(hold.holder, set()).add(hold.payload)

    def has(self, ref: PayloadRef) -> bool:
        """Whether exactly this payload is stored."""
        row = self.rows.get(ref.id)
        return (
            row is not None and row.size == ref.size and (not ref.digest or not row.digest or row.digest == ref.digest)
        )

    def add(self, ref: PayloadRef, holder: str, now: float) -> None:
        """A payload has landed in the spool."""
        known = self.rows.get(ref.id)
        if known != ref:
            self.used_bytes += ref.size - (known.size if known else 0)
            self.rows[ref.id] = ref
            self.holds.setdefault(ref.id, {})
            self.ops.append(RowOp(True, ref))
        self.doomed.pop(ref.id, None)
        self.hold(ref.id, holder, now)

    def hold(self, payload: PayloadId, holder: str, now: float) -> None:
        """The holder keeps the payload from now on."""
        if payload in self.rows and holder not in self.holds[payload]:
            self.holds[payload][holder] = now
            self._by_holder.setdefault(holder, set()).add(payload)
            self.ops.append(RowOp(True, Hold(payload, holder, now)))

    def release(self, payload: PayloadId, holder: str) -> None:
        """The holder needs the payload no more; without any holder its row goes now and its file after the commit."""
        holders = self.holds.get(payload)
        if holders is None or holder not in holders:
            return
        at = holders.pop(holder)
        held = self._by_holder[holder]
        held.discard(payload)
        if not held:
            del self._by_holder[holder]
        self.ops.append(RowOp(False, Hold(payload, holder, at)))
        if not holders:
            self._drop(payload)

    def release_all(self, holder: str, keep: Iterable[PayloadId] = ()) -> None:
        """The holder needs none of its payloads any more, but those in ``keep``."""
        held = self._by_holder.get(holder)
        for payload in sorted(held.difference(keep)) if held else ():
            self.release(payload, holder)

    def held_by(self, holder: str) -> frozenset[PayloadId]:
        """What the holder holds."""
        return frozenset(self._by_holder.get(holder, ()))

    def expire(self, holder: str, before: float) -> None:
        """Release what the holder has held since before that time."""
        for payload in sorted(self._by_holder.get(holder, ())):
            if self.holds[payload][holder] < before:
                self.release(payload, holder)

    def lose(self, payload: PayloadId) -> frozenset[str]:
        """The payload's file is gone: forget its row; returns who held it."""
        holders = frozenset(self.holds.get(payload, ()))
        for holder in sorted(holders):
            self.release(payload, holder)
        if not holders:
            self._drop(payload)
        return holders

    def doom(self, payload: PayloadId) -> None:
        """The payload will not come: its file goes after the commit, if it is here without a row."""
        if payload not in self.rows:
            self.doomed[payload] = None

    def unheld(self) -> list[PayloadId]:
        """Rows that nobody holds (none, unless a journal was cut in a way that SQLite rules out)."""
        return [payload for payload, holders in self.holds.items() if not holders]

    def _drop(self, payload: PayloadId) -> None:
        row = self.rows.pop(payload, None)
        self.holds.pop(payload, None)
        if row is not None:
            self.ops.append(RowOp(False, row))
            self.used_bytes -= row.size
            self.doomed[payload] = None
